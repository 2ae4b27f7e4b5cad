//! Parts: the checkpoints of a segment. One transaction per part, none per request.

use sea_orm::{
    ActiveModelTrait, ColumnTrait, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder, QuerySelect, Set,
    sea_query::Expr,
};

use super::{
    DatabaseTransaction, Store, StoreError,
    claims::{DONE, fenced},
    convert,
    entity::{batch, part, segment},
    events::{lock_batch, result_sizes, transition},
    garbage, now, webhooks,
    write::{announce, roll_back},
};
use crate::domain::{
    BatchId, Epoch, LineSet, SegmentIndex, SegmentRef, Timestamp, TokenUsage, lifecycle::BatchTrigger,
};

/// Results that have just been made durable as an object.
#[derive(Clone, Debug)]
pub struct NewPart {
    /// The object's key. It holds the output lines in input order, then the error lines in input order.
    pub object_key: String,
    /// Bytes of the output lines.
    pub output_bytes: u64,
    /// Bytes of the error lines.
    pub error_bytes: u64,
    /// The CRC-32C of the whole object.
    pub crc32c: u32,
    /// The segment's lines that are output lines here.
    pub completed: LineSet,
    /// The segment's lines that are error lines here.
    pub failed: LineSet,
    /// How many of its error lines are of requests that were not run, because the batch was cancelled or expired.
    pub not_run: u32,
    /// The token usage of its output lines together.
    pub usage: TokenUsage,
}

/// A part as stored.
#[derive(Clone, Debug)]
pub struct Part {
    /// Its number among the batch's parts, in commit order.
    pub seq: i64,
    /// The index of its segment.
    pub segment: SegmentIndex,
    /// Its object and lines.
    pub content: NewPart,
}

/// A segment's results, merged in input order.
#[derive(Clone, Debug)]
pub struct FinalObject {
    /// The object's key. It holds the output lines, then the error lines, each in input order.
    pub object_key: String,
    /// Bytes of the output lines.
    pub output_bytes: u64,
    /// Bytes of the error lines.
    pub error_bytes: u64,
    /// The number of output lines.
    pub output_lines: u64,
    /// The number of error lines.
    pub error_lines: u64,
    /// The CRC-32C of the whole object.
    pub crc32c: u32,
}

/// The outcome of a write that names an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// The write is durable.
    Done,
    /// Nothing was written: another node has claimed the segment, or its batch has ended.
    Fenced,
    /// Nothing was written: the results don't have exactly one line for each request, which is a bug.
    Incomplete,
}

impl Store {
    /// Adds a part to a segment and its counts to the batch, if the segment is still leased under `epoch`. Idempotent.
    ///
    /// # Errors
    /// [`StoreError`]: then it may or may not have been written, and the caller does it again.
    pub async fn commit_part(&self, of: &SegmentRef, epoch: Epoch, new: &NewPart) -> Result<Commit, StoreError> {
        self.write(|tx| async move {
            if !hold(&tx, of, epoch).await? {
                return roll_back(Commit::Fenced);
            }
            let Some(mut row) = lock_batch(&tx, &of.batch).await? else { return roll_back(Commit::Fenced) };
            // A repeated call: an earlier commit succeeded although its answer was lost.
            let known = part::Entity::find()
                .filter(part::Column::BatchId.eq(of.batch.as_str()))
                .filter(part::Column::SegmentIdx.eq(of.index.0))
                .filter(part::Column::ObjectKey.eq(&new.object_key))
                .one(&tx)
                .await?;
            if known.is_some() {
                return roll_back(Commit::Done);
            }
            if convert::status(&row.status)?.is_terminal() {
                return roll_back(Commit::Fenced);
            }
            let at = now(&tx).await?;
            insert(&tx, &mut row, of, epoch, new, at).await?;
            webhooks::enqueue_progress(&tx, &mut row, at).await?;
            row.into_active_model().reset_all().update(&tx).await?;
            announce(tx, &of.batch, Commit::Done)
        })
        .await
    }

    /// Ends a segment in one transaction: writes its last part, if there is one more, and its final object. With the
    /// last segment the batch ends too. The objects in `superseded` become garbage. Idempotent.
    ///
    /// # Errors
    /// [`StoreError`], as in [`Store::commit_part`].
    pub async fn finish_segment(
        &self,
        of: &SegmentRef,
        epoch: Epoch,
        last: Option<&NewPart>,
        object: &FinalObject,
        superseded: &[String],
    ) -> Result<Commit, StoreError> {
        self.write(|tx| async move {
            let size = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
            let lines = object.output_lines.saturating_add(object.error_lines);
            // The first promise is kept here: no segment ends without one line for each request, whatever went wrong
            // before.
            if let Some(held) = segment::Entity::find().filter(fenced(of, epoch)).one(&tx).await?
                && i64::from(held.requests) != size(lines)
            {
                let requests = held.requests;
                tracing::error!(segment = %of, requests, lines, "results do not fit their requests: this is a bug");
                return roll_back(Commit::Incomplete);
            }
            let finished = segment::Entity::update_many()
                .col_expr(segment::Column::State, Expr::val(DONE))
                .col_expr(segment::Column::LeaseOwner, Expr::val(Option::<String>::None))
                .col_expr(segment::Column::LeaseExpiresAt, Expr::val(Option::<i64>::None))
                .col_expr(segment::Column::Models, Expr::val(0))
                .col_expr(segment::Column::ObjectKey, Expr::val(object.object_key.clone()))
                .col_expr(segment::Column::OutputBytes, Expr::val(size(object.output_bytes)))
                .col_expr(segment::Column::ErrorBytes, Expr::val(size(object.error_bytes)))
                .col_expr(segment::Column::OutputLines, Expr::val(size(object.output_lines)))
                .col_expr(segment::Column::ErrorLines, Expr::val(size(object.error_lines)))
                .col_expr(segment::Column::Crc32c, Expr::val(i64::from(object.crc32c)))
                .filter(fenced(of, epoch))
                .exec(&tx)
                .await?;
            if finished.rows_affected == 0 {
                // A repeated call: an earlier commit succeeded although its answer was lost.
                let ours = segment::Entity::find_by_id((of.batch.as_str().to_owned(), of.index.0))
                    .filter(segment::Column::ObjectKey.eq(&object.object_key))
                    .one(&tx)
                    .await?;
                return roll_back(if ours.is_some() { Commit::Done } else { Commit::Fenced });
            }
            let Some(mut row) = lock_batch(&tx, &of.batch).await? else { return roll_back(Commit::Fenced) };
            if convert::status(&row.status)?.is_terminal() {
                return roll_back(Commit::Fenced);
            }
            let at = now(&tx).await?;
            if let Some(last) = last {
                insert(&tx, &mut row, of, epoch, last, at).await?;
            }
            garbage::add(&tx, superseded.iter().cloned(), at).await?;
            row.segments_done += 1;
            if row.segments_done >= row.segments && !is_complete(&tx, &mut row).await? {
                return roll_back(Commit::Incomplete);
            }
            let ended = row.segments_done >= row.segments
                && matches!(transition(&tx, &mut row, BatchTrigger::AllLinesDone, at).await?, Ok(true));
            if !ended {
                row.revision += 1;
                webhooks::enqueue_progress(&tx, &mut row, at).await?;
                row.into_active_model().reset_all().update(&tx).await?;
            }
            announce(tx, &of.batch, Commit::Done)
        })
        .await
    }

    /// A segment's parts, in commit order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn parts_of(&self, of: &SegmentRef) -> Result<Vec<Part>, StoreError> {
        let rows = part::Entity::find()
            .filter(part::Column::BatchId.eq(of.batch.as_str()))
            .filter(part::Column::SegmentIdx.eq(of.index.0))
            .order_by_asc(part::Column::Seq)
            .all(self.read())
            .await?;
        Ok(rows.into_iter().map(from_row).collect())
    }

    /// At most `limit` of a batch's parts from `from` on, in commit order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn parts_from(&self, id: &BatchId, from: i64, limit: u64) -> Result<Vec<Part>, StoreError> {
        let rows = part::Entity::find()
            .filter(part::Column::BatchId.eq(id.as_str()))
            .filter(part::Column::Seq.gte(from))
            .order_by_asc(part::Column::Seq)
            .limit(limit)
            .all(self.read())
            .await?;
        Ok(rows.into_iter().map(from_row).collect())
    }

    /// Removes parts whose objects are torn or missing and subtracts their counts, so that their lines run again. Their
    /// objects become garbage. Idempotent.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn drop_parts(&self, of: &SegmentRef, epoch: Epoch, torn: &[Part]) -> Result<Commit, StoreError> {
        self.write(|tx| async move {
            if !hold(&tx, of, epoch).await? {
                return roll_back(Commit::Fenced);
            }
            let Some(mut row) = lock_batch(&tx, &of.batch).await? else { return roll_back(Commit::Fenced) };
            if convert::status(&row.status)?.is_terminal() {
                return roll_back(Commit::Fenced);
            }
            let mut dropped = Vec::with_capacity(torn.len());
            for one in torn {
                let deleted = part::Entity::delete_by_id((of.batch.as_str().to_owned(), one.seq))
                    .filter(part::Column::SegmentIdx.eq(of.index.0))
                    .exec(&tx)
                    .await?;
                // `None`: an earlier call succeeded although its answer was lost.
                if deleted.rows_affected == 1 {
                    count(&mut row, &one.content, -1);
                    dropped.push(one.content.object_key.clone());
                }
            }
            if dropped.is_empty() {
                return roll_back(Commit::Done);
            }
            garbage::add(&tx, dropped, now(&tx).await?).await?;
            row.revision += 1;
            row.into_active_model().reset_all().update(&tx).await?;
            announce(tx, &of.batch, Commit::Done)
        })
        .await
    }
}

/// Whether the segments, all of which have ended, have one line for each request. Corrects the batch's counts if they
/// differ from the lines.
async fn is_complete(tx: &DatabaseTransaction, row: &mut batch::Model) -> Result<bool, StoreError> {
    let lines = result_sizes(tx, &row.id).await?;
    let (output, errors) = (lines.output_lines.unwrap_or(0), lines.error_lines.unwrap_or(0));
    if output + errors != row.total {
        let (batch, total) = (&row.id, row.total);
        tracing::error!(batch, total, output, errors, "a batch's results do not fit its requests: this is a bug");
        return Ok(false);
    }
    if (row.completed, row.failed) != (output, errors) {
        let (batch, completed, failed) = (&row.id, row.completed, row.failed);
        tracing::error!(
            batch,
            completed,
            failed,
            output,
            errors,
            "a batch's counts do not fit its results, and are set to them: this is a bug"
        );
        (row.completed, row.failed) = (output, errors);
    }
    Ok(true)
}

/// Locks the segment if it is still leased under this epoch. Until the transaction ends, no node can claim it.
pub(super) async fn hold(tx: &DatabaseTransaction, of: &SegmentRef, epoch: Epoch) -> Result<bool, StoreError> {
    let held = segment::Entity::find().filter(fenced(of, epoch)).lock_exclusive().one(tx).await?;
    Ok(held.is_some())
}

async fn insert(
    tx: &DatabaseTransaction,
    row: &mut batch::Model,
    of: &SegmentRef,
    epoch: Epoch,
    new: &NewPart,
    at: Timestamp,
) -> Result<(), StoreError> {
    row.revision += 1;
    count(row, new, 1);
    let size = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let model = part::ActiveModel {
        batch_id: Set(of.batch.as_str().to_owned()),
        seq: Set(row.revision),
        segment_idx: Set(of.index.0),
        epoch: Set(epoch.0),
        object_key: Set(new.object_key.clone()),
        output_bytes: Set(size(new.output_bytes)),
        error_bytes: Set(size(new.error_bytes)),
        crc32c: Set(i64::from(new.crc32c)),
        completed_lines: Set(new.completed.as_bytes().to_vec()),
        failed_lines: Set(new.failed.as_bytes().to_vec()),
        not_run: Set(i64::from(new.not_run)),
        input_tokens: Set(new.usage.input),
        cached_input_tokens: Set(new.usage.cached_input),
        output_tokens: Set(new.usage.output),
        reasoning_tokens: Set(new.usage.reasoning),
        total_tokens: Set(new.usage.total),
        created_at: Set(at.0),
    };
    part::Entity::insert(model).exec_without_returning(tx).await?;
    Ok(())
}

/// Adds a part's counts to its batch, or subtracts them if `sign` is -1.
fn count(row: &mut batch::Model, of: &NewPart, sign: i64) {
    let lines = |set: &LineSet| sign * i64::try_from(set.len()).unwrap_or(0);
    row.completed += lines(&of.completed);
    row.failed += lines(&of.failed);
    row.not_run += sign * i64::from(of.not_run);
    row.input_tokens = tokens(row.input_tokens, of.usage.input, sign);
    row.cached_input_tokens = tokens(row.cached_input_tokens, of.usage.cached_input, sign);
    row.output_tokens = tokens(row.output_tokens, of.usage.output, sign);
    row.reasoning_tokens = tokens(row.reasoning_tokens, of.usage.reasoning, sign);
    row.total_tokens = tokens(row.total_tokens, of.usage.total, sign);
}

/// Adds a token count that a worker reported, which may be any number. A sum that has reached the maximum stays there,
/// because its true value is unknown.
fn tokens(sum: i64, count: i64, sign: i64) -> i64 {
    if sum == i64::MAX { sum } else { sum.saturating_add(sign * count.max(0)).max(0) }
}

fn from_row(row: part::Model) -> Part {
    let size = |value: i64| u64::try_from(value).unwrap_or(0);
    Part {
        seq: row.seq,
        segment: SegmentIndex(row.segment_idx),
        content: NewPart {
            object_key: row.object_key,
            output_bytes: size(row.output_bytes),
            error_bytes: size(row.error_bytes),
            crc32c: u32::try_from(row.crc32c).unwrap_or(0),
            completed: LineSet::from_bytes(row.completed_lines),
            failed: LineSet::from_bytes(row.failed_lines),
            not_run: u32::try_from(row.not_run).unwrap_or(0),
            usage: TokenUsage {
                input: row.input_tokens,
                cached_input: row.cached_input_tokens,
                output: row.output_tokens,
                reasoning: row.reasoning_tokens,
                total: row.total_tokens,
            },
        },
    }
}
