//! Leases on segments. A claim adds one to the segment's epoch. Every write of its holder names that epoch, so a holder
//! that lost its lease can't write anything.

use std::{cmp::Reverse, time::Duration};

use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DatabaseBackend, EntityTrait, QueryFilter, QueryOrder, QueryResult,
    QuerySelect, Statement,
    sea_query::{Expr, ExprTrait, LockBehavior, LockType},
};

use super::{
    Store, StoreError, convert,
    entity::{batch, segment},
    now,
    parameters::texts_of,
    write::{commit, roll_back},
};
use crate::domain::{
    BatchId, BatchStatus, Endpoint, Epoch, NodeId, Owner, Priority, SegmentIndex, SegmentRef, SegmentSpan, Timestamp,
    lifecycle::Ending,
};

/// A segment's states, as stored.
pub(super) const QUEUED: &str = "queued";
pub(super) const LEASED: &str = "leased";
pub(super) const DONE: &str = "done";

/// The condition for batches that have not ended, in the words of the index `batches_unfinished`, so that the index is
/// used.
const UNFINISHED: &str = "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')";

/// The owners of unfinished batches, one step in that index each, however many batches they have. SQLite would take another
/// index and sort.
fn owners(backend: DatabaseBackend) -> String {
    let indexed = match backend {
        DatabaseBackend::Sqlite => "INDEXED BY batches_unfinished",
        _ => "",
    };
    format!(
        "owners(owner) AS (SELECT (SELECT f.owner FROM batches AS f {indexed} WHERE f.{UNFINISHED} \
         ORDER BY f.owner LIMIT 1) UNION ALL SELECT (SELECT n.owner FROM batches AS n {indexed} \
         WHERE n.{UNFINISHED} AND n.owner > owners.owner ORDER BY n.owner LIMIT 1) \
         FROM owners WHERE owners.owner IS NOT NULL)"
    )
}

/// A batch with segments to claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The batch.
    pub id: BatchId,
    /// The owner.
    pub owner: Owner,
    /// The priority.
    pub priority: Priority,
    /// When its window closes.
    pub expires_at: Timestamp,
    /// Its models: bit `i` of a segment's mask is model `i`.
    pub models: Vec<String>,
    /// How its remaining lines are to end, if they are not to run.
    pub ending: Option<Ending>,
}

/// A segment that this node has leased.
#[derive(Clone, Debug)]
pub struct ClaimedSegment {
    /// The segment.
    pub segment: SegmentRef,
    /// The fencing token of everything written for it.
    pub epoch: Epoch,
    /// The range of its lines.
    pub span: SegmentSpan,
    /// The key of the input object.
    pub object_key: String,
    /// The batch's owner.
    pub owner: Owner,
    /// The batch's.
    pub endpoint: Endpoint,
    /// The batch's.
    pub models: Vec<String>,
    /// The batch's.
    pub priority: Priority,
    /// The batch's.
    pub expires_at: Timestamp,
    /// How its remaining lines are to end, if they are not to run.
    pub ending: Option<Ending>,
}

/// A segment that this node had when it renewed its leases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldSegment {
    /// The segment.
    pub segment: SegmentRef,
    /// The epoch of the lease.
    pub epoch: Epoch,
    /// How its remaining lines are to end, if they are not to run.
    pub ending: Option<Ending>,
    /// Whether the batch has ended, so that there is nothing more to write.
    pub batch_ended: bool,
}

/// The result of a renewal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Renewed {
    /// The segments that this node still holds.
    pub held: Vec<HeldSegment>,
}

/// A segment, for reading its results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentRecord {
    /// Where its lines are in the input.
    pub span: SegmentSpan,
    /// Its final object: the output lines, then the error lines.
    pub object_key: Option<String>,
    /// Bytes of output lines.
    pub output_bytes: u64,
    /// Bytes of error lines.
    pub error_bytes: u64,
    /// The CRC-32C of the whole object.
    pub crc32c: Option<u32>,
}

impl Store {
    /// Unfinished batches with segments to claim, in the order in which to serve them, some `limit` of them: of each owner the
    /// first ones, so that one owner's thousands hide nobody else's. Those of which no line could run because no model of
    /// theirs is in `served` are left out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn candidates(&self, served: &[String], limit: u64) -> Result<Vec<Candidate>, StoreError> {
        let backend = self.read().get_database_backend();
        let at = now(self.read()).await?;
        let count = self.owners_of_unfinished().await?;
        if count == 0 {
            return Ok(Vec::new());
        }
        // Few owners have many batches and many have few, so each may contribute more than an even part of the limit.
        // The excess is cut off below, the last ones of each first.
        let each = (limit.saturating_mul(2) / count).clamp(1, limit);
        let wanted = format!(
            "c.owner = o.owner AND c.{UNFINISHED} AND (c.ending IS NOT NULL OR EXISTS \
             (SELECT 1 FROM batch_models AS m WHERE m.batch_id = c.id AND m.model IN {})) AND EXISTS \
             (SELECT 1 FROM segments AS s WHERE s.batch_id = c.id AND \
             (s.state = '{QUEUED}' OR (s.state = '{LEASED}' AND s.lease_expires_at < $1))) \
             ORDER BY c.priority DESC, c.expires_at, c.id LIMIT $2",
            texts_of(backend, 4)
        );
        let of_each = match backend {
            // It has no LATERAL, but evaluates IN for each owner.
            DatabaseBackend::Sqlite => {
                format!("batches AS b WHERE b.id IN (SELECT c.id FROM batches AS c WHERE {wanted})")
            }
            _ => format!("LATERAL (SELECT c.* FROM batches AS c WHERE {wanted}) AS b"),
        };
        let sql = format!(
            "WITH RECURSIVE {} SELECT id, owner, priority, expires_at, models, ending FROM (\
             SELECT b.*, ROW_NUMBER() OVER (PARTITION BY b.owner ORDER BY b.priority DESC, b.expires_at, b.id) AS place \
             FROM owners AS o CROSS JOIN {of_each}) AS found \
             ORDER BY place, priority DESC, expires_at, id LIMIT $3",
            owners(backend)
        );
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let values = [at.0.into(), number(each).into(), number(limit).into(), convert::to_json(&served)?.into()];
        let rows = self.read().query_all_raw(Statement::from_sql_and_values(backend, sql, values)).await?;
        let mut found = Vec::with_capacity(rows.len());
        for row in rows {
            let id: String = row.try_get("", "id")?;
            // A batch that can't be read does not keep others from being claimed.
            found.extend(convert::readable("batch", &id, candidate(&row)));
        }
        found.sort_by(|one, other| {
            let key = |of: &Candidate| (Reverse(of.priority), of.expires_at);
            key(one).cmp(&key(other)).then_with(|| one.id.cmp(&other.id))
        });
        Ok(found)
    }

    /// The number of owners with unfinished batches.
    async fn owners_of_unfinished(&self) -> Result<u64, StoreError> {
        let backend = self.read().get_database_backend();
        let sql =
            format!("WITH RECURSIVE {} SELECT COUNT(*) AS owners FROM owners WHERE owner IS NOT NULL", owners(backend));
        let row = self.read().query_one_raw(Statement::from_string(backend, sql)).await?;
        let row = row.ok_or_else(|| StoreError::Corrupt("no count".into()))?;
        Ok(u64::try_from(row.try_get::<i64>("", "owners")?).unwrap_or(0))
    }

    /// Leases the first claimable segment of a batch that has a line for a model of `mask`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn claim_segment(
        &self,
        node: &NodeId,
        id: &BatchId,
        mask: i64,
        lease: Duration,
    ) -> Result<Option<ClaimedSegment>, StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let found = segment::Entity::find()
                .filter(segment::Column::BatchId.eq(id.as_str()))
                .filter(claimable(at))
                .filter(Expr::col(segment::Column::Models).bit_and(mask).ne(0))
                .order_by_asc(segment::Column::Idx)
                .limit(1)
                .lock_with_behavior(LockType::Update, LockBehavior::SkipLocked)
                .one(&tx)
                .await?;
            let Some(row) = found else { return roll_back(None) };
            let Some(owner) = batch::Entity::find_by_id(id.as_str()).one(&tx).await? else { return roll_back(None) };
            if convert::status(&owner.status)?.is_terminal() {
                return roll_back(None);
            }
            // Read before anything is written: a lease on a row that can't be read would expire and be taken again for
            // ever.
            let claimed = ClaimedSegment {
                segment: SegmentRef { batch: id.clone(), index: SegmentIndex(row.idx) },
                epoch: Epoch(row.epoch + 1),
                span: span(&row),
                object_key: owner.input_object_key,
                owner: owner.owner.into(),
                endpoint: owner.endpoint.parse().map_err(|_| StoreError::Corrupt("an unknown endpoint".into()))?,
                models: convert::json("model list", &owner.models)?,
                priority: Priority::new(owner.priority).unwrap_or_default(),
                expires_at: Timestamp(owner.expires_at),
                ending: convert::ending(owner.ending.as_deref())?,
            };
            segment::Entity::update_many()
                .col_expr(segment::Column::State, Expr::val(LEASED))
                .col_expr(segment::Column::LeaseOwner, Expr::val(node.as_str()))
                .col_expr(segment::Column::LeaseExpiresAt, Expr::val(at.plus(lease).0))
                .col_expr(segment::Column::Epoch, Expr::col(segment::Column::Epoch).add(1))
                .filter(segment::Column::BatchId.eq(id.as_str()))
                .filter(segment::Column::Idx.eq(row.idx))
                .exec(&tx)
                .await?;
            commit(tx, Some(claimed))
        })
        .await
    }

    /// Renews the leases of the segments that a node runs, at once, and says which of them it still has, and what has become
    /// of their batches. Others that it has by its rows alone, because a claim's answer was lost or a run was given up, are
    /// left to run out: nobody works on them.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn renew_leases(
        &self,
        node: &NodeId,
        running: &[SegmentRef],
        lease: Duration,
    ) -> Result<Renewed, StoreError> {
        if running.is_empty() {
            return Ok(Renewed::default());
        }
        let keys = Expr::tuple([Expr::col(segment::Column::BatchId), Expr::col(segment::Column::Idx)])
            .in_tuples(running.iter().map(|segment| (segment.batch.as_str().to_owned(), segment.index.0)));
        let held = &Condition::all()
            .add(segment::Column::LeaseOwner.eq(node.as_str()))
            .add(segment::Column::State.eq(LEASED))
            .add(keys);
        self.write(|tx| async move {
            let at = now(&tx).await?;
            segment::Entity::update_many()
                .col_expr(segment::Column::LeaseExpiresAt, Expr::val(at.plus(lease).0))
                .filter(held.clone())
                .exec(&tx)
                .await?;
            commit(tx, ())
        })
        .await?;
        let rows = segment::Entity::find().filter(held.clone()).all(self.read()).await?;
        let ids: Vec<String> = rows.iter().map(|row| row.batch_id.clone()).collect();
        let batches: std::collections::HashMap<String, (String, Option<String>)> = batch::Entity::find()
            .select_only()
            .columns([batch::Column::Id, batch::Column::Status, batch::Column::Ending])
            .filter(batch::Column::Id.is_in(ids))
            .into_tuple::<(String, String, Option<String>)>()
            .all(self.read())
            .await?
            .into_iter()
            .map(|(id, status, ending)| (id, (status, ending)))
            .collect();
        let mut held = Vec::with_capacity(rows.len());
        for row in rows {
            let (status, ending) = batches.get(&row.batch_id).cloned().unwrap_or_default();
            let id = row.batch_id.clone();
            held.push(HeldSegment {
                segment: SegmentRef { batch: BatchId::from_text(row.batch_id), index: SegmentIndex(row.idx) },
                epoch: Epoch(row.epoch),
                // The lease is renewed already: that must not be forgotten for a word that can't be read.
                ending: convert::readable("batch", &id, convert::ending(ending.as_deref())).flatten(),
                batch_ended: BatchStatus::from_text(&status).is_none_or(BatchStatus::is_terminal),
            });
        }
        Ok(Renewed { held })
    }

    /// Those of these batches whose remaining lines are not to run: how they are to end, and whether they have ended.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn endings(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, Option<Ending>, bool)>, StoreError> {
        let rows: Vec<(String, String, Option<String>)> = batch::Entity::find()
            .select_only()
            .columns([batch::Column::Id, batch::Column::Status, batch::Column::Ending])
            .filter(batch::Column::Id.is_in(ids.iter().map(BatchId::as_str)))
            .into_tuple()
            .all(self.read())
            .await?;
        let mut found = Vec::new();
        for (id, status, ending) in rows {
            let read = convert::ending(ending.as_deref())
                .and_then(|ending| Ok((ending, convert::status(&status)?.is_terminal())));
            let Some((ending, ended)) = convert::readable("batch", &id, read) else { continue };
            if ending.is_some() || ended {
                found.push((BatchId::from_text(id), ending, ended));
            }
        }
        Ok(found)
    }

    /// Takes back what the database's clock can't have meant: no lease ends later than `longest` from now. When the clock is
    /// set back, the leases of dead servers would last for as long as it was set back; those of living ones are renewed by
    /// them. Right at any time, and any number of nodes may do it. Returns how many leases were changed.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn mend_leases(&self, longest: Duration) -> Result<u64, StoreError> {
        self.write(|tx| async move {
            let latest = now(&tx).await?.plus(longest).0;
            let mended = segment::Entity::update_many()
                .col_expr(segment::Column::LeaseExpiresAt, Expr::val(latest))
                .filter(segment::Column::State.eq(LEASED))
                .filter(segment::Column::LeaseExpiresAt.gt(latest))
                .exec(&tx)
                .await?;
            commit(tx, mended.rows_affected)
        })
        .await
    }

    /// Releases a segment, to be claimed when a worker serves a model of `mask`. Does nothing if the lease is lost.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn release_segment(&self, of: &SegmentRef, epoch: Epoch, mask: i64) -> Result<(), StoreError> {
        self.write(|tx| async move {
            segment::Entity::update_many()
                .col_expr(segment::Column::State, Expr::val(QUEUED))
                .col_expr(segment::Column::LeaseOwner, Expr::val(Option::<String>::None))
                .col_expr(segment::Column::LeaseExpiresAt, Expr::val(Option::<i64>::None))
                .col_expr(segment::Column::Models, Expr::val(mask))
                .filter(fenced(of, epoch))
                .exec(&tx)
                .await?;
            commit(tx, ())
        })
        .await
    }

    /// Ends all leases. Only for a database without other nodes, where they are the dead predecessor's.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn release_all(&self) -> Result<u64, StoreError> {
        self.write(|tx| async move {
            let released = segment::Entity::update_many()
                .col_expr(segment::Column::State, Expr::val(QUEUED))
                .col_expr(segment::Column::LeaseOwner, Expr::val(Option::<String>::None))
                .col_expr(segment::Column::LeaseExpiresAt, Expr::val(Option::<i64>::None))
                .filter(segment::Column::State.eq(LEASED))
                .exec(&tx)
                .await?;
            commit(tx, released.rows_affected)
        })
        .await
    }

    /// At most `limit` of a batch's segments from `from` on, in order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn segments(
        &self,
        id: &BatchId,
        from: SegmentIndex,
        limit: u64,
    ) -> Result<Vec<SegmentRecord>, StoreError> {
        let rows = segment::Entity::find()
            .filter(segment::Column::BatchId.eq(id.as_str()))
            .filter(segment::Column::Idx.gte(from.0))
            .order_by_asc(segment::Column::Idx)
            .limit(limit)
            .all(self.read())
            .await?;
        Ok(rows.iter().map(record).collect())
    }

    /// One segment.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn segment(&self, of: &SegmentRef) -> Result<Option<SegmentRecord>, StoreError> {
        let row = segment::Entity::find_by_id((of.batch.as_str().to_owned(), of.index.0)).one(self.read()).await?;
        Ok(row.as_ref().map(record))
    }
}

fn candidate(row: &QueryResult) -> Result<Candidate, StoreError> {
    Ok(Candidate {
        id: BatchId::from_text(row.try_get::<String>("", "id")?),
        owner: row.try_get::<String>("", "owner")?.into(),
        priority: Priority::new(row.try_get("", "priority")?).unwrap_or_default(),
        expires_at: Timestamp(row.try_get("", "expires_at")?),
        models: convert::json("model list", &row.try_get::<String>("", "models")?)?,
        ending: convert::ending(row.try_get::<Option<String>>("", "ending")?.as_deref())?,
    })
}

/// The segment is queued, or its lease has expired.
fn claimable(at: Timestamp) -> Condition {
    let expired =
        segment::Column::State.eq(LEASED).and(Expr::col((segment::Entity, segment::Column::LeaseExpiresAt)).lt(at.0));
    Condition::any().add(segment::Column::State.eq(QUEUED)).add(expired)
}

/// Selects the segment if it is still leased under this epoch.
pub(super) fn fenced(of: &SegmentRef, epoch: Epoch) -> Condition {
    Condition::all()
        .add(segment::Column::BatchId.eq(of.batch.as_str()))
        .add(segment::Column::Idx.eq(of.index.0))
        .add(segment::Column::Epoch.eq(epoch.0))
        .add(segment::Column::State.eq(LEASED))
}

fn span(row: &segment::Model) -> SegmentSpan {
    SegmentSpan {
        index: SegmentIndex(row.idx),
        first_line: row.first_line,
        line_span: row.line_span,
        requests: row.requests,
        offset: row.byte_offset,
        length: row.byte_length,
        models: row.models,
        crc32c: convert::checksum(row.input_crc32c),
    }
}

fn record(row: &segment::Model) -> SegmentRecord {
    SegmentRecord {
        span: span(row),
        object_key: row.object_key.clone(),
        output_bytes: u64::try_from(row.output_bytes).unwrap_or(0),
        error_bytes: u64::try_from(row.error_bytes).unwrap_or(0),
        crc32c: convert::checksum(row.crc32c),
    }
}
