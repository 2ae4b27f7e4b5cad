//! Name servers that say nothing.

use std::{net::UdpSocket, time::Duration};

use tidemill::{
    delivery::{
        Options, Webhooks,
        egress::{Guard, Names, Policy},
    },
    domain::webhook::{ErrorKind, WebhookConfig},
};

use crate::fixture::{Db, eventually};

/// Many calls wait for it, and there is one thread for what blocks: whatever else needs that thread has it at once.
#[test]
fn a_silent_name_server_holds_up_nothing_else() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let names = Names::of(vec![silent.local_addr().unwrap()], Duration::from_secs(2));
        let db = Db::sqlite().await;
        let options = Options { guard: Guard::with_names(Policy::default(), names), ..db.options() };
        let webhooks = Webhooks::new(db.store.clone(), options).unwrap();
        let accept = |n: u32| {
            let webhooks = webhooks.clone();
            async move { webhooks.accept(WebhookConfig::new(format!("https://host-{n}.test/"))).await }
        };
        let mut calls: Vec<_> = (0..60).map(|n| Box::pin(accept(n))).collect();
        for call in &mut calls {
            assert!(futures::poll!(call).is_pending(), "it waits for the name server");
        }
        let file = db.folder.as_ref().unwrap().path().join("file");
        let mut calls = futures::future::join_all(calls);
        tokio::select! {
            biased;
            written = tokio::fs::write(&file, b"an upload") => written.unwrap(),
            _ = &mut calls => panic!("what blocks has waited for the name server"),
        }
        // A name that nobody knows is accepted: it is looked up when it is sent to.
        let accepted = calls.await;
        assert!(accepted.iter().all(Result::is_ok));
        // Then it costs its attempts.
        let webhook = accepted.into_iter().next().unwrap().unwrap();
        let batch = db.batch(Some(tidemill::domain::webhook::WebhookTarget { max_attempts: 1, ..webhook }), None).await;
        db.complete(&batch.id).await;
        let running = crate::fixture::Running::start(webhooks.clone());
        let dead = eventually("a dead letter", || async { db.dead_letters().await.pop() }).await;
        assert_eq!(dead.error_kind, ErrorKind::Dns, "{dead:?}");
        assert!(dead.error_message.contains("did not answer"), "{}", dead.error_message);
        running.stop().await;
    });
}
