//! The steps of deliveries: [`apply`] decides each, and the statement here writes what it decided. Nothing else changes
//! a delivery's state or counts its attempts.
//!
//! A statement writes any number of rows. They go in as one JSON parameter, an array of arrays: `v` is the table of
//! them, and `v.value ->> n` the nth value of a row (text on PostgreSQL, so numbers are cast).

use std::time::Duration;

use sea_orm::{ConnectionTrait, DatabaseBackend, EntityTrait, IntoActiveModel, Statement};
use serde::Serialize;

use crate::{
    domain::{
        DeadLetterId, Timestamp,
        webhook::{
            AttemptError, AttemptOutcome, AttemptResult, Delivery, DeliveryState, DeliveryStep, DeliveryTrigger,
            Effect, WebhookEvent, apply,
        },
    },
    store::{
        DatabaseTransaction, StoreError, convert,
        entity::{webhook_dead_letter, webhook_delivery},
    },
};

/// A delivery that the transaction has locked, as it is to be.
pub(super) struct Change {
    /// The state and the lease that it was found with; it is written only if it still has them.
    found: (String, Option<String>),
    pub(super) row: webhook_delivery::Model,
    step: DeliveryStep,
    error: Option<AttemptError>,
}

impl Change {
    /// What `input` makes of a delivery.
    pub(super) fn new(
        mut row: webhook_delivery::Model,
        input: DeliveryTrigger,
        at: Timestamp,
    ) -> Result<Self, StoreError> {
        let of = Delivery {
            state: convert::name("delivery state", &row.state)?,
            attempts: row.attempts,
            max_attempts: row.max_attempts,
            disposable: convert::name::<WebhookEvent>("webhook event", &row.event)?.is_disposable(),
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
    for change in changes {
        bury(tx, change, at).await?;
    }
    Ok(())
}

/// Creates the dead letter of a delivery, if this change makes one of it.
pub(super) async fn bury(tx: &DatabaseTransaction, change: &Change, at: Timestamp) -> Result<(), StoreError> {
    let Change { row: of, step: DeliveryStep { effect: Effect::DeadLetter, .. }, error: Some(error), .. } = change
    else {
        return Ok(());
    };
    let host = url::Url::parse(&of.url).ok().and_then(|url| url.host_str().map(str::to_owned)).unwrap_or_default();
    let row = webhook_dead_letter::Model {
        id: DeadLetterId::generate().into_string(),
        owner: of.owner.clone(),
        batch_id: of.batch_id.clone(),
        delivery_id: of.id.clone(),
        endpoint_id: of.endpoint_id.clone(),
        webhook_url: of.url.clone(),
        host,
        event: of.event.clone(),
        payload: of.body.clone(),
        error_kind: error.kind.as_str().to_owned(),
        error_message: error.message.clone(),
        attempts: of.attempts,
        last_attempt_at: at.0,
        created_at: at.0,
        retried_at: None,
        retry_success: false,
        retry_count: 0,
        lease_token: None,
        lease_expires_at: None,
    };
    webhook_dead_letter::Entity::insert(row.into_active_model()).exec_without_returning(tx).await?;
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
        (
            id,
            generation,
            attempt,
            AttemptOutcome::of(result).as_str(),
            result.http_status,
            kind,
            message,
            &result.response_excerpt,
        )
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

/// The first parameter of such a statement.
pub(super) fn json<R: Serialize>(rows: impl Iterator<Item = R>) -> Result<String, StoreError> {
    convert::to_json(&rows.collect::<Vec<_>>())
}
