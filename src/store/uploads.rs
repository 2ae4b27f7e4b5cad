//! Uploads in parts. However one ends, its parts become garbage in the same transaction.

use std::time::Duration;

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Set};

use super::{
    DatabaseTransaction, Store, StoreError,
    convert::checksum,
    entity::{garbage, upload, upload_part},
    local_now, now,
    scoped::within,
    write::{commit, roll_back},
};
use crate::domain::{
    Completion, FileId, Owner, PartedUpload, Scope, Timestamp, UploadId, UploadPart, UploadPartId, UploadState,
    upload::{LASTS, MOST_PARTS, REMEMBERED},
};

/// What a client announces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewPartedUpload {
    /// The owner.
    pub owner: Owner,
    /// The name of the file that it becomes.
    pub filename: String,
    /// The size of the file.
    pub bytes: i64,
    /// How long the file stays after it is complete. `None`: until it is deleted.
    pub file_expires_after: Option<Duration>,
}

/// The outcome of adding a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InsertedPart {
    /// It belongs to the upload now.
    New,
    /// There is no such upload.
    NotFound,
    /// The upload takes no more parts.
    Ended(Box<PartedUpload>),
    /// The upload has [`MOST_PARTS`] parts.
    TooMany,
    /// Its parts would have too many bytes together.
    TooLarge,
}

/// The outcome of giving an upload up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CancelledUpload {
    /// It is cancelled, or was before.
    Cancelled(Box<PartedUpload>),
    /// There is no such upload.
    NotFound,
    /// It has ended in another way.
    Ended(Box<PartedUpload>),
}

/// What a sweep over uploads has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EndedUploads {
    /// Uploads whose time was up.
    pub expired: u64,
    /// Uploads that ended long ago and are forgotten.
    pub forgotten: u64,
}

impl Store {
    /// Begins an upload in parts.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn begin_parted_upload(&self, new: &NewPartedUpload) -> Result<PartedUpload, StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let row = upload::Model {
                id: UploadId::generate().into_string(),
                owner: new.owner.as_str().to_owned(),
                filename: new.filename.clone(),
                bytes: new.bytes,
                file_expires_after: new
                    .file_expires_after
                    .map(|span| i64::try_from(span.as_micros()).unwrap_or(i64::MAX)),
                status: "pending".to_owned(),
                file_id: None,
                made_of: None,
                parts: 0,
                part_bytes: 0,
                created_at: at.0,
                expires_at: at.plus(LASTS).0,
            };
            upload::Entity::insert(upload::ActiveModel::from(row.clone())).exec_without_returning(&tx).await?;
            commit(tx, PartedUpload::try_from(row)?)
        })
        .await
    }

    /// One upload in parts.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn parted_upload(&self, id: &UploadId, scope: &Scope) -> Result<Option<PartedUpload>, StoreError> {
        let find = within(upload::Entity::find_by_id(id.as_str()), upload::Column::Owner, scope);
        find.one(self.read()).await?.map(PartedUpload::try_from).transpose()
    }

    /// The parts of an upload, in the order in which they came; none after it has ended.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn upload_parts(&self, of: &UploadId) -> Result<Vec<UploadPart>, StoreError> {
        let find = upload_part::Entity::find().filter(upload_part::Column::UploadId.eq(of.as_str()));
        let rows = find.order_by_asc(upload_part::Column::Id).all(self.read()).await?;
        rows.into_iter().map(UploadPart::try_from).collect()
    }

    /// Adds a part whose object is durable, if all parts of the upload then have at most `most` bytes. The object stops
    /// being garbage in the same transaction.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn insert_upload_part(
        &self,
        to: &UploadId,
        part: &UploadPart,
        scope: &Scope,
        most: u64,
    ) -> Result<InsertedPart, StoreError> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        self.write(|tx| async move {
            let Some(row) = locked(&tx, to, scope).await? else { return roll_back(InsertedPart::NotFound) };
            let (parts, bytes) = (row.parts, row.part_bytes);
            let upload = PartedUpload::try_from(row)?;
            if upload.state != UploadState::Pending {
                return roll_back(InsertedPart::Ended(Box::new(upload)));
            }
            if u64::try_from(parts).unwrap_or(u64::MAX) >= MOST_PARTS {
                return roll_back(InsertedPart::TooMany);
            }
            if bytes.saturating_add(part.bytes) > most {
                return roll_back(InsertedPart::TooLarge);
            }
            let row = upload_part::ActiveModel {
                id: Set(part.id.as_str().to_owned()),
                upload_id: Set(to.as_str().to_owned()),
                bytes: Set(part.bytes),
                crc32c: Set(part.crc32c.into()),
                object_key: Set(part.object_key.clone()),
                created_at: Set(part.created_at.0),
            };
            upload_part::Entity::insert(row).exec_without_returning(&tx).await?;
            let counted = upload::ActiveModel {
                id: Set(to.as_str().to_owned()),
                parts: Set(parts + 1),
                part_bytes: Set(bytes + part.bytes),
                ..Default::default()
            };
            upload::Entity::update(counted).exec(&tx).await?;
            garbage::Entity::delete_by_id(part.object_key.clone()).exec(&tx).await?;
            commit(tx, InsertedPart::New)
        })
        .await
    }

    /// Gives an upload up.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn cancel_parted_upload(&self, id: &UploadId, scope: &Scope) -> Result<CancelledUpload, StoreError> {
        self.write(|tx| async move {
            let Some(row) = locked(&tx, id, scope).await? else { return roll_back(CancelledUpload::NotFound) };
            let upload = PartedUpload::try_from(row)?;
            match upload.state {
                UploadState::Pending => {}
                UploadState::Cancelled => return roll_back(CancelledUpload::Cancelled(Box::new(upload))),
                UploadState::Completed { .. } | UploadState::Expired => {
                    return roll_back(CancelledUpload::Ended(Box::new(upload)));
                }
            }
            end(&tx, id, &UploadState::Cancelled).await?;
            commit(tx, CancelledUpload::Cancelled(Box::new(PartedUpload { state: UploadState::Cancelled, ..upload })))
        })
        .await
    }

    /// Ends at most `limit` uploads whose time is up, and forgets at most `limit` that ended long ago.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn end_due_uploads(&self, limit: u64) -> Result<EndedUploads, StoreError> {
        let at = now(self.read()).await?;
        let due = |status: &str, until: i64| {
            upload::Entity::find()
                .select_only()
                .column(upload::Column::Id)
                .filter(upload::Column::Status.eq(status))
                .filter(upload::Column::ExpiresAt.lte(until))
                .limit(limit)
                .into_tuple::<String>()
        };
        let mut ended = EndedUploads::default();
        for id in due("pending", at.0).all(self.read()).await?.into_iter().map(UploadId::from_text) {
            ended.expired += u64::from(self.expire(&id).await?);
        }
        let forgotten = at.0.saturating_sub(i64::try_from(REMEMBERED.as_micros()).unwrap_or(i64::MAX));
        for status in ["completed", "cancelled", "expired"] {
            let old = due(status, forgotten).all(self.read()).await?;
            if old.is_empty() {
                continue;
            }
            ended.forgotten += old.len() as u64;
            let old = &old;
            self.write(|tx| async move {
                let these = upload::Column::Id.is_in(old.iter().cloned());
                upload::Entity::delete_many().filter(these).exec(&tx).await?;
                commit(tx, ())
            })
            .await?;
        }
        Ok(ended)
    }

    async fn expire(&self, id: &UploadId) -> Result<bool, StoreError> {
        self.write(|tx| async move {
            // It may have been completed just in time.
            match locked(&tx, id, &Scope::All).await? {
                Some(row) if row.status == "pending" => {}
                Some(_) | None => return roll_back(false),
            }
            end(&tx, id, &UploadState::Expired).await?;
            commit(tx, true)
        })
        .await
    }
}

/// Makes an owner's upload the file. Whether it was pending: otherwise it is another file, or none. A client that has
/// begun to complete it in time may be late with the end.
pub(super) async fn complete(
    tx: &DatabaseTransaction,
    of: &Completion,
    owner: &Owner,
    file: &FileId,
) -> Result<bool, StoreError> {
    match locked(tx, &of.upload, &Scope::Of(owner.clone())).await? {
        Some(row) if row.status == "pending" => {}
        Some(_) | None => return Ok(false),
    }
    end(tx, &of.upload, &UploadState::Completed { file: file.clone(), parts: of.parts.clone() }).await?;
    Ok(true)
}

async fn locked(tx: &DatabaseTransaction, id: &UploadId, scope: &Scope) -> Result<Option<upload::Model>, StoreError> {
    let find = within(upload::Entity::find_by_id(id.as_str()), upload::Column::Owner, scope);
    Ok(find.lock_exclusive().one(tx).await?)
}

/// Writes an upload's end. Its parts become garbage.
async fn end(tx: &DatabaseTransaction, id: &UploadId, state: &UploadState) -> Result<(), StoreError> {
    let (file, parts) = match state {
        UploadState::Completed { file, parts } => (Some(file.as_str().to_owned()), Some(parts.clone())),
        UploadState::Pending | UploadState::Cancelled | UploadState::Expired => (None, None),
    };
    let ended = upload::ActiveModel {
        id: Set(id.as_str().to_owned()),
        status: Set(state.as_str().to_owned()),
        file_id: Set(file),
        made_of: Set(parts),
        ..Default::default()
    };
    upload::Entity::update(ended).exec(tx).await?;
    let of_this = upload_part::Column::UploadId.eq(id.as_str());
    let keys: Vec<String> = upload_part::Entity::find()
        .select_only()
        .column(upload_part::Column::ObjectKey)
        .filter(of_this.clone())
        .into_tuple()
        .all(tx)
        .await?;
    super::garbage::add(tx, keys, now(tx).await?).await?;
    upload_part::Entity::delete_many().filter(of_this).exec(tx).await?;
    Ok(())
}

impl TryFrom<upload::Model> for PartedUpload {
    type Error = StoreError;

    fn try_from(row: upload::Model) -> Result<Self, StoreError> {
        let expires_at = Timestamp(row.expires_at);
        let state = match (row.status.as_str(), row.file_id, row.made_of) {
            // The sweep may not have come by yet. This machine's clock decides, as for files.
            ("pending", ..) if expires_at <= local_now() => UploadState::Expired,
            ("pending", ..) => UploadState::Pending,
            ("completed", Some(file), Some(parts)) => UploadState::Completed { file: FileId::from_text(file), parts },
            ("cancelled", ..) => UploadState::Cancelled,
            ("expired", ..) => UploadState::Expired,
            (other, ..) => return Err(StoreError::Corrupt(format!("an unknown upload status {other:?}"))),
        };
        Ok(Self {
            id: UploadId::from_text(row.id),
            owner: row.owner.into(),
            filename: row.filename,
            bytes: row.bytes,
            file_expires_after: row
                .file_expires_after
                .map(|span| Duration::from_micros(u64::try_from(span).unwrap_or(0))),
            state,
            created_at: Timestamp(row.created_at),
            expires_at,
        })
    }
}

impl TryFrom<upload_part::Model> for UploadPart {
    type Error = StoreError;

    fn try_from(row: upload_part::Model) -> Result<Self, StoreError> {
        Ok(Self {
            id: UploadPartId::from_text(row.id),
            bytes: row.bytes,
            crc32c: checksum(Some(row.crc32c)).ok_or_else(|| StoreError::Corrupt("a part's checksum".into()))?,
            object_key: row.object_key,
            created_at: Timestamp(row.created_at),
        })
    }
}
