//! What a batch does when the blob store fails: it stops, says why, and goes on; nothing is lost and nothing runs twice.

use std::{io::ErrorKind, process::Command, time::Duration};

use tidemill::{blobs::Blobs, domain::BatchStatus, domain::Scope, sim::SimConfig};

use crate::{
    faulty::{Faults, FaultyStore},
    harness::{Node, Worker, assert_one_line_each, chats, options},
};

async fn pauses_and_goes_on(break_it: fn(&Faults, Option<ErrorKind>), kind: ErrorKind, says: &str, lines: usize) {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(20), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let faults = Faults::default();
    let blobs = Blobs::over(FaultyStore::new(&folder.path().join("blobs"), faults.clone()));
    let node = Node::start_on(folder.path(), blobs, &[&worker], options(), 8).await;
    let lines = chats(lines);
    let id = node.submit(&lines, 60).await;
    node.when(&id, |batch| batch.counts.completed > 0).await;
    break_it(&faults, Some(kind));
    let reason = node.waits(&id, |reason| reason.is_some_and(|reason| reason.contains("blob store"))).await.unwrap();
    assert!(reason.starts_with("the blob store has failed") && reason.contains(says), "{reason}");
    assert!(!reason.contains("secret"), "{reason}");
    // What was written before counts; nothing more does while it lasts.
    let stuck = node.store.batch(&id, &Scope::All).await.unwrap().unwrap();
    assert_eq!(stuck.status, BatchStatus::InProgress);
    break_it(&faults, None);
    node.waits(&id, |reason| reason.is_none()).await;
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Completed);
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty(), "{:?}", errors.first());
    assert_eq!(worker.sim.faults().received(), lines.len() as u64, "no request ran twice for it");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_pauses_the_batch_with_its_reason() {
    pauses_and_goes_on(Faults::writes, ErrorKind::StorageFull, "no space is left on the disk", 300).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_permission_pauses_the_batch_with_its_reason() {
    pauses_and_goes_on(Faults::writes, ErrorKind::PermissionDenied, "permission denied", 300).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_can_not_be_read_pauses_the_batch_with_its_reason() {
    pauses_and_goes_on(Faults::reads, ErrorKind::TimedOut, "timed out", 300).await;
}

/// A file system of its own of 2 MiB; None where this test may not mount one.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(folder.path()).output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Self(folder))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).output();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_really_full_disk_pauses_the_batch_until_there_is_room() {
    let Some(disk) = SmallDisk::mount() else {
        eprintln!("skipped: this user may not mount a file system");
        return;
    };
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(20), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let blobs = Blobs::directory(&disk.0.path().join("blobs")).unwrap();
    let node = Node::start_on(folder.path(), blobs, &[&worker], options(), 8).await;
    let lines = chats(400);
    let id = node.submit(&lines, 100).await;
    node.when(&id, |batch| batch.counts.completed > 0).await;
    let ballast = disk.0.path().join("ballast");
    // To the last block: what is written is as much as fits, then an error.
    let _ = std::fs::write(&ballast, vec![7; 4 << 20]);
    let reason = node.waits(&id, |reason| reason.is_some_and(|reason| reason.contains("blob store"))).await.unwrap();
    assert!(reason.contains("no space is left on the disk"), "{reason}");
    std::fs::remove_file(&ballast).unwrap();
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty(), "{:?}", errors.first());
    let staged = Command::new("find").arg(disk.0.path()).args(["-name", "*#*"]).output().unwrap();
    assert!(staged.stdout.is_empty(), "no half-written file is left: {}", String::from_utf8_lossy(&staged.stdout));
    node.stop().await;
}
