//! A part of the server that panics ends the process, with its name in the log: a server that serves without its outbox, its
//! heartbeat or its upkeep would be found out by what is missing.

use strum::VariantArray;
use tidemill::{pb::WatchBatchRequest, sim::SimConfig, supervise::Part};

use crate::{create, input, server::Server, support::postgres, upload, worker};

macro_rules! parts {
    ($($name:ident: $part:ident;)*) => {
        /// A part that no test kills would be a hole in the table.
        #[test]
        fn every_part_has_its_test() {
            let tested = [$(Part::$part),*];
            assert!(Part::VARIANTS.iter().all(|part| tested.contains(part)));
        }
        $(#[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            ends_with_its_name(Part::$part).await;
        })*
    };
}

parts! {
    api: Api;
    scheduler: Scheduler;
    upkeep: Upkeep;
    hub: Hub;
    hub_read: HubRead;
    heartbeat: Heartbeat;
    workers: Workers;
    probe: Probe;
    limit: Limit;
    webhooks: Webhooks;
    retry_jobs: RetryJobs;
    resealing: Resealing;
    listener: Listener;
    store_check: StoreCheck;
}

async fn ends_with_its_name(part: Part) {
    let (_sim, url) = worker(SimConfig::default()).await;
    let mut flags = vec!["--worker", &url, "--drain-timeout", "1s"];
    let database = if part == Part::Listener {
        let Some(database) = postgres::database().await else { return };
        database
    } else {
        String::new()
    };
    if part == Part::Listener {
        flags.extend(["--database-url", &database]);
    }
    let mut server = Server::new(&flags);
    server.spawn_with_fault(&format!("panic-{part}"));
    if part == Part::HubRead {
        // Nothing is read before somebody watches.
        let mut client = server.client().await;
        let file = upload(&mut client, input(200)).await;
        let batch_id = create(&mut client, &file, "").await;
        let request = WatchBatchRequest { batch_id, after_revision: 0, min_interval: None };
        let watching = client.watch_batch(request).await.unwrap();
        drop(tokio::spawn(async move {
            let mut watching = watching.into_inner();
            while let Ok(Some(_)) = watching.message().await {}
        }));
    }
    let status = server.ended().await;
    let log = server.log();
    assert_eq!(status.code(), Some(1), "{log}");
    let last = log.lines().rfind(|line| line.starts_with("error:")).unwrap_or_else(|| panic!("{log}"));
    assert!(last.contains("of the server has died") && last.contains(part.name()), "{last}");
}
