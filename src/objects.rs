//! Whether the blob store is there, can be used, and is the one of the database: at the start and from then on.

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

/// How long the blob store may take to answer at the start.
const PROBE: Duration = Duration::from_secs(12);
/// How long it may take to give it its id: below the time for which PostgreSQL bears with a silent transaction.
const GIVE: Duration = Duration::from_secs(4);
/// Between two looks at its id.
const LOOK: Duration = Duration::from_secs(5);
/// Objects that are looked for in a store without an id. One that is there is enough.
const SOME: u64 = 10;

/// Why the objects can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ObjectsError {
    /// The store does not answer.
    #[error("the blob store {0} does not answer within {1} s: is --blobs right, and can it be reached?")]
    Silent(String, u64),
    /// The store can't be written or read.
    #[error(
        "the blob store {place} can't be used: {words}: is --blobs right, and may this server write there? ({error})"
    )]
    Unusable {
        /// Which.
        place: String,
        /// Why, in short.
        words: String,
        /// As the store's client says it.
        error: Box<BlobError>,
    },
    /// The database names objects that are elsewhere.
    #[error(
        "the blob store {0} is not the one of the database: {1}. All servers of a database need the same objects: give \
         --blobs as the others have it (s3://…, gs://…, az://… or file:///a/shared/path), and see that the volume is mounted"
    )]
    Foreign(String, String),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Tries the blob store out, before anything else is touched. Returns its id, if it has one.
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

/// Makes sure that the store, whose id is `found`, is the one of the database. A new database gets the store that its
/// first server names; so does one of a release that knew no ids, if the objects that it names are there. A database
/// that names no file and has no other node takes another store: nothing can be missing from it.
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
                let why = format!("{} that it names is not there", objects[0]);
                return Err(ObjectsError::Foreign(place.to_owned(), why));
            }
            // One that is there was given by a server that died before it could write it down.
            let id = found.clone().unwrap_or_else(|| format!("store_{}", Uuid::now_v7().simple()));
            let give = async {
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

/// Looks now and then whether the store is still the one of the database, until the shutdown. As long as it is not,
/// this server claims nothing, says that it is not ready, and waits with what it has.
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
        // A database that does not answer says nothing.
        if let (Ok(Some(id)), Some(ours)) = (of_database, blobs.expected_id())
            && id != ours
        {
            return Err(format!("the database was given another blob store, {id}, and this server has {ours}"));
        }
        match looked {
            Ok(()) if was_foreign => {
                was_foreign = false;
                tracing::info!("the blob store is the one of the database again");
            }
            Err(error @ BlobError::Foreign(_)) if !was_foreign => {
                was_foreign = true;
                tracing::error!(%error, "this server claims nothing until its objects are back");
            }
            Err(error) if !was_foreign => {
                tracing::debug!(%error, "whether the blob store is the right one can't be seen");
            }
            Ok(()) | Err(_) => {}
        }
    }
}
