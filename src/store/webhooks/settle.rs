//! Records the outcomes of attempts, and ends attempts whose outcome will never be known.

use std::{collections::HashMap, time::Duration};

use sea_orm::{
    ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect,
    sea_query::{Expr, ExprTrait, LockBehavior, LockType},
};

use super::{
    UNREADABLE_MICROS, dead_letters, is,
    steps::{self, Change},
};
use crate::{
    domain::{
        DeliveryId, Timestamp,
        webhook::{AttemptResult, DeliveryState, DeliveryTrigger, ErrorKind, WebhookEvent},
    },
    store::{
        DatabaseTransaction, Store, StoreError,
        convert::readable,
        entity::{webhook_attempt, webhook_delivery},
        now,
        write::commit,
    },
};

/// Rows per transaction of the reaper.
const REAPED_AT_ONCE: u64 = 100;

/// The outcome of a claimed delivery.
#[derive(Clone, Debug)]
pub struct Settlement {
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
    /// Whether there may be more, for the next call.
    pub more: bool,
}

impl Store {
    /// Records the outcomes of attempts in one transaction. Settlements with a lost lease have no effect.
    ///
    /// # Errors
    /// [`StoreError`]. Nothing is written then; the same call again is right.
    pub async fn settle_deliveries(&self, settlements: &[Settlement]) -> Result<Vec<Settled>, StoreError> {
        if settlements.is_empty() {
            return Ok(Vec::new());
        }
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let settled = settle(&tx, settlements, at).await?;
            commit(tx, settled)
        })
        .await
    }

    /// Ends some leases of senders that are gone, and cancels some progress that is too old. `all`: every lease, not only
    /// those that have expired; only for a database that no other node has, at its start. `wait` gives the wait after a
    /// number of attempts.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn reap_deliveries(&self, all: bool, wait: impl Fn(i32) -> Duration) -> Result<Reaped, StoreError> {
        let wait = &wait;
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let mut reaped = reap(&tx, all, wait, at).await?;
            reaped.expired = expire_progress(&tx, at).await?;
            let retries = dead_letters::reap(&tx, all, at, REAPED_AT_ONCE).await?;
            reaped.more |= reaped.expired == REAPED_AT_ONCE || retries == REAPED_AT_ONCE;
            commit(tx, reaped)
        })
        .await
    }
}

/// Settles each delivery whose lease still holds.
async fn settle(
    tx: &DatabaseTransaction,
    settlements: &[Settlement],
    at: Timestamp,
) -> Result<Vec<Settled>, StoreError> {
    let rows = webhook_delivery::Entity::find()
        .filter(webhook_delivery::Column::Id.is_in(settlements.iter().map(|one| one.id.as_str())))
        .order_by_asc(webhook_delivery::Column::Id)
        .lock_exclusive()
        .all(tx)
        .await?;
    let mut rows: HashMap<String, webhook_delivery::Model> =
        rows.into_iter().map(|row| (row.id.clone(), row)).collect();
    let (mut settled, mut changes) = (Vec::with_capacity(settlements.len()), Vec::with_capacity(settlements.len()));
    let (mut ended, mut unsent) = (Vec::with_capacity(settlements.len()), Vec::new());
    for one in settlements {
        let mine = rows.get(one.id.as_str()).is_some_and(|row| row.lease_token.as_deref() == Some(&one.lease));
        // Each lease settles once.
        let row = mine.then(|| rows.remove(one.id.as_str())).flatten();
        let change = row.and_then(|row| {
            readable(
                "webhook delivery",
                one.id.as_str(),
                Change::new(row, DeliveryTrigger::of(one.result.as_ref()), at),
            )
        });
        let Some(mut change) = change else {
            settled.push(Settled { id: one.id.clone(), now: SettledAs::LeaseLost });
            continue;
        };
        match &one.result {
            Some(result) => {
                change = change.after(result.error.as_ref(), one.wait, at);
                ended.push((one.id.as_str(), 0, one.attempt, result));
            }
            None => unsent.push((one.id.as_str().to_owned(), one.attempt)),
        }
        settled.push(Settled { id: one.id.clone(), now: SettledAs::of(change.state()) });
        changes.push(change);
    }
    steps::write(tx, &changes, at).await?;
    steps::end_attempts(tx, &ended, at).await?;
    if !unsent.is_empty() {
        use webhook_attempt::Column;
        let attempts = Expr::tuple([Expr::col(Column::DeliveryId), Expr::col(Column::Attempt)]).in_tuples(unsent);
        let these = webhook_attempt::Entity::delete_many().filter(Column::Generation.eq(0)).filter(attempts);
        these.exec(tx).await?;
    }
    Ok(settled)
}

impl SettledAs {
    fn of(state: DeliveryState) -> Self {
        match state {
            DeliveryState::Pending | DeliveryState::Leased => Self::Pending,
            DeliveryState::Delivered => Self::Delivered,
            DeliveryState::Dead => Self::Dead,
            DeliveryState::Cancelled => Self::Cancelled,
        }
    }
}

/// Ends leases.
async fn reap(
    tx: &DatabaseTransaction,
    all: bool,
    wait: impl Fn(i32) -> Duration,
    at: Timestamp,
) -> Result<Reaped, StoreError> {
    let mut find = webhook_delivery::Entity::find()
        .filter(is(DeliveryState::Leased))
        .order_by_asc(webhook_delivery::Column::LeaseExpiresAt)
        .limit(REAPED_AT_ONCE)
        .lock_with_behavior(LockType::Update, LockBehavior::SkipLocked);
    if !all {
        find = find.filter(webhook_delivery::Column::LeaseExpiresAt.lt(at.0));
    }
    let rows = find.all(tx).await?;
    let is_full = rows.len() as u64 == REAPED_AT_ONCE;
    let lost =
        AttemptResult::failed(ErrorKind::Unknown, "the server stopped during the attempt; the receiver may have it");
    let (mut reaped, mut changes) = (Reaped::default(), Vec::with_capacity(rows.len()));
    for row in rows {
        let (id, attempts) = (row.id.clone(), row.attempts);
        let Some(change) = readable("webhook delivery", &id, Change::new(row, DeliveryTrigger::LeaseExpired, at))
        else {
            // Otherwise it would be among the first of every call.
            webhook_delivery::Entity::update_many()
                .col_expr(webhook_delivery::Column::LeaseExpiresAt, Expr::val(at.0.saturating_add(UNREADABLE_MICROS)))
                .filter(webhook_delivery::Column::Id.eq(&id))
                .exec(tx)
                .await?;
            continue;
        };
        match change.state() {
            DeliveryState::Pending => reaped.pending += 1,
            DeliveryState::Dead => reaped.dead += 1,
            DeliveryState::Leased | DeliveryState::Delivered | DeliveryState::Cancelled => {}
        }
        changes.push(change.after(lost.error.as_ref(), wait(attempts), at));
    }
    steps::write(tx, &changes, at).await?;
    let ended: Vec<_> = changes.iter().map(|one| (one.row.id.as_str(), 0, one.row.attempts, &lost)).collect();
    steps::end_attempts(tx, &ended, at).await?;
    // If all leases are to end, those that can't be read are found in every call, after all others.
    reaped.more = is_full && !(all && changes.is_empty());
    Ok(reaped)
}

/// Cancels progress that is too old. Returns how many.
async fn expire_progress(tx: &DatabaseTransaction, at: Timestamp) -> Result<u64, StoreError> {
    let old = webhook_delivery::Entity::find()
        .filter(is(DeliveryState::Pending))
        .filter(webhook_delivery::Column::ExpiresAt.lte(at.0))
        .filter(webhook_delivery::Column::Event.eq(WebhookEvent::Progress.as_str()))
        .limit(REAPED_AT_ONCE)
        .lock_with_behavior(LockType::Update, LockBehavior::SkipLocked);
    let rows = old.all(tx).await?;
    let count = rows.len() as u64;
    let changes =
        rows.into_iter().map(|row| Change::new(row, DeliveryTrigger::Superseded, at)).collect::<Result<Vec<_>, _>>()?;
    steps::write(tx, &changes, at).await?;
    Ok(count)
}
