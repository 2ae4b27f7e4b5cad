//! The steps of deliveries: [`apply`] decides each, and the statement here writes what it decided. Nothing else changes
//! a delivery's state or counts its attempts.
//!
//! A statement writes any number of rows. They go in as one JSON parameter, an array of arrays: `v` is the table of
//! them, and `v.value ->> n` the nth value of a row (text on PostgreSQL, so numbers are cast).

use std::time::Duration;

use sea_orm::{ConnectionTrait, DatabaseBackend, Statement};
use serde::Serialize;

use super::{event_of, outcome, state_of, undeliverable};
use crate::{
    domain::{
        Timestamp,
        webhook::{AttemptError, AttemptResult, Delivery, DeliveryState, Effect, Input, Step, apply},
    },
    store::{DatabaseTransaction, StoreError, convert::to_json, entity::webhook_delivery},
};

/// A delivery that the transaction has locked, as it is to be.
pub(super) struct Change {
    /// The state and the lease that it was found with; it is written only if it still has them.
    found: (String, Option<String>),
    pub(super) row: webhook_delivery::Model,
    step: Step,
    error: Option<AttemptError>,
}

impl Change {
    /// What `input` makes of a delivery.
    pub(super) fn new(mut row: webhook_delivery::Model, input: Input, at: Timestamp) -> Result<Self, StoreError> {
        let of = Delivery {
            state: state_of(&row.state)?,
            attempts: row.attempts,
            max_attempts: row.max_attempts,
            disposable: event_of(&row.event)?.is_disposable(),
        };
        let step = apply(of, input).map_err(|refused| StoreError::Corrupt(refused.to_string()))?;
        let found = (std::mem::replace(&mut row.state, step.state.as_str().to_owned()), row.lease_token.take());
        row.attempts = step.attempts;
        row.lease_expires_at = None;
        row.settled_at = step.state.is_settled().then_some(at.0);
        Ok(Self { found, row, step, error: None })
    }

    /// The state that it is to have.
    pub(super) fn state(&self) -> DeliveryState {
        self.step.state
    }

    /// With this lease.
    pub(super) fn leased(mut self, lease: &str, until: i64) -> Self {
        self.row.lease_token = Some(lease.to_owned());
        self.row.lease_expires_at = Some(until);
        self
    }

    /// After an attempt with this outcome. The next one, if there is one, is due after `wait`.
    pub(super) fn after(mut self, error: Option<&AttemptError>, wait: Duration, at: Timestamp) -> Self {
        self.row.error_message = error.map(|error| error.message.clone());
        self.error = error.cloned();
        if self.step.effect == Effect::Retry {
            self.row.next_attempt_at = at.plus(wait).0;
            self.row.scheduled_at = Some(at.0);
        }
        self
    }
}

/// Writes changes, with the dead letters that they make.
pub(super) async fn write(tx: &DatabaseTransaction, changes: &[Change], at: Timestamp) -> Result<(), StoreError> {
    if changes.is_empty() {
        return Ok(());
    }
    let values = changes.iter().map(|Change { found: (state, lease), row, .. }| {
        let due = (row.next_attempt_at, row.scheduled_at);
        let leased = (&row.lease_token, row.lease_expires_at);
        (
            &row.id,
            state,
            lease,
            &row.state,
            row.attempts,
            due.0,
            due.1,
            leased.0,
            leased.1,
            &row.error_message,
            row.settled_at,
        )
    });
    let sql = format!(
        "UPDATE webhook_deliveries AS d SET state = v.value ->> 3, attempts = CAST(v.value ->> 4 AS INTEGER), \
         next_attempt_at = CAST(v.value ->> 5 AS BIGINT), scheduled_at = CAST(v.value ->> 6 AS BIGINT), \
         lease_token = v.value ->> 7, lease_expires_at = CAST(v.value ->> 8 AS BIGINT), \
         error_message = v.value ->> 9, settled_at = CAST(v.value ->> 10 AS BIGINT) FROM {} \
         WHERE d.id = (v.value ->> 0) AND d.state = (v.value ->> 1) \
         AND d.lease_token IS NOT DISTINCT FROM (v.value ->> 2)",
        rows(tx)
    );
    let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, [json(values)?.into()]);
    let written = tx.execute_raw(statement).await?.rows_affected();
    if written != changes.len() as u64 {
        return Err(StoreError::Corrupt(format!("{written} of {} locked deliveries as they were", changes.len())));
    }
    for Change { row, step, error, .. } in changes {
        if let (Effect::DeadLetter, Some(error)) = (step.effect, error) {
            undeliverable::insert(tx, row, error, at).await?;
        }
    }
    Ok(())
}

/// An attempt that has ended: the delivery's id, the generation, the number, the result.
pub(super) type Ended<'a> = (&'a str, i32, i32, &'a AttemptResult);

/// Closes attempts.
pub(super) async fn end_attempts(
    tx: &DatabaseTransaction,
    ended: &[Ended<'_>],
    at: Timestamp,
) -> Result<(), StoreError> {
    if ended.is_empty() {
        return Ok(());
    }
    let values = ended.iter().map(|(id, generation, attempt, result)| {
        let error = result.error.as_ref();
        let (kind, message) = (error.map(|error| error.kind.as_str()), error.map(|error| &error.message));
        (id, generation, attempt, outcome::of(result), result.http_status, kind, message, &result.response_excerpt)
    });
    let sql = format!(
        "UPDATE webhook_attempts AS a SET outcome = v.value ->> 3, http_status = CAST(v.value ->> 4 AS INTEGER), \
         error_kind = v.value ->> 5, error_message = v.value ->> 6, response_excerpt = v.value ->> 7, \
         finished_at = $2 FROM {} WHERE a.delivery_id = (v.value ->> 0) \
         AND a.generation = CAST(v.value ->> 1 AS INTEGER) AND a.attempt = CAST(v.value ->> 2 AS INTEGER)",
        rows(tx)
    );
    let values = [json(values)?.into(), at.0.into()];
    tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
    Ok(())
}

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
