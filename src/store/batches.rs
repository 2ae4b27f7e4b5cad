//! Batches: create, read, list, cancel, expire, fail.

use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseBackend, EntityTrait, IntoActiveModel, PaginatorTrait,
    QueryFilter, QueryOrder, QuerySelect, Set, Statement,
    sea_query::{Expr, ExprTrait, OnConflict},
};

use super::{
    Store, StoreError,
    convert::{self, to_json},
    entity::{batch, batch_event, batch_metadata, batch_model, file},
    events::{Telling, append, fail, lock_batch, transition},
    files::free,
    now,
    parameters::{ids_parameter, texts_of},
    parts::{Commit, hold},
    queue::queued_lines_of,
    scoped::{visible, within},
    write::{announce, commit, roll_back},
};
use crate::domain::{
    Batch, BatchError, BatchId, BatchStatus, Epoch, File, FileKind, NewBatch, Owner, Priority, Scope, SegmentRef,
    Timestamp, lifecycle::BatchTrigger,
};

/// Prefix of the request ids of input files that came with their batch, and go with it. No client's key has a control
/// character.
pub const COMES_WITH_BATCH: &str = "\u{1}messages:";

/// The outcome of creating a batch.
#[derive(Debug)]
pub enum CreatedBatch {
    /// It was created.
    New(Box<Batch>),
    /// The batch that an earlier call with this request id created.
    Existing(Box<Batch>),
    /// An earlier call with this request id asked for something else.
    Reused(BatchId),
    /// There is no such input file.
    FileNotFound,
    /// The file is not an input.
    WrongPurpose,
    /// The owner's unfinished batches would have too many lines.
    TooManyLines {
        /// Lines without a result now.
        queued: i64,
        /// Lines of the new batch.
        added: i64,
    },
}

/// The outcome of a cancellation.
#[derive(Debug)]
pub enum CancelledBatch {
    /// It is cancelling, or cancelled already.
    Batch(Box<Batch>),
    /// There is no such batch.
    NotFound,
    /// It has ended, or is ending, in another way.
    Ended(Box<Batch>),
}

/// The results of closing windows.
#[derive(Debug, Default)]
pub struct ClosedWindows {
    /// They are closed.
    pub closed: Vec<BatchId>,
    /// They could not be closed.
    pub stuck: Vec<BatchId>,
    /// Whether the time of others may be up too.
    pub more: bool,
}

/// The outcome of deleting a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeletedBatch {
    /// It was deleted.
    Deleted,
    /// There is no such batch.
    NotFound,
    /// It has not ended.
    NotEnded,
}

impl Store {
    /// Creates a batch of any owner's file, without a limit on queued lines: for tests and benches.
    ///
    /// # Errors
    /// [`StoreError`].
    #[doc(hidden)]
    pub async fn create_batch(&self, new: NewBatch) -> Result<CreatedBatch, StoreError> {
        self.create_batch_within(new, &Scope::All, None).await
    }

    /// Creates a batch of a file within the scope, with its segments and its first events, if the owner's unfinished batches
    /// have at most `most` lines without a result then, this one's included.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn create_batch_within(
        &self,
        new: NewBatch,
        scope: &Scope,
        most: Option<i64>,
    ) -> Result<CreatedBatch, StoreError> {
        let new = &new;
        self.write(|tx| async move {
            if most.is_some() {
                lock_queue(&tx, &new.owner).await?;
            }
            // The lock keeps the file from being deleted before its batch is there.
            let find = visible(file::Entity::find_by_id(new.input_file_id.as_str()), scope);
            let Some(input) = find.lock_exclusive().one(&tx).await? else {
                return match find_existing(&tx, new).await? {
                    Some(existing) => roll_back(existing),
                    None => roll_back(CreatedBatch::FileNotFound),
                };
            };
            let problems = input.problems.clone();
            let input = File::try_from(input)?;
            let (FileKind::Input, Some(object_key)) = (&input.kind, &input.object_key) else {
                return roll_back(CreatedBatch::WrongPurpose);
            };
            let at = now(&tx).await?;
            let id = BatchId::generate();
            let mut row = new_row(&id, new, &input, object_key, at)?;
            let inserted = batch::Entity::insert(row.clone().into_active_model())
                .on_conflict(
                    OnConflict::columns([batch::Column::Owner, batch::Column::RequestId]).do_nothing().to_owned(),
                )
                .exec_without_returning(&tx)
                .await?;
            if inserted == 0 {
                let existing =
                    find_existing(&tx, new).await?.ok_or_else(|| StoreError::Corrupt("a batch id twice".into()))?;
                return roll_back(existing);
            }
            if let Some(most) = most {
                let queued = queued_lines_of(&tx, &new.owner).await?;
                if queued > most {
                    let added = input.line_count;
                    return roll_back(CreatedBatch::TooManyLines { queued: queued - added, added });
                }
            }
            insert_filter_rows(&tx, &id, new, &input).await?;
            let copied = tx
                .execute_raw(Statement::from_sql_and_values(
                    tx.get_database_backend(),
                    "INSERT INTO segments (batch_id, idx, first_line, line_span, requests, byte_offset, byte_length, \
                 models, input_crc32c, state, epoch) SELECT $1, idx, first_line, line_span, requests, byte_offset, \
                 byte_length, models, crc32c, 'queued', 0 FROM file_segments WHERE file_id = $2",
                    [id.as_str().into(), new.input_file_id.as_str().into()],
                ))
                .await?
                .rows_affected();
            row.segments = i32::try_from(copied).map_err(|_| StoreError::Corrupt("too many segments".into()))?;
            append(&tx, &row, at).await?;
            // The file was validated when it was uploaded.
            let moved = match problems {
                None => transition(&tx, &mut row, BatchTrigger::Validated, at).await?,
                Some(problems) => {
                    row.errors = problems;
                    fail(&tx, &mut row, Telling::Webhook, at).await?
                }
            };
            debug_assert_eq!(moved, Ok(true));
            announce(tx, &id, CreatedBatch::New(Box::new(row.try_into()?)))
        })
        .await
    }

    /// One batch.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn batch(&self, id: &BatchId, scope: &Scope) -> Result<Option<Batch>, StoreError> {
        let find = within(batch::Entity::find_by_id(id.as_str()), batch::Column::Owner, scope);
        find.one(self.read()).await?.map(Batch::try_from).transpose()
    }

    /// What a call with this request id would find: [`CreatedBatch::Existing`] or [`CreatedBatch::Reused`]. `hash`
    /// identifies what it asks for.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn batch_by_request_id(
        &self,
        owner: &Owner,
        request_id: &str,
        hash: Option<&str>,
    ) -> Result<Option<CreatedBatch>, StoreError> {
        find_by_request_id(self.read(), owner, request_id, hash).await
    }

    /// Starts to cancel a batch.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn cancel_batch(&self, id: &BatchId, scope: &Scope) -> Result<CancelledBatch, StoreError> {
        self.write(|tx| async move {
            let found = lock_batch(&tx, id).await?.filter(|row| scope.sees(&row.owner.as_str().into()));
            let Some(mut row) = found else { return roll_back(Ok(CancelledBatch::NotFound)) };
            let at = now(&tx).await?;
            match transition(&tx, &mut row, BatchTrigger::CancelRequested, at).await? {
                // One that can't be read is cancelled all the same.
                Ok(true) => announce(tx, id, Batch::try_from(row).map(Box::new).map(CancelledBatch::Batch)),
                Ok(false) => commit(tx, Batch::try_from(row).map(Box::new).map(CancelledBatch::Batch)),
                Err(_) => roll_back(Batch::try_from(row).map(Box::new).map(CancelledBatch::Ended)),
            }
        })
        .await?
    }

    /// Deletes an ended batch with its result files and its events. Its results become garbage.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn delete_batch(&self, id: &BatchId, scope: &Scope) -> Result<DeletedBatch, StoreError> {
        self.write(|tx| async move {
            let found = lock_batch(&tx, id).await?.filter(|row| scope.sees(&row.owner.as_str().into()));
            let Some(row) = found else { return roll_back(DeletedBatch::NotFound) };
            if !convert::status(&row.status)?.is_terminal() {
                return roll_back(DeletedBatch::NotEnded);
            }
            let (at, of) = (now(&tx).await?, id.as_str());
            free(&tx, of, at).await?;
            file::Entity::delete_many().filter(file::Column::BatchId.eq(of)).exec(&tx).await?;
            // The sweep deletes it once no other batch reads it.
            file::Entity::update_many()
                .col_expr(file::Column::DeletedAt, Expr::val(at.0))
                .col_expr(file::Column::RequestId, Expr::val(Option::<String>::None))
                .filter(file::Column::Id.eq(&row.input_file_id))
                .filter(file::Column::RequestId.starts_with(COMES_WITH_BATCH))
                .exec(&tx)
                .await?;
            batch_model::Entity::delete_many().filter(batch_model::Column::BatchId.eq(of)).exec(&tx).await?;
            batch_metadata::Entity::delete_many().filter(batch_metadata::Column::BatchId.eq(of)).exec(&tx).await?;
            batch_event::Entity::delete_many().filter(batch_event::Column::BatchId.eq(of)).exec(&tx).await?;
            batch::Entity::delete_by_id(of).exec(&tx).await?;
            announce(tx, id, DeletedBatch::Deleted)
        })
        .await
    }

    /// Fails a batch that can't continue, if its segment is still leased under `epoch`. Does nothing to one that has
    /// ended. Its webhook is sent, unless the database refuses that delivery: the failure itself must not depend on it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn fail_batch(&self, of: &SegmentRef, epoch: Epoch, error: BatchError) -> Result<Commit, StoreError> {
        match self.fail_batch_telling(of, epoch, &error, Telling::Webhook).await {
            Err(refused) if refused.is_final() => {
                tracing::error!(batch = %of.batch, %refused, "a failed batch's webhook can't be written; its receiver is not notified");
                self.fail_batch_telling(of, epoch, &error, Telling::Nobody).await
            }
            done => done,
        }
    }

    async fn fail_batch_telling(
        &self,
        of: &SegmentRef,
        epoch: Epoch,
        error: &BatchError,
        telling: Telling,
    ) -> Result<Commit, StoreError> {
        self.write(|tx| async move {
            if !hold(&tx, of, epoch).await? {
                return roll_back(Commit::Fenced);
            }
            let Some(mut row) = lock_batch(&tx, &of.batch).await? else { return roll_back(Commit::Fenced) };
            row.errors = to_json(&[error])?;
            let at = now(&tx).await?;
            match fail(&tx, &mut row, telling, at).await? {
                Ok(true) => announce(tx, &of.batch, Commit::Done),
                Ok(false) | Err(_) => roll_back(Commit::Fenced),
            }
        })
        .await
    }

    /// Closes the windows of at most `limit` batches whose time is up. Returns their ids.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn close_windows(&self, limit: u64) -> Result<Vec<BatchId>, StoreError> {
        Ok(self.close_windows_but(&[], limit).await?.closed)
    }

    /// Like [`Self::close_windows`], without the batches in `rest`, whose windows could not be closed a short time ago.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn close_windows_but(&self, rest: &[BatchId], limit: u64) -> Result<ClosedWindows, StoreError> {
        let at = now(self.read()).await?;
        let due = batch::Entity::find()
            .select_only()
            .column(batch::Column::Id)
            .filter(batch::Column::Status.is_in([BatchStatus::Validating.as_str(), BatchStatus::InProgress.as_str()]))
            .filter(batch::Column::ExpiresAt.lte(at.0))
            .filter(batch::Column::Id.is_not_in(rest.iter().map(BatchId::as_str)))
            .order_by_asc(batch::Column::ExpiresAt)
            .limit(limit)
            .into_tuple::<String>()
            .all(self.read())
            .await?;
        let mut windows = ClosedWindows { more: due.len() as u64 == limit, ..ClosedWindows::default() };
        // The last error after which the database may be unreachable, until a later window is closed.
        let mut away = None;
        for id in due.into_iter().map(BatchId::from_text) {
            let error = match self.close_window(&id).await {
                Ok(is_closed) => {
                    windows.stuck.extend(away.take().map(|(stuck, _)| stuck));
                    if is_closed {
                        windows.closed.push(id);
                    }
                    continue;
                }
                Err(error) => error,
            };
            // One that can't be written, or that another transaction keeps locked, does not keep other windows open.
            tracing::warn!(batch = %id, %error, "a window can't be closed");
            if error.is_final() {
                windows.stuck.push(id);
            } else if away.replace((id, error)).is_some() {
                break;
            }
        }
        if let Some((_, error)) = away {
            return Err(error);
        }
        Ok(windows)
    }

    async fn close_window(&self, id: &BatchId) -> Result<bool, StoreError> {
        self.write(|tx| async move {
            let Some(mut row) = lock_batch(&tx, id).await? else { return roll_back(false) };
            let at = now(&tx).await?;
            if row.expires_at <= at.0
                && let Ok(true) = transition(&tx, &mut row, BatchTrigger::WindowClosed, at).await?
            {
                return announce(tx, id, true);
            }
            roll_back(false)
        })
        .await
    }

    /// The number of unfinished batches ahead of this one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn queue_position(&self, of: &Batch) -> Result<i64, StoreError> {
        let before = Expr::col(batch::Column::Priority).gt(of.priority.value()).or(Expr::col(batch::Column::Priority)
            .eq(of.priority.value())
            .and(Expr::col(batch::Column::ExpiresAt).lt(of.expires_at.0)));
        let count = batch::Entity::find()
            .filter(batch::Column::Status.eq(BatchStatus::InProgress.as_str()))
            .filter(batch::Column::Id.ne(of.id.as_str()))
            .filter(before)
            .count(self.read())
            .await?;
        Ok(i64::try_from(count).unwrap_or(i64::MAX))
    }

    /// The revision of each of these batches.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn revisions(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, i64)>, StoreError> {
        let backend = self.read().get_database_backend();
        let sql = format!("SELECT id, revision FROM batches WHERE id IN {}", texts_of(backend, 1));
        let rows = Statement::from_sql_and_values(backend, sql, [ids_parameter(ids)?]);
        let rows = self.read().query_all_raw(rows).await?;
        rows.iter()
            .map(|row| Ok((BatchId::from_text(row.try_get::<String>("", "id")?), row.try_get("", "revision")?)))
            .collect()
    }

    /// The batches with these ids, in any order. Unknown ids are left out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn batches_of(&self, ids: &[BatchId]) -> Result<Vec<Batch>, StoreError> {
        let rows = batch::Entity::find().filter(batch::Column::Id.is_in(ids.iter().map(BatchId::as_str)));
        let rows = rows.all(self.read()).await?.into_iter();
        let read = |row: batch::Model| convert::readable("batch", &row.id.clone(), Batch::try_from(row));
        Ok(rows.filter_map(read).collect())
    }

    /// Unfinished batches, oldest first, at most `limit`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn unfinished(&self, scope: &Scope, limit: u64) -> Result<Vec<BatchId>, StoreError> {
        let mut ids: Vec<String> = Vec::new();
        // A walk for each state: SQLite would take the order of ids from an index that has the finished ones as well. In the
        // order in which states are entered, so that a batch that moves on meanwhile is met twice rather than never.
        for status in BatchStatus::ALL.into_iter().filter(|status| !status.is_terminal()) {
            let find = batch::Entity::find()
                .select_only()
                .column(batch::Column::Id)
                .filter(batch::Column::Status.eq(status.as_str()))
                .order_by_asc(batch::Column::Id)
                .limit(limit);
            let find = within(find, batch::Column::Owner, scope);
            ids.extend(find.into_tuple::<String>().all(self.read()).await?);
        }
        ids.sort_unstable();
        ids.dedup();
        ids.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        Ok(ids.into_iter().map(BatchId::from_text).collect())
    }

    /// Moves a batch's window, so that tests of expiry need not wait an hour.
    ///
    /// # Errors
    /// [`StoreError`].
    #[doc(hidden)]
    pub async fn set_expiry(&self, id: &BatchId, at: Timestamp) -> Result<(), StoreError> {
        let change =
            batch::ActiveModel { id: Set(id.as_str().to_owned()), expires_at: Set(at.0), ..Default::default() };
        change.update(&self.inner.write).await?;
        Ok(())
    }
}

/// Waits for other transactions that add to an owner's queue: what each counts then includes what the others have added.
/// SQLite has one writer anyway.
async fn lock_queue<C: ConnectionTrait>(tx: &C, owner: &Owner) -> Result<(), StoreError> {
    if tx.get_database_backend() == DatabaseBackend::Postgres {
        // The seed keeps these locks apart from those of others who hash something else.
        let sql = "SELECT pg_advisory_xact_lock(hashtextextended($1, 1953066602))";
        tx.query_one_raw(Statement::from_sql_and_values(DatabaseBackend::Postgres, sql, [owner.as_str().into()]))
            .await?;
    }
    Ok(())
}

fn new_row(
    id: &BatchId,
    new: &NewBatch,
    input: &File,
    object_key: &str,
    at: Timestamp,
) -> Result<batch::Model, StoreError> {
    Ok(batch::Model {
        id: id.as_str().to_owned(),
        owner: new.owner.as_str().to_owned(),
        status: BatchStatus::Validating.as_str().to_owned(),
        ending: None,
        endpoint: new.endpoint.path().to_owned(),
        models: to_json(&input.models)?,
        input_file_id: new.input_file_id.as_str().to_owned(),
        input_object_key: object_key.to_owned(),
        output_file_id: None,
        error_file_id: None,
        total: input.line_count,
        completed: 0,
        failed: 0,
        not_run: 0,
        input_tokens: 0,
        cached_input_tokens: 0,
        output_tokens: 0,
        reasoning_tokens: 0,
        total_tokens: 0,
        errors: "[]".to_owned(),
        metadata: to_json(&new.metadata)?,
        priority: Priority::value(new.priority),
        completion_window: convert::micros(new.completion_window),
        request_id: new.request_id.clone(),
        request_hash: new.request_hash.clone(),
        webhook: new.webhook.as_ref().map(to_json).transpose()?,
        webhook_endpoint_id: new.webhook_endpoint_id.as_ref().map(|id| id.as_str().to_owned()),
        progress_done: 0,
        progress_at: at.0,
        created_at: at.0,
        expires_at: at.plus(new.completion_window).0,
        in_progress_at: None,
        finalizing_at: None,
        completed_at: None,
        failed_at: None,
        expired_at: None,
        cancelling_at: None,
        cancelled_at: None,
        segments: 0,
        segments_done: 0,
        revision: 1,
        output_expires_after: new.output_expires_after.map(convert::micros),
    })
}

async fn insert_filter_rows<C: ConnectionTrait>(
    tx: &C,
    id: &BatchId,
    new: &NewBatch,
    input: &File,
) -> Result<(), StoreError> {
    let models = input
        .models
        .iter()
        .map(|model| batch_model::ActiveModel { batch_id: Set(id.as_str().to_owned()), model: Set(model.clone()) });
    if !input.models.is_empty() {
        batch_model::Entity::insert_many(models).exec_without_returning(tx).await?;
    }
    if !new.metadata.is_empty() {
        let pairs = new.metadata.iter().map(|(name, value)| batch_metadata::ActiveModel {
            batch_id: Set(id.as_str().to_owned()),
            name: Set(name.clone()),
            value: Set(value.clone()),
        });
        batch_metadata::Entity::insert_many(pairs).exec_without_returning(tx).await?;
    }
    Ok(())
}

async fn find_existing<C: ConnectionTrait>(tx: &C, new: &NewBatch) -> Result<Option<CreatedBatch>, StoreError> {
    match &new.request_id {
        Some(request_id) => find_by_request_id(tx, &new.owner, request_id, new.request_hash.as_deref()).await,
        None => Ok(None),
    }
}

async fn find_by_request_id<C: ConnectionTrait>(
    connection: &C,
    owner: &Owner,
    request_id: &str,
    hash: Option<&str>,
) -> Result<Option<CreatedBatch>, StoreError> {
    let found = batch::Entity::find()
        .filter(batch::Column::Owner.eq(owner.as_str()))
        .filter(batch::Column::RequestId.eq(request_id))
        .one(connection)
        .await?;
    let Some(row) = found else { return Ok(None) };
    // An earlier version has not noted what it was asked for.
    let is_other = row.request_hash.as_deref().zip(hash).is_some_and(|(first, now)| first != now);
    Ok(Some(if is_other {
        CreatedBatch::Reused(BatchId::from_text(row.id))
    } else {
        CreatedBatch::Existing(Box::new(Batch::try_from(row)?))
    }))
}
