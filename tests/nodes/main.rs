//! Several real nodes on one PostgreSQL and one directory of objects, and everything that can happen to them: SIGKILL,
//! SIGSTOP past their lease, a database that crashes. Longer, or otherwise: `TIDEMILL_CHAOS_SECONDS`, `TIDEMILL_CHAOS_SEED`.

#![allow(clippy::unwrap_used, missing_docs)]

mod calls;
mod chaos;
mod cluster;
mod database;
mod faults;
mod history;
#[path = "../support/mod.rs"]
mod support;

use std::sync::OnceLock;

use tokio::sync::{Mutex, MutexGuard};

/// One test at a time: they stop the database that they share, and count on seconds being seconds.
pub async fn turn() -> MutexGuard<'static, ()> {
    static TURN: OnceLock<Mutex<()>> = OnceLock::new();
    TURN.get_or_init(Mutex::default).lock().await
}
