//! A batch's state, its event and its webhook are there together or not at all, wherever the call that writes them is given up.

use std::{future::Future, task::Poll, time::Duration};

use tidemill::{
    domain::{BatchStatus, NodeId},
    store::FinalObject,
};

use crate::fixture::{Db, target};

crate::on_both!(an_end_given_up_half_way_is_whole_or_nothing);

async fn an_end_given_up_half_way_is_whole_or_nothing(db: Db) {
    let (mut whole, mut nothing) = (0, 0);
    // Given up after ever more of the steps in which it goes on, until it has ended by itself a few times.
    for steps in 0..400 {
        if whole > 3 {
            break;
        }
        let batch = db.batch(Some(target("http://127.0.0.1:1/".into())), None).await;
        let node = NodeId::generate();
        let lease = Duration::from_secs(600);
        let claimed = db.store.claim_segment(&node, &batch.id, -1, lease).await.unwrap().unwrap();
        let object = FinalObject {
            object_key: format!("results/{}", batch.id),
            output_bytes: 1,
            error_bytes: 0,
            output_lines: 100,
            error_lines: 0,
            crc32c: 0,
        };
        let end = async || db.store.finish_segment(&claimed.segment, claimed.epoch, None, &object, &[]).await;
        let (mut first, mut left) = (Box::pin(end()), steps);
        let given_up = std::future::poll_fn(|cx| match left {
            0 => Poll::Ready(()),
            _ => {
                left -= 1;
                first.as_mut().poll(cx).map(|_| ())
            }
        });
        // Where it is not woken any more its step was the last, and it is given up as well.
        let _ = tokio::time::timeout(Duration::from_secs(10), given_up).await;
        drop(first);
        // Also waits until the transaction that was given up is rolled back: SQLite has one writer.
        let barrier = db.batch(None, None).await;
        assert_eq!(barrier.status, BatchStatus::InProgress);
        let (now, events) = db.store.history(&batch.id).await.unwrap().unwrap();
        let done = now.status == BatchStatus::Completed;
        assert_eq!(events.last().unwrap().batch.status, now.status, "an event for each state");
        assert_eq!(events.len(), if done { 4 } else { 2 });
        assert_eq!(db.deliveries(&batch.id).await.len(), usize::from(done), "{:?} and its webhook", now.status);
        assert_eq!(now.output_file_id.is_some(), done);
        if done {
            whole += 1;
        } else {
            nothing += 1;
        }
        end().await.unwrap();
        assert_eq!(db.deliveries(&batch.id).await.len(), 1);
    }
    assert!(whole > 1 && nothing > 1, "{whole} {nothing}");
}
