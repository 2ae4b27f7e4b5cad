//! Notifications of changes between nodes: a commit on PostgreSQL notifies, and every other node's store passes it on
//! to the listeners of [`Store::changes`]. Notifications may get lost with a connection, so a caller that must know
//! polls the database too.

use std::{panic::AssertUnwindSafe, time::Duration};

use futures::FutureExt;
use sea_orm::{ConnectionTrait, DatabaseBackend, Statement};
use sqlx::{
    Executor,
    postgres::{PgListener, PgPoolOptions},
};
use tokio::{
    sync::{broadcast, watch},
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

use super::{DatabaseTransaction, Store, StoreError, bounded::ANSWER, reach};
use crate::{
    domain::BatchId,
    fault,
    supervise::{Part, message},
};

/// The PostgreSQL channel.
const CHANNEL: &str = "tidemill";
/// After this long without a notification the connection is tested, because silence may mean that nothing arrives.
const QUIET: Duration = Duration::from_secs(10);
/// Wait between two attempts to listen to a database that is unreachable.
const AGAIN: Duration = Duration::from_secs(1);

impl Store {
    /// Lets the commit of this transaction notify the other nodes that it has changed a batch.
    pub(super) async fn notify_with(&self, tx: &DatabaseTransaction, batch: &BatchId) -> Result<(), StoreError> {
        if !self.is_sqlite() {
            // Sent with the commit, or never.
            let word = format!("{batch} {}", self.inner.origin);
            let notify = "SELECT pg_notify($1, $2)";
            let values = [CHANNEL.into(), word.into()];
            tx.execute_raw(Statement::from_sql_and_values(DatabaseBackend::Postgres, notify, values)).await?;
        }
        Ok(())
    }

    /// Waits until the listener for other nodes' commits has panicked, and returns its message. On SQLite there is no
    /// listener.
    ///
    /// # Errors
    /// What the panic said; it never ends otherwise.
    pub async fn listener_died(&self) -> Result<(), String> {
        let mut died = self.inner.listener_died.subscribe();
        match died.wait_for(Option::is_some).await.map(|died| died.clone()) {
            Ok(Some(why)) => Err(format!("it panicked: {why}")),
            // The sender is this store's own.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }
}

/// Passes on the commits of stores other than `origin`, until dropped. Uses a connection of its own, which is always in
/// use. A panic is passed to `died`.
pub(super) fn listen(
    url: &str,
    origin: String,
    changes: broadcast::Sender<BatchId>,
    died: watch::Sender<Option<String>>,
) -> AbortOnDropHandle<()> {
    let url = url.to_owned();
    let listening = async move {
        // It ends with a panic only.
        loop {
            fault::panic_in(Part::Listener);
            let Err(error) = pass_on(&url, &origin, &changes).await;
            tracing::warn!(%error, "no notifications of other nodes' changes arrive; until they do, the database is polled");
            tokio::time::sleep(AGAIN).await;
        }
    };
    AbortOnDropHandle::new(tokio::spawn(async move {
        let caught: Result<std::convert::Infallible, _> = AssertUnwindSafe(listening).catch_unwind().await;
        let Err(panic) = caught;
        died.send_replace(Some(message(&*panic).to_owned()));
    }))
}

async fn pass_on(
    url: &str,
    origin: &str,
    changes: &broadcast::Sender<BatchId>,
) -> Result<std::convert::Infallible, sqlx::Error> {
    let pool = PgPoolOptions::new().max_connections(1).max_lifetime(None).idle_timeout(None);
    let pool = pool.connect_with(reach::options(url)?).await?;
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.listen(CHANNEL).await?;
    loop {
        let Ok(heard) = timeout(QUIET, listener.try_recv()).await else {
            timeout(ANSWER, listener.execute("SELECT 1")).await.map_err(std::io::Error::from)??;
            continue;
        };
        // `None`: the connection was lost and has been restored.
        let Some(notification) = heard? else { continue };
        // Another version may use another format; polling then finds the change.
        let Some((batch, from)) = notification.payload().split_once(' ') else { continue };
        if from != origin {
            // There may be no listener.
            let _ = changes.send(BatchId::from_text(batch));
        }
    }
}
