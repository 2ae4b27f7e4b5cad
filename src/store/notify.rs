//! Word of changes between nodes: a commit on PostgreSQL notifies, and every other node's store passes it on to the
//! listeners of [`Store::changes`]. Word may get lost with a connection; who must know asks the database now and then.

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

/// PostgreSQL's name for it.
const CHANNEL: &str = "tidemill";
/// After so long without word the connection is tried: it may be that nothing changes, or that nothing comes through.
const QUIET: Duration = Duration::from_secs(10);
/// Between two tries to listen to a database that is away.
const AGAIN: Duration = Duration::from_secs(1);

impl Store {
    /// Commits a transaction that has changed a batch, and tells this node's listeners and the other nodes.
    pub(super) async fn commit(&self, tx: DatabaseTransaction, batch: &BatchId) -> Result<(), StoreError> {
        if !self.is_sqlite() {
            // Sent with the commit, or never.
            let word = format!("{batch} {}", self.inner.origin);
            let notify = "SELECT pg_notify($1, $2)";
            let values = [CHANNEL.into(), word.into()];
            tx.execute_raw(Statement::from_sql_and_values(DatabaseBackend::Postgres, notify, values)).await?;
        }
        tx.commit().await?;
        self.changed(batch);
        Ok(())
    }

    /// Waits until what hears of other nodes' commits has panicked, and says why. On SQLite there is nothing to hear.
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

/// Passes on what other stores than `origin` commit, until dropped. On a connection of its own: it is always in use.
/// A panic is passed to `died`.
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
            tracing::warn!(%error, "no word of other nodes' changes; they are found by asking until it comes again");
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
        // None: the connection was lost, and is there again.
        let Some(notification) = heard? else { continue };
        // Another version may say it otherwise: then it is found by asking.
        let Some((batch, from)) = notification.payload().split_once(' ') else { continue };
        if from != origin {
            // No listener is fine.
            let _ = changes.send(BatchId::from_text(batch));
        }
    }
}
