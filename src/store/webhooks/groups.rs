//! Statements over many deliveries at once. The rows go in as one JSON parameter, an array of arrays, so that the text is the
//! same for any number of them, and each database prepares it once.
//!
//! `v` is the table of them and `v.value ->> n` the nth value of a row: text on PostgreSQL, so numbers are cast.

use std::collections::HashSet;

use sea_orm::{ConnectionTrait, DatabaseBackend, Statement};
use serde::Serialize;

use super::{outcome, settle::Settlement};
use crate::{
    domain::Timestamp,
    store::{DatabaseTransaction, StoreError, convert::to_json},
};

/// The table of a statement's first parameter.
pub(super) fn rows<C: ConnectionTrait>(connection: &C) -> &'static str {
    match connection.get_database_backend() {
        DatabaseBackend::Sqlite => "json_each($1) AS v",
        _ => "json_array_elements($1::json) AS v(value)",
    }
}

/// That parameter.
pub(super) fn json<R: Serialize>(rows: impl Iterator<Item = R>) -> Result<String, StoreError> {
    to_json(&rows.collect::<Vec<_>>())
}

/// The deliveries whose lease still held.
pub(super) enum Mine {
    /// All.
    All,
    /// These ids.
    These(HashSet<String>),
}

impl Mine {
    pub(super) fn has(&self, one: &Settlement) -> bool {
        match self {
            Self::All => true,
            Self::These(ids) => ids.contains(one.id.as_str()),
        }
    }
}

/// The result wanted of a statement over leases.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// The number of rows changed. Returning ids costs about as much as the change itself, and almost always all rows
    /// are changed.
    Count,
    /// The ids.
    Ids,
}

/// [`Input::Succeeded`](crate::domain::webhook::Input) for each whose lease still holds, with its attempt. The others are
/// unchanged. None: some lease does not hold, and only [`Answer::Ids`] would say which; the transaction is to be undone. No id
/// may be there twice.
pub(super) async fn deliver(
    tx: &DatabaseTransaction,
    of: &[&Settlement],
    at: Timestamp,
    answer: Answer,
) -> Result<Option<Mine>, StoreError> {
    let rows = rows(tx);
    let sql = format!(
        "UPDATE webhook_deliveries AS d SET state = 'delivered', settled_at = $2, lease_token = NULL, \
         lease_expires_at = NULL, error_message = NULL FROM {rows} \
         WHERE d.id = v.value ->> 0 AND d.lease_token = v.value ->> 1"
    );
    let Some(mine) = change(tx, sql, of, Some(at), answer).await? else { return Ok(None) };
    let attempts = of.iter().filter(|one| mine.has(one)).map(|one| {
        let result = one.result.as_ref();
        let status = result.and_then(|result| result.http_status);
        (one.id.as_str(), one.attempt, status, result.and_then(|result| result.response_excerpt.as_deref()))
    });
    let sql = format!(
        "UPDATE webhook_attempts AS a SET outcome = '{}', finished_at = $2, \
         http_status = CAST(v.value ->> 2 AS INTEGER), response_excerpt = v.value ->> 3 FROM {rows} \
         WHERE a.delivery_id = v.value ->> 0 AND a.generation = 0 AND a.attempt = CAST(v.value ->> 1 AS INTEGER)",
        outcome::SUCCEEDED
    );
    let values = [json(attempts)?.into(), at.0.into()];
    tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
    Ok(Some(mine))
}

/// [`Input::Released`](crate::domain::webhook::Input) for each whose lease still holds: its attempt was none. Returns as
/// [`deliver`] does.
pub(super) async fn release(
    tx: &DatabaseTransaction,
    of: &[&Settlement],
    answer: Answer,
) -> Result<Option<Mine>, StoreError> {
    let rows = rows(tx);
    let sql = format!(
        "UPDATE webhook_deliveries AS d SET state = 'pending', attempts = d.attempts - 1, lease_token = NULL, \
         lease_expires_at = NULL FROM {rows} \
         WHERE d.id = v.value ->> 0 AND d.lease_token = v.value ->> 1"
    );
    let Some(mine) = change(tx, sql, of, None, answer).await? else { return Ok(None) };
    let attempts = json(of.iter().filter(|one| mine.has(one)).map(|one| (one.id.as_str(), one.attempt)))?;
    let sql = format!(
        "DELETE FROM webhook_attempts WHERE generation = 0 AND (delivery_id, attempt) IN \
         (SELECT v.value ->> 0, CAST(v.value ->> 1 AS INTEGER) FROM {rows})"
    );
    tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, [attempts.into()])).await?;
    Ok(Some(mine))
}

/// Runs an UPDATE over the ids and leases of `of`, with `at` as its second parameter if it has one.
async fn change(
    tx: &DatabaseTransaction,
    sql: String,
    of: &[&Settlement],
    at: Option<Timestamp>,
    answer: Answer,
) -> Result<Option<Mine>, StoreError> {
    let sql = if answer == Answer::Ids { sql + " RETURNING id" } else { sql };
    let leases = json(of.iter().map(|one| (one.id.as_str(), &one.lease)))?;
    let values = [Some(leases.into()), at.map(|at| at.0.into())].into_iter().flatten();
    let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, values);
    if answer == Answer::Ids {
        return ids(tx, statement).await.map(Mine::These).map(Some);
    }
    let changed = tx.execute_raw(statement).await?.rows_affected();
    Ok((usize::try_from(changed) == Ok(of.len())).then_some(Mine::All))
}

async fn ids(tx: &DatabaseTransaction, statement: Statement) -> Result<HashSet<String>, StoreError> {
    let rows = tx.query_all_raw(statement).await?;
    rows.iter().map(|row| row.try_get("", "id").map_err(StoreError::from)).collect()
}
