//! State changes: the only place where a batch enters a state, together with the event that reports it.

use std::collections::HashMap;

use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder, QuerySelect,
    Set,
    sea_query::{Expr, ExprTrait},
};

use super::{
    DatabaseTransaction, Store, StoreError,
    convert::{self, to_json},
    entity::{batch, batch_event, counter, file, segment},
    leftovers,
    scoped::within,
    webhooks,
};
use crate::domain::{
    Batch, BatchId, BatchStatus, FileId, Revision, Scope, Sequence, Timestamp, TokenUsage,
    lifecycle::{self, BatchTrigger},
};

/// The counter behind [`Sequence`].
const SEQUENCE: &str = "batch_events";

/// A state that a batch entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateEvent {
    /// Its sequence number among all state changes of all batches.
    pub sequence: Sequence,
    /// When it happened.
    pub at: Timestamp,
    /// The batch as it was then.
    pub batch: Batch,
}

/// The numbers of a batch at the time of an event.
#[derive(serde::Serialize, serde::Deserialize)]
struct Snapshot {
    completed: i64,
    failed: i64,
    usage: [i64; 5],
    output_file_id: Option<String>,
    error_file_id: Option<String>,
}

/// Whether a state change also creates webhook deliveries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Telling {
    /// Yes, as the batch's webhook subscribes.
    Webhook,
    /// No, because the delivery can't be written.
    Nobody,
}

/// Applies `input` to the batch in `row`, which the transaction has locked: writes the new states with one event each
/// and, at the end, the result files. Updates `row`. Returns whether anything changed.
pub(super) async fn transition(
    tx: &DatabaseTransaction,
    row: &mut batch::Model,
    input: BatchTrigger,
    at: Timestamp,
) -> Result<Result<bool, lifecycle::BatchRefusal>, StoreError> {
    change(tx, row, input, Telling::Webhook, at).await
}

/// As [`transition`], but ends a batch that can't continue as FAILED.
pub(super) async fn fail(
    tx: &DatabaseTransaction,
    row: &mut batch::Model,
    telling: Telling,
    at: Timestamp,
) -> Result<Result<bool, lifecycle::BatchRefusal>, StoreError> {
    change(tx, row, BatchTrigger::Unrunnable, telling, at).await
}

async fn change(
    tx: &DatabaseTransaction,
    row: &mut batch::Model,
    input: BatchTrigger,
    telling: Telling,
    at: Timestamp,
) -> Result<Result<bool, lifecycle::BatchRefusal>, StoreError> {
    let step = match lifecycle::apply(convert::status(&row.status)?, convert::ending(row.ending.as_deref())?, input) {
        Ok(step) => step,
        Err(refused) => return Ok(Err(refused)),
    };
    if let Some(ending) = step.ending {
        row.ending = Some(ending.error_code().to_owned());
    }
    for status in step.entered {
        enter(tx, row, *status, telling, at).await?;
    }
    if !step.entered.is_empty() || step.ending.is_some() {
        row.clone().into_active_model().reset_all().update(tx).await?;
    }
    Ok(Ok(!step.entered.is_empty()))
}

async fn enter(
    tx: &DatabaseTransaction,
    row: &mut batch::Model,
    status: BatchStatus,
    telling: Telling,
    at: Timestamp,
) -> Result<(), StoreError> {
    row.status = status.as_str().to_owned();
    row.revision += 1;
    let now = Some(at.0);
    match status {
        BatchStatus::Validating => {}
        BatchStatus::InProgress => row.in_progress_at = now,
        BatchStatus::Finalizing => row.finalizing_at = now,
        BatchStatus::Completed => row.completed_at = now,
        BatchStatus::Failed => row.failed_at = now,
        BatchStatus::Expired => row.expired_at = now,
        BatchStatus::Cancelling => row.cancelling_at = now,
        BatchStatus::Cancelled => row.cancelled_at = now,
    }
    if status.is_terminal() && status != BatchStatus::Failed {
        write_result_files(tx, row, at).await?;
    }
    if status.is_terminal() {
        leftovers::note(tx, &row.id, at).await?;
    }
    append(tx, row, at).await?;
    if telling == Telling::Nobody {
        return Ok(());
    }
    webhooks::enqueue_state(tx, row, status, at).await
}

/// Appends the event of the state that `row` has just entered.
pub(super) async fn append(tx: &DatabaseTransaction, row: &batch::Model, at: Timestamp) -> Result<(), StoreError> {
    // The row lock on the counter makes sequences grow in commit order, so a reader that has seen n has seen all below n.
    counter::Entity::update_many()
        .col_expr(counter::Column::Value, Expr::col(counter::Column::Value).add(1))
        .filter(counter::Column::Name.eq(SEQUENCE))
        .exec(tx)
        .await?;
    let sequence = counter::Entity::find_by_id(SEQUENCE)
        .one(tx)
        .await?
        .ok_or_else(|| StoreError::Corrupt("no event counter".into()))?
        .value;
    let snapshot = Snapshot {
        completed: row.completed,
        failed: row.failed,
        usage: [row.input_tokens, row.cached_input_tokens, row.output_tokens, row.reasoning_tokens, row.total_tokens],
        output_file_id: row.output_file_id.clone(),
        error_file_id: row.error_file_id.clone(),
    };
    let event = batch_event::ActiveModel {
        sequence: Set(sequence),
        batch_id: Set(row.id.clone()),
        revision: Set(row.revision),
        status: Set(row.status.clone()),
        snapshot: Set(to_json(&snapshot)?),
        created_at: Set(at.0),
    };
    batch_event::Entity::insert(event).exec(tx).await?;
    Ok(())
}

/// Sums over the ended segments of a batch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ResultSizes {
    output_bytes: Option<i64>,
    pub(super) output_lines: Option<i64>,
    error_bytes: Option<i64>,
    pub(super) error_lines: Option<i64>,
}

pub(super) async fn result_sizes(tx: &DatabaseTransaction, batch: &str) -> Result<ResultSizes, StoreError> {
    let sum = |column: segment::Column| Expr::col(column).sum().cast_as("bigint");
    type Sum = Option<i64>;
    let sums: Option<(Sum, Sum, Sum, Sum)> = segment::Entity::find()
        .select_only()
        .expr_as(sum(segment::Column::OutputBytes), "output_bytes")
        .expr_as(sum(segment::Column::OutputLines), "output_lines")
        .expr_as(sum(segment::Column::ErrorBytes), "error_bytes")
        .expr_as(sum(segment::Column::ErrorLines), "error_lines")
        .filter(segment::Column::BatchId.eq(batch))
        .into_tuple()
        .one(tx)
        .await?;
    let (output_bytes, output_lines, error_bytes, error_lines) = sums.unwrap_or_default();
    Ok(ResultSizes { output_bytes, output_lines, error_bytes, error_lines })
}

/// Writes the output and error files as rows that refer to the batch's segments in order. Nothing is copied.
async fn write_result_files(tx: &DatabaseTransaction, row: &mut batch::Model, at: Timestamp) -> Result<(), StoreError> {
    let ResultSizes { output_bytes, output_lines, error_bytes, error_lines } = result_sizes(tx, &row.id).await?;
    let insert = async |kind: &str, bytes: Option<i64>, lines: Option<i64>| -> Result<Option<String>, StoreError> {
        let (Some(bytes), Some(lines @ 1..)) = (bytes, lines) else { return Ok(None) };
        let id = FileId::generate().into_string();
        let new = file::ActiveModel {
            id: Set(id.clone()),
            owner: Set(row.owner.clone()),
            kind: Set(kind.to_owned()),
            batch_id: Set(Some(row.id.clone())),
            filename: Set(format!("{}_{kind}.jsonl", row.id)),
            bytes: Set(bytes),
            line_count: Set(lines),
            models: Set("[]".to_owned()),
            endpoint: Set(None),
            object_key: Set(None),
            crc32c: Set(None),
            request_id: Set(None),
            created_at: Set(at.0),
            expires_at: Set(row.output_expires_after.map(|span| at.0.saturating_add(span))),
            deleted_at: Set(None),
            problems: Set(None),
        };
        file::Entity::insert(new).exec(tx).await?;
        Ok(Some(id))
    };
    let output = insert("output", output_bytes, output_lines).await?;
    let error = insert("error", error_bytes, error_lines).await?;
    row.output_file_id = output;
    row.error_file_id = error;
    Ok(())
}

impl Store {
    /// A batch and all its state changes, oldest first, read at one moment.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn history(&self, id: &BatchId) -> Result<Option<(Batch, Vec<StateEvent>)>, StoreError> {
        // The events are read second. If the batch changes in between, the newest event is ahead of the batch, never
        // behind.
        let Some(row) = batch::Entity::find_by_id(id.as_str()).one(self.read()).await? else { return Ok(None) };
        let events = batch_event::Entity::find()
            .filter(batch_event::Column::BatchId.eq(id.as_str()))
            .order_by_asc(batch_event::Column::Revision)
            .all(self.read())
            .await?;
        let batch = Batch::try_from(row)?;
        let events = events.into_iter().map(|event| state_event(&batch, event)).collect::<Result<Vec<_>, _>>()?;
        Ok(Some((batch, events)))
    }

    /// Those of these batches that exist, each with all its state changes, oldest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn histories(&self, ids: &[BatchId]) -> Result<Vec<(Batch, Vec<StateEvent>)>, StoreError> {
        // In this order, as in `history`.
        let batches = self.batches_of(ids).await?;
        let mut events: HashMap<String, Vec<batch_event::Model>> = HashMap::with_capacity(ids.len());
        let rows = batch_event::Entity::find()
            .filter(batch_event::Column::BatchId.is_in(ids.iter().map(BatchId::as_str)))
            .order_by_asc(batch_event::Column::Revision)
            .all(self.read())
            .await?;
        for row in rows {
            events.entry(row.batch_id.clone()).or_default().push(row);
        }
        let with_events = batches.into_iter().filter_map(|batch| {
            let events = events.remove(batch.id.as_str()).unwrap_or_default();
            let events = events.into_iter().map(|event| state_event(&batch, event)).collect::<Result<_, _>>();
            let events = convert::readable("event of batch", batch.id.as_str(), events)?;
            Some((batch, events))
        });
        Ok(with_events.collect())
    }

    /// State changes of all batches after `after`, oldest first, at most `limit`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn events_after(
        &self,
        scope: &Scope,
        after: Sequence,
        limit: u64,
    ) -> Result<(Vec<StateEvent>, Sequence), StoreError> {
        let rows = batch_event::Entity::find()
            .filter(batch_event::Column::Sequence.gt(after.0))
            .order_by_asc(batch_event::Column::Sequence)
            .limit(limit)
            .all(self.read())
            .await?;
        let reached = rows.last().map_or(after, |event| Sequence(event.sequence));
        let ids: Vec<_> = rows.iter().map(|event| event.batch_id.clone()).collect();
        let find = batch::Entity::find().filter(batch::Column::Id.is_in(ids));
        let batches = within(find, batch::Column::Owner, scope)
            .all(self.read())
            .await?
            .into_iter()
            .filter_map(|row| {
                let id = row.id.clone();
                let batch = convert::readable("batch", &id, Batch::try_from(row))?;
                Some((id, batch))
            })
            .collect::<std::collections::HashMap<_, _>>();
        let events = rows.into_iter().filter_map(|event| {
            let id = event.batch_id.clone();
            convert::readable("event of batch", &id, state_event(batches.get(&id)?, event))
        });
        Ok((events.collect(), reached))
    }

    /// The sequence of the newest state change.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn last_sequence(&self) -> Result<Sequence, StoreError> {
        let row = counter::Entity::find_by_id(SEQUENCE).one(self.read()).await?;
        Ok(Sequence(row.map_or(0, |row| row.value)))
    }
}

/// Reconstructs the batch at the time of an event from the batch as it is now.
#[allow(clippy::needless_pass_by_value)] // the event is used up
fn state_event(now: &Batch, event: batch_event::Model) -> Result<StateEvent, StoreError> {
    let snapshot: Snapshot = convert::json("event snapshot", &event.snapshot)?;
    let at = Timestamp(event.created_at);
    let status = convert::status(&event.status)?;
    let [input, cached_input, output, reasoning, total] = snapshot.usage;
    let mut batch = now.clone();
    batch.status = status;
    batch.revision = Revision(event.revision);
    batch.counts.completed = snapshot.completed;
    batch.counts.failed = snapshot.failed;
    batch.usage = TokenUsage { input, cached_input, output, reasoning, total };
    batch.output_file_id = snapshot.output_file_id.map(FileId::from_text);
    batch.error_file_id = snapshot.error_file_id.map(FileId::from_text);
    batch.times = batch.times.until(at, status);
    Ok(StateEvent { sequence: Sequence(event.sequence), at, batch })
}

/// Locks a batch's row for the transaction and reads it.
pub(super) async fn lock_batch<C: ConnectionTrait>(tx: &C, id: &BatchId) -> Result<Option<batch::Model>, StoreError> {
    Ok(batch::Entity::find_by_id(id.as_str()).lock_exclusive().one(tx).await?)
}
