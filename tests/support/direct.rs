//! A connection past the store, for what a store has no business to offer.

use std::time::Duration;

use sea_orm::{ConnectOptions, Database, DatabaseConnection};

/// Connects to a database.
///
/// Its pool closes no connection by itself: the task of sqlx 0.9.0 that does so may loop for ever, and the test with it
/// (`tidemill::store` says why).
pub async fn connect(url: impl Into<String>) -> DatabaseConnection {
    let mut options = ConnectOptions::new(url.into());
    options.idle_timeout(None::<Duration>).max_lifetime(None::<Duration>);
    Database::connect(options).await.expect("the database is there")
}
