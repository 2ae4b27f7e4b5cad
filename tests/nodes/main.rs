//! Several real nodes on one PostgreSQL and one directory of objects, and everything that can happen to them: SIGKILL,
//! SIGSTOP past their lease, a database that crashes, hangs or is cut off, workers that die, webhook receivers that fail.
//!
//! `chaos` is all of it by chance: longer, or otherwise, with `TIDEMILL_CHAOS_SECONDS` and `TIDEMILL_CHAOS_SEED`. `soak` is
//! much work and many kills: `TIDEMILL_SOAK_REQUESTS`, `TIDEMILL_SOAK_SECONDS`, `TIDEMILL_SOAK_KILL_EVERY`. `TIDEMILL_BIN`
//! names another build of the program than cargo's for the tests.

#![allow(clippy::unwrap_used, missing_docs)]

mod anywhere;
mod calls;
mod chaos;
mod cluster;
mod database;
mod faults;
mod history;
mod hooks;
mod partitions;
mod proxy;
#[allow(dead_code)] // other tests use more of it
#[path = "../webhooks/receiver.rs"]
mod receiver;
mod soak;
#[path = "../support/mod.rs"]
mod support;

use std::{fmt::Display, str::FromStr, sync::OnceLock};

use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A number that the environment may set.
pub fn setting<T: FromStr<Err: Display>>(name: &str, default: T) -> T {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")),
        Err(_) => default,
    }
}

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
