//! Files and their segment index.

use sea_orm::{
    ColumnTrait, ConnectionTrait, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect, QueryTrait, Set,
    sea_query::{Expr, OnConflict},
};

use super::{
    DatabaseTransaction, Store, StoreError,
    convert::{checksum, to_json},
    entity::{batch, file, file_segment, garbage, part, segment},
    local_now, now,
    scoped::{visible, within},
    uploads,
    write::{commit, roll_back},
};
use crate::domain::{
    BatchError, BatchId, BatchStatus, Completion, File, FileId, Owner, Scope, SegmentIndex, SegmentSpan, Timestamp,
};

/// Rows per statement: PostgreSQL takes 65,535 values, SQLite 32,766.
const ROWS_PER_INSERT: usize = 2_000;

/// The outcome of inserting a file.
#[derive(Debug)]
pub enum InsertedFile {
    /// It was inserted.
    New,
    /// The file that an earlier upload with this request id made.
    Existing(Box<File>),
    /// The upload in parts that it was to complete has ended meanwhile.
    UploadEnded,
}

/// How a file came.
#[derive(Clone, Copy, Debug, Default)]
pub struct Origin<'a> {
    /// The client's idempotency key.
    pub request_id: Option<&'a str>,
    /// The upload in parts that becomes this file.
    pub completes: Option<&'a Completion>,
}

impl<'a> From<Option<&'a str>> for Origin<'a> {
    fn from(request_id: Option<&'a str>) -> Self {
        Self { request_id, completes: None }
    }
}

/// The outcome of a deletion.
#[derive(Debug, PartialEq, Eq)]
pub enum DeletedFile {
    /// It was deleted.
    Deleted,
    /// There is no such file.
    NotFound,
    /// This unfinished batch reads it.
    InUse(BatchId),
}

/// What becomes of a file that an unfinished batch reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InUse {
    /// It stays.
    Refuse,
    /// Nobody finds it any more, and the sweep deletes it when the last batch has ended.
    Hide,
    /// It was hidden before, or has expired, and still waits.
    Wait,
}

impl Store {
    /// One file.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn file(&self, id: &FileId, scope: &Scope) -> Result<Option<File>, StoreError> {
        let find = visible(file::Entity::find_by_id(id.as_str()), scope);
        find.one(self.read()).await?.map(File::try_from).transpose()
    }

    /// The file that an owner's upload with this request id made.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn file_by_request_id(&self, owner: &Owner, request_id: &str) -> Result<Option<File>, StoreError> {
        find_by_request_id(self.read(), owner, request_id).await
    }

    /// Adds an uploaded file with its segment index. Its object stops being garbage in the same transaction.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn insert_file(
        &self,
        new: &File,
        origin: impl Into<Origin<'_>>,
        segments: &[SegmentSpan],
    ) -> Result<InsertedFile, StoreError> {
        self.insert_file_with(new, origin.into(), segments, None).await
    }

    /// Adds a file with bad lines: a batch of it fails at once, for these reasons.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn insert_bad_file(
        &self,
        new: &File,
        origin: impl Into<Origin<'_>>,
        problems: &[BatchError],
    ) -> Result<InsertedFile, StoreError> {
        self.insert_file_with(new, origin.into(), &[], Some(problems)).await
    }

    async fn insert_file_with(
        &self,
        new: &File,
        origin: Origin<'_>,
        segments: &[SegmentSpan],
        problems: Option<&[BatchError]>,
    ) -> Result<InsertedFile, StoreError> {
        let request_id = origin.request_id;
        self.write(|tx| async move {
            let row = file::ActiveModel {
                id: Set(new.id.as_str().to_owned()),
                owner: Set(new.owner.as_str().to_owned()),
                kind: Set("input".to_owned()),
                batch_id: Set(None),
                filename: Set(new.filename.clone()),
                bytes: Set(new.bytes),
                line_count: Set(new.line_count),
                models: Set(to_json(&new.models)?),
                endpoint: Set(new.endpoint.map(|endpoint| endpoint.path().to_owned())),
                object_key: Set(new.object_key.clone()),
                crc32c: Set(new.crc32c.map(i64::from)),
                request_id: Set(request_id.map(str::to_owned)),
                created_at: Set(new.created_at.0),
                expires_at: Set(new.expires_at.map(|at| at.0)),
                deleted_at: Set(None),
                problems: Set(problems.map(to_json).transpose()?),
            };
            if let Some(request_id) = request_id {
                free_request_id(&tx, &new.owner, request_id).await?;
            }
            let inserted = file::Entity::insert(row)
                .on_conflict(
                    OnConflict::columns([file::Column::Owner, file::Column::RequestId]).do_nothing().to_owned(),
                )
                .exec_without_returning(&tx)
                .await?;
            if inserted == 0 {
                let existing = match request_id {
                    Some(request_id) => find_by_request_id(&tx, &new.owner, request_id).await?,
                    None => None,
                };
                let existing = existing.ok_or_else(|| StoreError::Corrupt("a file id twice".into()))?;
                return roll_back(InsertedFile::Existing(Box::new(existing)));
            }
            if let Some(completion) = origin.completes
                && !uploads::complete(&tx, completion, &new.owner, &new.id).await?
            {
                return roll_back(InsertedFile::UploadEnded);
            }
            for some in segments.chunks(ROWS_PER_INSERT) {
                let rows = some.iter().map(|segment| file_segment::ActiveModel {
                    file_id: Set(new.id.as_str().to_owned()),
                    idx: Set(segment.index.0),
                    first_line: Set(segment.first_line),
                    line_span: Set(segment.line_span),
                    requests: Set(segment.requests),
                    byte_offset: Set(segment.offset),
                    byte_length: Set(segment.length),
                    models: Set(segment.models),
                    crc32c: Set(segment.crc32c.map(i64::from)),
                });
                file_segment::Entity::insert_many(rows).exec_without_returning(&tx).await?;
            }
            if let Some(key) = &new.object_key {
                garbage::Entity::delete_by_id(key.clone()).exec(&tx).await?;
            }
            commit(tx, InsertedFile::New)
        })
        .await
    }

    /// Deletes a file that no unfinished batch reads. Its object becomes garbage; a batch's results do with the last of its
    /// two result files. A failed batch has none: what was finished of it becomes garbage with its input.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn delete_file(&self, id: &FileId, scope: &Scope) -> Result<DeletedFile, StoreError> {
        self.delete_file_with(id, scope, InUse::Refuse).await
    }

    /// Deletes a file, or hides it while an unfinished batch reads it: [`Store::delete_due_files`] deletes it then.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn hide_file(&self, id: &FileId, scope: &Scope) -> Result<DeletedFile, StoreError> {
        self.delete_file_with(id, scope, InUse::Hide).await
    }

    /// Deletes at most `limit` files that are hidden or have expired and that no unfinished batch reads. Returns their
    /// ids.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn delete_due_files(&self, limit: u64) -> Result<Vec<FileId>, StoreError> {
        let at = now(self.read()).await?;
        let readers = batch::Entity::find()
            .select_only()
            .column(batch::Column::InputFileId)
            .filter(batch::Column::Status.is_in(unfinished()));
        let mut deleted = Vec::new();
        // One index each.
        for due in [file::Column::DeletedAt.is_not_null(), file::Column::ExpiresAt.lte(at.0)] {
            let due: Vec<String> = file::Entity::find()
                .select_only()
                .column(file::Column::Id)
                .filter(due)
                .filter(file::Column::Id.not_in_subquery(readers.clone().into_query()))
                .limit(limit)
                .into_tuple()
                .all(self.read())
                .await?;
            for id in due.into_iter().map(FileId::from_text) {
                match self.delete_file_with(&id, &Scope::All, InUse::Wait).await {
                    Ok(DeletedFile::Deleted) => deleted.push(id),
                    Ok(DeletedFile::NotFound | DeletedFile::InUse(_)) => {}
                    // One that can't be written keeps no other.
                    Err(error) if error.is_final() => tracing::error!(file = %id, %error, "a file can't be deleted"),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(deleted)
    }

    async fn delete_file_with(&self, id: &FileId, scope: &Scope, in_use: InUse) -> Result<DeletedFile, StoreError> {
        self.write(|tx| async move {
            let find = file::Entity::find_by_id(id.as_str());
            let find = match in_use {
                InUse::Refuse | InUse::Hide => visible(find, scope),
                InUse::Wait => within(find, file::Column::Owner, scope),
            };
            let Some(row) = find.lock_exclusive().one(&tx).await? else {
                return roll_back(DeletedFile::NotFound);
            };
            let user = batch::Entity::find()
                .filter(batch::Column::InputFileId.eq(id.as_str()))
                .filter(batch::Column::Status.is_in(unfinished()))
                .one(&tx)
                .await?;
            let at = now(&tx).await?;
            match (user, in_use) {
                (None, _) => {}
                (Some(user), InUse::Refuse | InUse::Wait) => {
                    return roll_back(DeletedFile::InUse(BatchId::from_text(user.id)));
                }
                (Some(_), InUse::Hide) => {
                    // Another upload may have its request id.
                    let hidden = file::ActiveModel {
                        id: Set(id.as_str().to_owned()),
                        deleted_at: Set(Some(at.0)),
                        request_id: Set(None),
                        ..Default::default()
                    };
                    file::Entity::update(hidden).exec(&tx).await?;
                    return commit(tx, DeletedFile::Deleted);
                }
            }
            if let Some(key) = &row.object_key {
                super::garbage::add(&tx, [key.clone()], at).await?;
            }
            if let Some(of) = &row.batch_id {
                free_results(&tx, of, id, at).await?;
            }
            if row.kind == "input" {
                free_failed(&tx, id, at).await?;
            }
            file_segment::Entity::delete_many().filter(file_segment::Column::FileId.eq(id.as_str())).exec(&tx).await?;
            file::Entity::delete_by_id(id.as_str()).exec(&tx).await?;
            commit(tx, DeletedFile::Deleted)
        })
        .await
    }

    /// The segment index of an input file, in order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn file_segments(&self, id: &FileId) -> Result<Vec<SegmentSpan>, StoreError> {
        let rows = file_segment::Entity::find()
            .filter(file_segment::Column::FileId.eq(id.as_str()))
            .order_by_asc(file_segment::Column::Idx)
            .all(self.read())
            .await?;
        Ok(rows.iter().map(span).collect())
    }

    /// At most `limit` entries of the segment index from `from` on.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn file_segments_from(
        &self,
        id: &FileId,
        from: SegmentIndex,
        limit: u64,
    ) -> Result<Vec<SegmentSpan>, StoreError> {
        let rows = file_segment::Entity::find()
            .filter(file_segment::Column::FileId.eq(id.as_str()))
            .filter(file_segment::Column::Idx.gte(from.0))
            .order_by_asc(file_segment::Column::Idx)
            .limit(limit)
            .all(self.read())
            .await?;
        Ok(rows.iter().map(span).collect())
    }

    /// The number of files.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn count_files(&self) -> Result<u64, StoreError> {
        Ok(file::Entity::find().count(self.read()).await?)
    }
}

fn unfinished() -> impl Iterator<Item = &'static str> {
    BatchStatus::ALL.into_iter().filter(|status| !status.is_terminal()).map(BatchStatus::as_str)
}

/// Takes a request id from a file that has expired and that no sweep has deleted yet.
async fn free_request_id<C: ConnectionTrait>(tx: &C, owner: &Owner, request_id: &str) -> Result<(), StoreError> {
    file::Entity::update_many()
        .col_expr(file::Column::RequestId, Expr::value(Option::<String>::None))
        .filter(file::Column::Owner.eq(owner.as_str()))
        .filter(file::Column::RequestId.eq(request_id))
        .filter(file::Column::ExpiresAt.lte(local_now().0))
        .exec(tx)
        .await?;
    Ok(())
}

fn span(row: &file_segment::Model) -> SegmentSpan {
    SegmentSpan {
        index: SegmentIndex(row.idx),
        first_line: row.first_line,
        line_span: row.line_span,
        requests: row.requests,
        offset: row.byte_offset,
        length: row.byte_length,
        models: row.models,
        crc32c: checksum(row.crc32c),
    }
}

/// Output and errors share their objects, which become garbage with the last of a batch's two result files.
async fn free_results(tx: &DatabaseTransaction, of: &str, deleted: &FileId, at: Timestamp) -> Result<(), StoreError> {
    let other = file::Entity::find()
        .filter(file::Column::BatchId.eq(of))
        .filter(file::Column::Id.ne(deleted.as_str()))
        .one(tx)
        .await?;
    if other.is_some() {
        return Ok(());
    }
    free(tx, of, at).await
}

/// Releases the finished results of this input's failed batches, which no file names.
async fn free_failed(tx: &DatabaseTransaction, input: &FileId, at: Timestamp) -> Result<(), StoreError> {
    let failed: Vec<String> = batch::Entity::find()
        .select_only()
        .column(batch::Column::Id)
        .filter(batch::Column::InputFileId.eq(input.as_str()))
        .filter(batch::Column::Status.eq(BatchStatus::Failed.as_str()))
        .into_tuple()
        .all(tx)
        .await?;
    for of in failed {
        free(tx, &of, at).await?;
    }
    Ok(())
}

/// Turns a batch's results into garbage: the objects of its segments, and parts that were not merged.
pub(super) async fn free(tx: &DatabaseTransaction, of: &str, at: Timestamp) -> Result<(), StoreError> {
    let of_segments = segment::Entity::find()
        .select_only()
        .column(segment::Column::ObjectKey)
        .filter(segment::Column::BatchId.eq(of))
        .filter(segment::Column::ObjectKey.is_not_null());
    // Of a segment that has ended they are garbage already, or its object.
    let unmerged = segment::Entity::find()
        .select_only()
        .column(segment::Column::Idx)
        .filter(segment::Column::BatchId.eq(of))
        .filter(segment::Column::ObjectKey.is_null());
    let of_parts = part::Entity::find()
        .select_only()
        .column(part::Column::ObjectKey)
        .filter(part::Column::BatchId.eq(of))
        .filter(part::Column::SegmentIdx.in_subquery(unmerged.into_query()));
    let mut keys: Vec<String> = of_segments.into_tuple().all(tx).await?;
    keys.extend(of_parts.into_tuple::<String>().all(tx).await?);
    super::garbage::add(tx, keys, at).await?;
    part::Entity::delete_many().filter(part::Column::BatchId.eq(of)).exec(tx).await?;
    segment::Entity::delete_many().filter(segment::Column::BatchId.eq(of)).exec(tx).await?;
    Ok(())
}

async fn find_by_request_id<C: ConnectionTrait>(
    connection: &C,
    owner: &Owner,
    request_id: &str,
) -> Result<Option<File>, StoreError> {
    visible(file::Entity::find(), &Scope::Of(owner.clone()))
        .filter(file::Column::RequestId.eq(request_id))
        .one(connection)
        .await?
        .map(File::try_from)
        .transpose()
}
