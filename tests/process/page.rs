//! The page of metrics of a server that has worked.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use axum::http::StatusCode;
use tidemill::{
    pb::{
        CreateBatchRequest, RegisterWorkerRequest, RemoveWorkerRequest, WebhookConfig, create_batch_request::Input,
        worker_admin_client::WorkerAdminClient,
    },
    sim::{Fault, SimConfig},
};

use crate::{
    input,
    receiver::{Receiver, SECRET},
    server::Server,
    support::patience::until,
    try_upload, upload, watch, worker,
};

async fn page(server: &Server) -> String {
    reqwest::get(format!("http://{}/metrics", server.address())).await.unwrap().text().await.unwrap()
}

/// The families of a page by what is said of them, and those of its samples.
struct Families {
    help: BTreeMap<String, String>,
    kinds: BTreeMap<String, String>,
    sampled: BTreeSet<String>,
}

impl Families {
    fn of(page: &str) -> Self {
        let mut of = Self { help: BTreeMap::new(), kinds: BTreeMap::new(), sampled: BTreeSet::new() };
        for line in page.lines().filter(|line| !line.is_empty()) {
            let described = [("# HELP ", &mut of.help), ("# TYPE ", &mut of.kinds)];
            let mut is_comment = false;
            for (begin, families) in described {
                if let Some(rest) = line.strip_prefix(begin) {
                    let (name, text) = rest.split_once(' ').unwrap_or((rest, ""));
                    assert_eq!(families.insert(name.into(), text.into()), None, "{name} is described twice");
                    is_comment = true;
                }
            }
            if is_comment {
                continue;
            }
            assert!(!line.starts_with('#'), "{line}");
            let name = line.split(['{', ' ']).next().unwrap();
            let value = line.rsplit_once(' ').unwrap().1;
            assert!(value.parse::<f64>().is_ok(), "{line}");
            // A histogram's samples are named after their part.
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .filter_map(|part| name.strip_suffix(part))
                .find(|family| of.kinds.get(*family).is_some_and(|kind| kind == "histogram"));
            of.sampled.insert(family.unwrap_or(name).to_owned());
        }
        of
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_family_of_a_server_that_has_worked_is_described_and_a_removed_worker_is_gone() {
    let (_, first) = worker(SimConfig { latency: Duration::from_millis(5), ..SimConfig::default() }).await;
    let (failing, second) = worker(SimConfig::default()).await;
    failing.faults().always(Some(Fault::Fail { status: StatusCode::SERVICE_UNAVAILABLE, retry_after: None }));
    let receiver = Receiver::start(200).await;
    let flags = ["--worker", &first, "--webhook-allow-cidr", "127.0.0.0/8", "--webhook-secret", SECRET];
    let server = Server::start(&flags).await;
    let mut client = server.client().await;
    let mut workers = WorkerAdminClient::connect(format!("http://{}", server.address())).await.unwrap();
    let added = workers
        .register_worker(RegisterWorkerRequest { url: second.clone(), ..Default::default() })
        .await
        .unwrap()
        .into_inner();
    let file = upload(&mut client, input(300)).await;
    try_upload(&mut client, "no request\n".to_owned(), "").await.unwrap_err();
    let webhook = WebhookConfig { url: receiver.url.clone(), ..WebhookConfig::default() };
    let request = CreateBatchRequest {
        input: Some(Input::InputFileId(file)),
        webhook: Some(webhook),
        ..CreateBatchRequest::default()
    };
    let batch = client.create_batch(request).await.unwrap().into_inner().id;
    watch(server.clone(), batch).await;
    receiver.wait(1).await;

    let named = |page: &str, url: &str| page.lines().filter(|line| line.contains(&format!("\"{url}"))).count();
    let mut before = String::new();
    until("both workers have their series", async || {
        before = page(&server).await;
        // The second one's outage is counted by its name.
        let outage = before.contains(&format!("tidemill_worker_outages_total{{worker=\"{second}"));
        named(&before, &first) > 5 && named(&before, &second) > 5 && outage
    })
    .await;
    let families = Families::of(&before);
    for name in &families.sampled {
        assert!(families.help.get(name).is_some_and(|help| help.len() > 10), "{name} has no HELP");
        assert!(families.kinds.contains_key(name), "{name} has no TYPE");
    }
    for area in ["tidemill_worker_", "tidemill_webhook_", "tidemill_requests_", "tidemill_grpc_", "tidemill_http_"] {
        assert!(families.sampled.iter().any(|name| name.starts_with(area)), "{area}…: {:?}", families.sampled);
    }
    assert!(families.sampled.len() > 20, "{:?}", families.sampled);

    workers.remove_worker(RemoveWorkerRequest { worker_id: added.id }).await.unwrap();
    until("the removed worker's series go", async || named(&page(&server).await, &second) == 0).await;
    // Nothing brings them back.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let after = page(&server).await;
    assert_eq!(named(&after, &second), 0, "{after}");
    assert!(named(&after, &first) > 5, "{after}");
    Families::of(&after);
}
