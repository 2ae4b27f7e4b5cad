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

use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

fn turn() -> &'static RwLock<()> {
    static TURN: OnceLock<RwLock<()>> = OnceLock::new();
    TURN.get_or_init(RwLock::default)
}

/// With others: the test leaves the database that they share alone, and has time.
pub async fn together() -> RwLockReadGuard<'static, ()> {
    turn().read().await
}

/// By itself: the test stops the database, or counts on moments being moments.
pub async fn alone() -> RwLockWriteGuard<'static, ()> {
    turn().write().await
}
