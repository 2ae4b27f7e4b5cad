//! Checks that the blob store exists, can be used, and belongs to the database, at the start and while the server runs.

use std::time::Duration;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    blobs::{BlobError, Blobs},
    domain::NodeId,
    fault,
    store::{Store, StoreError},
    supervise::Part,
};

/// Time limit of the blob store's answer at the start.
const PROBE: Duration = Duration::from_secs(12);
/// Time limit of writing the store's id: below the time for which PostgreSQL tolerates an idle transaction.
const GIVE: Duration = Duration::from_secs(4);
/// Time between two checks of its id.
const LOOK: Duration = Duration::from_secs(5);
/// Objects to look for in a store without an id; one that exists is enough.
const SOME: u64 = 10;

/// Why the objects can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ObjectsError {
    /// The store does not answer.
    #[error(
        "the blob store {0} did not answer within {1} s: check that --blobs is right and that this server can reach it"
    )]
    Silent(String, u64),
    /// The store can't be written or read.
    #[error(
        "the blob store {place} can't be used: {words}: check that --blobs is right and that this server may write there ({error})"
    )]
    Unusable {
        /// The store.
        place: String,
        /// A short reason.
        words: String,
        /// The error of the store's client.
        error: Box<BlobError>,
    },
    /// The database names objects that are not in this store.
    #[error(
        "the blob store {0} does not belong to this database: {1}. All servers of a database need the same objects: give \
         --blobs as the others have it (s3://…, gs://…, az://… or file:///a/shared/path), and see that the volume is mounted"
    )]
    Foreign(String, String),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Tests the blob store before anything else is changed. Returns its id, if it has one.
///
/// # Errors
/// [`ObjectsError`].
pub async fn probe(blobs: &Blobs, place: &str) -> Result<Option<String>, ObjectsError> {
    match timeout(PROBE, blobs.probe()).await {
        Ok(Ok(id)) => Ok(id),
        Ok(Err(error)) => Err(unusable(error, place)),
        Err(_) => Err(ObjectsError::Silent(place.to_owned(), PROBE.as_secs())),
    }
}

/// Makes sure that the store, whose id is `found`, belongs to the database. A new database is tied to the store of its
/// first server; so is one of a release without ids, if the objects that it names exist. A database that names no file
/// and has no other node accepts another store, because nothing can be missing from it.
///
/// # Errors
/// [`ObjectsError`].
pub async fn establish(
    store: &Store,
    blobs: &Blobs,
    place: &str,
    node: &NodeId,
    found: Option<String>,
) -> Result<(), ObjectsError> {
    let id = match store.settled_blob_store_id().await? {
        Some(id) if found.as_ref() == Some(&id) || !store.is_unused_but_by(node).await? => id,
        _ => {
            let objects = store.some_objects(SOME).await?;
            if !objects.is_empty() && !one_is_there(blobs, &objects, place).await? {
                let why = format!("it lacks {}, which the database names", objects[0]);
                return Err(ObjectsError::Foreign(place.to_owned(), why));
            }
            // An id that exists was written by a server that died before it could record it in the database.
            let id = found.clone().unwrap_or_else(|| format!("store_{}", Uuid::now_v7().simple()));
            let give = || async {
                if found.is_some() {
                    return Ok(());
                }
                match timeout(GIVE, blobs.give_id(&id)).await {
                    Ok(given) => given.map_err(|error| unusable(error, place)),
                    Err(_) => Err(ObjectsError::Silent(place.to_owned(), GIVE.as_secs())),
                }
            };
            store.settle_blob_store_id(&id, node, give).await?
        }
    };
    match blobs.expect_id(id).await {
        Ok(()) => Ok(()),
        Err(BlobError::Foreign(why)) => Err(ObjectsError::Foreign(place.to_owned(), why)),
        Err(error) => Err(unusable(error, place)),
    }
}

async fn one_is_there(blobs: &Blobs, objects: &[String], place: &str) -> Result<bool, ObjectsError> {
    for key in objects {
        match blobs.get_range(key, 0..1).await {
            Ok(_) => return Ok(true),
            Err(BlobError::Missing(_)) => {}
            Err(error) => return Err(unusable(error, place)),
        }
    }
    Ok(false)
}

fn unusable(error: BlobError, place: &str) -> ObjectsError {
    let words = error.in_words().unwrap_or_else(|| "it failed".to_owned());
    ObjectsError::Unusable { place: place.to_owned(), words, error: Box::new(error) }
}

/// Checks regularly, until the shutdown, that the store is still the database's. While it is not, this server claims
/// nothing, reports that it is not ready, and keeps its work waiting.
///
/// # Errors
/// If the database was given other objects meanwhile: nothing had been stored, and this server was away for so long that
/// another one took the database for unused. This one is to start anew.
pub async fn watch(store: Store, blobs: Blobs, shutdown: CancellationToken) -> Result<(), String> {
    let mut was_foreign = false;
    loop {
        fault::panic_in(Part::StoreCheck);
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = tokio::time::sleep(LOOK) => {}
        }
        let looked = async { (store.blob_store_id().await, blobs.verify().await) };
        let (of_database, looked) = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            looked = looked => looked,
        };
        // No answer from the database says nothing.
        if let (Ok(Some(id)), Some(ours)) = (of_database, blobs.expected_id())
            && id != ours
        {
            return Err(format!("the database was given another blob store, {id}, and this server has {ours}"));
        }
        match looked {
            Ok(()) if was_foreign => {
                was_foreign = false;
                tracing::info!("the blob store belongs to this database again");
            }
            Err(error @ BlobError::Foreign(_)) if !was_foreign => {
                was_foreign = true;
                tracing::error!(%error, "this server claims no work until its objects are back");
            }
            Err(error) if !was_foreign => {
                tracing::debug!(%error, "can't check whether the blob store is the right one");
            }
            Ok(()) | Err(_) => {}
        }
    }
}
