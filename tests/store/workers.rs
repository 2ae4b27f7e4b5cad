//! Workers and nodes.

use std::time::Duration;

use tidemill::{
    domain::{HealthChange, HealthInterval, NodeId, OwnHealth, WorkerId},
    store::RemovedWorker,
};

use crate::fixture::Db;

async fn workers_are_added_drained_and_removed(db: Db) {
    let store = &db.store;
    let one = store.register_worker("http://a:8000").await.unwrap();
    let two = store.register_worker("http://b:8000").await.unwrap();
    assert_eq!(store.register_worker("http://a:8000").await.unwrap(), one, "the same URL is the same worker");
    assert!(store.drain_worker(&one.id).await.unwrap().unwrap().draining);
    assert!(store.workers().await.unwrap()[0].draining);
    assert!(!store.register_worker("http://a:8000").await.unwrap().draining, "wanted again");
    assert_eq!(store.workers().await.unwrap(), [one.clone(), two.clone()]);
    assert_eq!(store.remove_worker(&one.id).await.unwrap(), RemovedWorker::Removed);
    assert_eq!(store.remove_worker(&one.id).await.unwrap(), RemovedWorker::NotFound);
    assert!(store.drain_worker(&WorkerId::generate()).await.unwrap().is_none());
    assert_eq!(store.workers().await.unwrap(), [two]);
}

async fn a_worker_keeps_its_own_health_settings(db: Db) {
    let store = &db.store;
    let url = "http://a:8000";
    assert_eq!(store.register_worker(url).await.unwrap().health, OwnHealth::default());
    let (path, interval) = (Some("/ok".parse().unwrap()), HealthInterval::new(Duration::from_millis(2_500)));
    let change = HealthChange { path: Some(path.clone()), interval: Some(interval) };
    let own = OwnHealth { path, interval };
    assert_eq!(store.register_worker_with(url, &change).await.unwrap().health, own);
    // Whoever doesn't name them leaves them: to end draining, at a restart with the worker in the configuration, by a
    // server of the release before.
    assert_eq!(store.register_worker(url).await.unwrap().health, own);
    store.configure_workers(&[url.to_owned()]).await.unwrap();
    let id = store.workers().await.unwrap().remove(0).id;
    assert_eq!(store.drain_worker(&id).await.unwrap().unwrap().health, own);
    assert_eq!(store.workers().await.unwrap()[0].health, own);
    let none = HealthChange { path: Some(Some("none".parse().unwrap())), interval: None };
    let health = store.register_worker_with(url, &none).await.unwrap().health;
    assert_eq!((health.path.unwrap().path(), health.interval), (None, interval));
    let back = HealthChange { path: Some(None), interval: Some(None) };
    assert_eq!(store.register_worker_with(url, &back).await.unwrap().health, OwnHealth::default());
    // What a later version may write.
    db.execute("UPDATE workers SET health_path = 'later:x', health_interval = -1").await;
    assert_eq!(store.workers().await.unwrap()[0].health, OwnHealth::default());
    let new = store.register_worker_with("http://b:8000", &change).await.unwrap();
    assert_eq!(new.health, own, "one that is new");
}

async fn the_configuration_names_workers(db: Db) {
    let store = &db.store;
    let by_hand = store.register_worker("http://hand:8000").await.unwrap();
    let urls = |names: &[&str]| names.iter().map(|name| format!("http://{name}:8000")).collect::<Vec<_>>();
    store.configure_workers(&urls(&["a", "b"])).await.unwrap();
    let all = store.workers().await.unwrap();
    // SQLite has one node and so one configuration, which also forgets; with PostgreSQL other nodes may name others.
    let one_node = db.is_sqlite();
    assert_eq!(all.iter().map(|worker| worker.from_config).collect::<Vec<_>>(), [false, one_node, one_node]);
    let removed = if one_node { RemovedWorker::FromConfig } else { RemovedWorker::Removed };
    assert_eq!(store.remove_worker(&all[1].id).await.unwrap(), removed);
    store.drain_worker(&all[2].id).await.unwrap();
    store.configure_workers(&urls(&["b"])).await.unwrap();
    let left = store.workers().await.unwrap();
    assert_eq!(left.iter().map(|worker| &worker.url).collect::<Vec<_>>(), [&by_hand.url, &all[2].url]);
    assert_eq!(left[1].id, all[2].id);
    assert!(left[1].draining, "a restart does not undo a drain");
    store.configure_workers(&[]).await.unwrap();
    assert_eq!(store.workers().await.unwrap().len(), if one_node { 1 } else { 2 });
}

async fn nodes_come_live_and_go(db: Db) {
    let node = NodeId::generate();
    db.store.heartbeat(&node, "1.0.0", "api,scheduler").await.unwrap();
    let seen = async || db.number("SELECT heartbeat_at FROM nodes").await;
    let first = seen().await;
    db.store.heartbeat(&node, "1.0.0", "api,scheduler").await.unwrap();
    assert!(seen().await > first);
    let others = NodeId::generate();
    db.store.heartbeat(&others, "1.1.0", "delivery").await.unwrap();
    let found = db.store.nodes().await.unwrap();
    let shown: Vec<_> = found.iter().map(|one| (&one.id, one.version.as_str(), one.roles.as_str())).collect();
    assert_eq!(shown, [(&node, "1.0.0", "api,scheduler"), (&others, "1.1.0", "delivery")]);
    assert!(found[0].started_at.0 == first && found[0].heartbeat_at.0 > first);

    // Silent for just less than ten minutes, and for longer.
    let silent = async |seconds: i64| {
        let at = db.store.nodes().await.unwrap().iter().map(|one| one.heartbeat_at.0).max().unwrap();
        let (before, others) = (at - seconds * 1_000_000, others.as_str());
        db.execute(&format!("UPDATE nodes SET heartbeat_at = {before} WHERE id = '{others}'")).await;
        db.store.heartbeat(&node, "1.0.0", "api,scheduler").await.unwrap();
        db.store.forget_dead_nodes().await.unwrap();
        db.store.nodes().await.unwrap().len()
    };
    assert_eq!((silent(590).await, silent(601).await), (2, 1));
    // It was only frozen: its next sign of life makes it known again.
    db.store.heartbeat(&others, "1.1.0", "delivery").await.unwrap();
    assert_eq!(db.store.nodes().await.unwrap().len(), 2);
    db.store.leave(&others).await.unwrap();
    db.store.leave(&node).await.unwrap();
    assert_eq!(db.number("SELECT COUNT(*) FROM nodes").await, 0);
}

on_both_databases!(
    workers_are_added_drained_and_removed,
    a_worker_keeps_its_own_health_settings,
    the_configuration_names_workers,
    nodes_come_live_and_go,
);
