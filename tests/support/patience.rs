//! How long tests wait for what must come. A bound in real time says nothing of the program on a machine that does other
//! things too: it only keeps a test that has failed from hanging.

use std::{fmt::Display, future::Future, time::Duration};

/// Longer than anything takes on a busy machine with two slow cores.
pub const HANG: Duration = Duration::from_secs(300);
/// Between two looks at something that sends no event.
const LOOK: Duration = Duration::from_millis(10);

/// The outcome of what must end.
pub async fn ends<T>(what: impl Display, wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(HANG, wait).await.unwrap_or_else(|_| panic!("not within {HANG:?}: {what}"))
}

/// The outcome of much work, which may take any time as long as it makes progress: `done` says how far it is.
pub async fn goes_on<T>(what: impl Display, done: impl Fn() -> usize, work: impl Future<Output = T>) -> T {
    let (mut work, mut before) = (std::pin::pin!(work), done());
    loop {
        if let Ok(outcome) = tokio::time::timeout(HANG, &mut work).await {
            return outcome;
        }
        let now = done();
        assert!(now > before, "no progress within {HANG:?} after {now}: {what}");
        before = now;
    }
}

/// Waits until something holds.
pub async fn until(what: impl Display, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(LOOK).await;
        }
    };
    ends(what, wait).await;
}
