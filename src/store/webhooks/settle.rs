//! Records the outcomes of attempts, and ends attempts whose outcome will never be known.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder, QuerySelect,
    sea_query::{Expr, LockBehavior, LockType},
};

use super::{
    UNREADABLE_MICROS,
    claims::{ClaimShare, ClaimedDelivery, claim, delivery_of},
    dead_letters,
    groups::{self, Answer, Mine},
    is, outcome,
};
use crate::{
    domain::{
        DeliveryId, Timestamp,
        webhook::{AttemptError, AttemptResult, DeliveryState, Effect, ErrorKind, Input, WebhookEvent, apply},
    },
    store::{
        DatabaseTransaction, Store, StoreError,
        convert::readable,
        entity::{webhook_attempt, webhook_delivery},
        now,
        write::{commit, roll_back},
    },
};

/// Rows per transaction of the reaper.
const REAPED_AT_ONCE: u64 = 100;

/// The outcome of a claimed delivery.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// The delivery.
    pub id: DeliveryId,
    /// The claim's.
    pub lease: String,
    /// The claim's.
    pub attempt: i32,
    /// The result. `None`: nothing was sent, and the attempt does not count.
    pub result: Option<AttemptResult>,
    /// The wait before the next attempt, if there is one.
    pub wait: Duration,
}

/// The result of a settlement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    /// The delivery.
    pub id: DeliveryId,
    /// Its new state.
    pub now: SettledAs,
}

/// The state of a delivery after a settlement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettledAs {
    /// The receiver accepted it.
    Delivered,
    /// It waits for the next attempt, or to be claimed again.
    Pending,
    /// It is a dead letter.
    Dead,
    /// It is not needed any more.
    Cancelled,
    /// The lease was lost: nothing was written.
    LeaseLost,
}

/// The result of the reaper.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reaped {
    /// Deliveries whose sender has died, to be sent again.
    pub pending: u64,
    /// Such deliveries without attempts left.
    pub dead: u64,
    /// Progress deliveries that were too old.
    pub expired: u64,
}

/// The result of one transaction of the outbox.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    /// The results of the settlements, in their order.
    pub settled: Vec<Settled>,
    /// The claimed deliveries.
    pub claimed: Vec<ClaimedDelivery>,
}

impl Store {
    /// Records the outcomes of attempts in one transaction. Settlements with a lost lease have no effect.
    ///
    /// # Errors
    /// [`StoreError`]. Nothing is written then; the same call again is right.
    pub async fn settle_deliveries(&self, settlements: &[Settlement]) -> Result<Vec<Settled>, StoreError> {
        self.turn_deliveries(settlements, &[]).await.map(|turn| turn.settled)
    }

    /// [`Store::settle_deliveries`] and [`Store::claim_deliveries`] in one transaction: a commit costs the same for one row
    /// as for hundreds.
    ///
    /// # Errors
    /// [`StoreError`]. Nothing is written then; the same call again is right.
    pub async fn turn_deliveries(&self, settlements: &[Settlement], shares: &[ClaimShare]) -> Result<Turn, StoreError> {
        if settlements.is_empty() && shares.is_empty() {
            return Ok(Turn::default());
        }
        if let Some(turn) = self.try_turn(settlements, shares, Answer::Count).await? {
            return Ok(turn);
        }
        let turn = self.try_turn(settlements, shares, Answer::Ids).await?;
        turn.ok_or_else(|| StoreError::Corrupt("leases that neither hold nor are lost".into()))
    }

    /// None, with nothing written: some lease is lost, and `answer` does not say which.
    async fn try_turn(
        &self,
        settlements: &[Settlement],
        shares: &[ClaimShare],
        answer: Answer,
    ) -> Result<Option<Turn>, StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let Some(settled) = settle_all(&tx, settlements, at, answer).await? else { return roll_back(None) };
            let claimed = if shares.is_empty() { Vec::new() } else { claim(&tx, shares, at).await? };
            commit(tx, Some(Turn { settled, claimed }))
        })
        .await
    }

    /// Ends the leases of senders that are gone, and progress that nobody wants any more. `all`: every lease, not only those
    /// that have run out; only for a database that no other node has, at its start. `wait` is the wait after so many
    /// attempts.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn reap_deliveries(&self, all: bool, wait: impl Fn(i32) -> Duration) -> Result<Reaped, StoreError> {
        let mut reaped = Reaped { expired: self.expire_progress().await?, ..Reaped::default() };
        loop {
            let (some, last) = self.reap_some_deliveries(all, &wait).await?;
            reaped.pending += some.pending;
            reaped.dead += some.dead;
            if last {
                return Ok(reaped);
            }
        }
    }

    /// Returns what it found, and whether that was all.
    async fn reap_some_deliveries(
        &self,
        all: bool,
        wait: &impl Fn(i32) -> Duration,
    ) -> Result<(Reaped, bool), StoreError> {
        self.write(|tx| async move {
            let mut reaped = Reaped::default();
            let at = now(&tx).await?;
            let mut find = webhook_delivery::Entity::find()
                .filter(is(DeliveryState::Leased))
                .order_by_asc(webhook_delivery::Column::LeaseExpiresAt)
                .limit(REAPED_AT_ONCE)
                .lock_with_behavior(LockType::Update, LockBehavior::SkipLocked);
            if !all {
                find = find.filter(webhook_delivery::Column::LeaseExpiresAt.lt(at.0));
            }
            let rows = find.all(&tx).await?;
            let last = (rows.len() as u64) < REAPED_AT_ONCE;
            for row in rows {
                if readable("webhook delivery", &row.id, delivery_of(&row)).is_none() {
                    // Else it would be among the first of every round.
                    let until = at.0.saturating_add(UNREADABLE_MICROS);
                    webhook_delivery::Entity::update_many()
                        .col_expr(webhook_delivery::Column::LeaseExpiresAt, Expr::val(until))
                        .filter(webhook_delivery::Column::Id.eq(&row.id))
                        .exec(&tx)
                        .await?;
                    continue;
                }
                let attempts = row.attempts;
                match reap(&tx, row, wait(attempts), at).await? {
                    DeliveryState::Pending => reaped.pending += 1,
                    DeliveryState::Dead => reaped.dead += 1,
                    DeliveryState::Leased | DeliveryState::Delivered | DeliveryState::Cancelled => {}
                }
            }
            dead_letters::reap(&tx, all, at).await?;
            commit(tx, (reaped, last))
        })
        .await
    }

    async fn expire_progress(&self) -> Result<u64, StoreError> {
        let at = now(self.read()).await?;
        // Of these there is an index of its own.
        let old = &Condition::all()
            .add(is(DeliveryState::Pending))
            .add(webhook_delivery::Column::ExpiresAt.lte(at.0))
            .add(webhook_delivery::Column::Event.eq(WebhookEvent::Progress.as_str()));
        // Usually there is none, which is found out without a write transaction.
        let any: Option<String> = webhook_delivery::Entity::find()
            .select_only()
            .column(webhook_delivery::Column::Id)
            .filter(old.clone())
            .limit(1)
            .into_tuple()
            .one(self.read())
            .await?;
        if any.is_none() {
            return Ok(0);
        }
        self.write(|tx| async move {
            let expired = webhook_delivery::Entity::update_many()
                .col_expr(webhook_delivery::Column::State, Expr::val(DeliveryState::Cancelled.as_str()))
                .col_expr(webhook_delivery::Column::SettledAt, Expr::val(at.0))
                .filter(old.clone())
                .exec(&tx)
                .await?;
            commit(tx, expired.rows_affected)
        })
        .await
    }
}

/// Settles each delivery whose lease still holds. What was delivered or not sent is written by statements over all of them,
/// what failed one by one: a receiver that fails is soon only probed. None: as [`groups::deliver`].
async fn settle_all(
    tx: &DatabaseTransaction,
    settlements: &[Settlement],
    at: Timestamp,
    answer: Answer,
) -> Result<Option<Vec<Settled>>, StoreError> {
    let mut seen = HashSet::with_capacity(settlements.len());
    let mut after = vec![SettledAs::LeaseLost; settlements.len()];
    // Where each stands among the settlements, and the settlement.
    let (mut delivered, mut released, mut others) = (Group::default(), Group::default(), Group::default());
    for (place, one) in settlements.iter().enumerate() {
        // An id that is there twice was leased twice, and one of the leases is lost.
        match &one.result {
            _ if !seen.insert(one.id.as_str()) => others.push(place, one),
            Some(result) if result.succeeded() => delivered.push(place, one),
            Some(_) => others.push(place, one),
            None => released.push(place, one),
        }
    }
    if !delivered.of.is_empty() {
        let Some(mine) = groups::deliver(tx, &delivered.of, at, answer).await? else { return Ok(None) };
        delivered.note(&mine, SettledAs::Delivered, &mut after);
    }
    if !released.of.is_empty() {
        let Some(mine) = groups::release(tx, &released.of, answer).await? else { return Ok(None) };
        released.note(&mine, SettledAs::Pending, &mut after);
    }
    if !others.of.is_empty() {
        let rows = webhook_delivery::Entity::find()
            .filter(webhook_delivery::Column::Id.is_in(others.of.iter().map(|one| one.id.as_str())))
            .order_by_asc(webhook_delivery::Column::Id)
            .lock_exclusive()
            .all(tx)
            .await?;
        let mut rows: HashMap<String, webhook_delivery::Model> =
            rows.into_iter().map(|row| (row.id.clone(), row)).collect();
        for (place, one) in others.places.into_iter().zip(others.of) {
            let mine = rows.get(one.id.as_str()).is_some_and(|row| row.lease_token.as_deref() == Some(&one.lease));
            // Each lease settles once.
            if let Some(row) = mine.then(|| rows.remove(one.id.as_str())).flatten() {
                if readable("webhook delivery", one.id.as_str(), delivery_of(&row)).is_none() {
                    continue;
                }
                after[place] = settle(tx, row, one, at).await?;
            }
        }
    }
    let settled = settlements.iter().zip(after).map(|(one, now)| Settled { id: one.id.clone(), now });
    Ok(Some(settled.collect()))
}

/// Settlements that are written alike, and where each stands among all.
#[derive(Default)]
struct Group<'a> {
    places: Vec<usize>,
    of: Vec<&'a Settlement>,
}

impl<'a> Group<'a> {
    fn push(&mut self, place: usize, one: &'a Settlement) {
        self.places.push(place);
        self.of.push(one);
    }

    fn note(&self, mine: &Mine, now: SettledAs, after: &mut [SettledAs]) {
        for (place, _) in self.places.iter().zip(&self.of).filter(|(_, one)| mine.has(one)) {
            after[*place] = now;
        }
    }
}

/// Settles one locked delivery, of which the caller holds the lease.
async fn settle(
    tx: &DatabaseTransaction,
    row: webhook_delivery::Model,
    one: &Settlement,
    at: Timestamp,
) -> Result<SettledAs, StoreError> {
    let Some(result) = &one.result else {
        webhook_attempt::Entity::delete_by_id((row.id.clone(), 0, one.attempt)).exec(tx).await?;
        put(tx, row, Input::Released, None, Duration::ZERO, at).await?;
        return Ok(SettledAs::Pending);
    };
    finish_attempt(tx, &one.id, 0, one.attempt, result, at).await?;
    let error = result.error.as_ref();
    let input = match error {
        None => Input::Succeeded,
        Some(error) if error.kind.is_for_good() => Input::FailedForGood,
        Some(_) => Input::Failed,
    };
    let row = webhook_delivery::Model { http_status: result.http_status.map(i32::from), ..row };
    Ok(match put(tx, row, input, error, one.wait, at).await? {
        DeliveryState::Pending | DeliveryState::Leased => SettledAs::Pending,
        DeliveryState::Delivered => SettledAs::Delivered,
        DeliveryState::Dead => SettledAs::Dead,
        DeliveryState::Cancelled => SettledAs::Cancelled,
    })
}

async fn reap(
    tx: &DatabaseTransaction,
    row: webhook_delivery::Model,
    wait: Duration,
    at: Timestamp,
) -> Result<DeliveryState, StoreError> {
    let error = AttemptError {
        kind: ErrorKind::Unknown,
        message: "the server stopped during the attempt; the receiver may have it".into(),
    };
    webhook_attempt::Entity::update_many()
        .col_expr(webhook_attempt::Column::Outcome, Expr::val(outcome::UNKNOWN))
        .col_expr(webhook_attempt::Column::FinishedAt, Expr::val(at.0))
        .col_expr(webhook_attempt::Column::ErrorKind, Expr::val(error.kind.as_str()))
        .col_expr(webhook_attempt::Column::ErrorMessage, Expr::val(error.message.as_str()))
        .filter(webhook_attempt::Column::DeliveryId.eq(&row.id))
        .filter(webhook_attempt::Column::Generation.eq(0))
        .filter(webhook_attempt::Column::Outcome.eq(outcome::STARTED))
        .exec(tx)
        .await?;
    put(tx, row, Input::LeaseExpired, Some(&error), wait, at).await
}

/// Applies an input to a leased delivery, and creates its dead letter if it becomes one.
async fn put(
    tx: &DatabaseTransaction,
    mut row: webhook_delivery::Model,
    input: Input,
    error: Option<&AttemptError>,
    wait: Duration,
    at: Timestamp,
) -> Result<DeliveryState, StoreError> {
    let step = apply(delivery_of(&row)?, input).map_err(|refused| StoreError::Corrupt(refused.to_string()))?;
    row.state = step.state.as_str().to_owned();
    row.attempts = step.attempts;
    row.lease_token = None;
    row.lease_expires_at = None;
    row.error_message = error.map(|error| error.message.clone());
    match step.effect {
        Effect::Retry => {
            row.next_attempt_at = at.plus(wait).0;
            row.scheduled_at = Some(at.0);
        }
        Effect::None | Effect::DeadLetter => {}
    }
    if step.state != DeliveryState::Pending {
        row.settled_at = Some(at.0);
    }
    if let (Effect::DeadLetter, Some(error)) = (step.effect, error) {
        dead_letters::insert(tx, &row, error, at).await?;
    }
    row.into_active_model().reset_all().update(tx).await?;
    Ok(step.state)
}

/// Closes an attempt.
pub(super) async fn finish_attempt(
    tx: &DatabaseTransaction,
    id: &DeliveryId,
    generation: i32,
    attempt: i32,
    result: &AttemptResult,
    at: Timestamp,
) -> Result<(), StoreError> {
    let outcome = if result.succeeded() { outcome::SUCCEEDED } else { outcome::FAILED };
    let error = result.error.as_ref();
    webhook_attempt::Entity::update_many()
        .col_expr(webhook_attempt::Column::Outcome, Expr::val(outcome))
        .col_expr(webhook_attempt::Column::FinishedAt, Expr::val(at.0))
        .col_expr(webhook_attempt::Column::HttpStatus, Expr::val(result.http_status.map(i32::from)))
        .col_expr(webhook_attempt::Column::ErrorKind, Expr::val(error.map(|error| error.kind.as_str())))
        .col_expr(webhook_attempt::Column::ErrorMessage, Expr::val(error.map(|error| error.message.clone())))
        .col_expr(webhook_attempt::Column::ResponseExcerpt, Expr::val(result.response_excerpt.clone()))
        .filter(webhook_attempt::Column::DeliveryId.eq(id.as_str()))
        .filter(webhook_attempt::Column::Generation.eq(generation))
        .filter(webhook_attempt::Column::Attempt.eq(attempt))
        .exec(tx)
        .await?;
    Ok(())
}
