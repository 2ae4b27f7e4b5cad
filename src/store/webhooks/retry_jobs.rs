//! Jobs that retry many dead letters: durable, counted, and resumed by another node when their node dies.

use std::time::Duration;

use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, EntityTrait, IntoActiveModel, PaginatorTrait, QueryFilter, QueryOrder,
    QuerySelect,
    sea_query::{Expr, LockBehavior, LockType},
};
use uuid::Uuid;

use super::dead_letters::{DeadLetter, DeadLetterFilter};
use crate::{
    domain::{DeadLetterId, Owner, RetryJobId, Scope, Timestamp, webhook::AttemptOutcome},
    store::{
        Store, StoreError,
        convert::{self, to_json},
        entity::{webhook_attempt, webhook_dead_letter, webhook_retry_job},
        now,
        pages::readable_page,
        scoped::within,
        write::{commit, roll_back},
    },
};

/// The states of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumString, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum RetryJobState {
    /// It has not handled all its dead letters yet.
    Running,
    /// It has handled all its dead letters.
    Done,
    /// It was cancelled.
    Cancelled,
}

impl RetryJobState {
    /// Its name, as stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryJob {
    pub id: RetryJobId,
    pub owner: Owner,
    pub filter: DeadLetterFilter,
    pub state: RetryJobState,
    /// The number of dead letters that matched when it was created.
    pub matched: i64,
    /// Dead letters that it has delivered.
    pub succeeded: i64,
    /// Dead letters that it has sent without success.
    pub failed: i64,
    /// Dead letters that it has not sent: deleted, delivered or being retried.
    pub skipped: i64,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
}

/// A job that this node runs.
#[derive(Clone, Debug)]
pub struct ClaimedJob {
    pub job: RetryJob,
    /// The last dead letter handled.
    pub position: DeadLetterId,
    /// The newest dead letter of the job.
    pub last: DeadLetterId,
    /// The fencing token.
    pub lease: String,
}

impl Store {
    /// Creates a job for the dead letters that match now and have not been delivered since.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn create_retry_job(&self, owner: &Owner, filter: DeadLetterFilter) -> Result<RetryJob, StoreError> {
        let filter = DeadLetterFilter { delivered: Some(false), ..filter };
        let matched = self.count_dead_letters(&filter).await?;
        let newest = self.dead_letters(&filter, None, 1).await?.pop();
        let done = newest.is_none();
        let state = if done { RetryJobState::Done } else { RetryJobState::Running };
        let (filter, last) = (&to_json(&filter)?, &newest.map_or(String::new(), |newest| newest.id.into_string()));
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let row = webhook_retry_job::Model {
                id: RetryJobId::generate().into_string(),
                owner: owner.as_str().to_owned(),
                filter: filter.clone(),
                state: state.as_str().to_owned(),
                position: String::new(),
                last: last.clone(),
                matched,
                succeeded: 0,
                failed: 0,
                skipped: 0,
                lease_token: None,
                lease_expires_at: None,
                created_at: at.0,
                finished_at: done.then_some(at.0),
            };
            webhook_retry_job::Entity::insert(row.clone().into_active_model()).exec_without_returning(&tx).await?;
            commit(tx, row.try_into()?)
        })
        .await
    }

    /// One job.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn retry_job(&self, id: &RetryJobId, scope: &Scope) -> Result<Option<RetryJob>, StoreError> {
        let find = within(webhook_retry_job::Entity::find_by_id(id.as_str()), webhook_retry_job::Column::Owner, scope);
        find.one(self.read()).await?.map(RetryJob::try_from).transpose()
    }

    /// Jobs, newest first, those after `after` in that order, at most `limit`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn retry_jobs(
        &self,
        scope: &Scope,
        after: Option<&RetryJobId>,
        limit: u64,
    ) -> Result<Vec<RetryJob>, StoreError> {
        let find = webhook_retry_job::Entity::find().order_by_desc(webhook_retry_job::Column::Id).limit(limit);
        let mut find = within(find, webhook_retry_job::Column::Owner, scope);
        if let Some(after) = after {
            find = find.filter(webhook_retry_job::Column::Id.lt(after.as_str()));
        }
        find.all(self.read()).await?.into_iter().map(RetryJob::try_from).collect()
    }

    /// Cancels a job; its sends in flight finish. `None` if there is no such job.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn cancel_retry_job(&self, id: &RetryJobId, scope: &Scope) -> Result<Option<RetryJob>, StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let stop = webhook_retry_job::Entity::update_many()
                .col_expr(webhook_retry_job::Column::State, Expr::val(RetryJobState::Cancelled.as_str()))
                .col_expr(webhook_retry_job::Column::FinishedAt, Expr::val(at.0))
                .filter(webhook_retry_job::Column::Id.eq(id.as_str()))
                .filter(webhook_retry_job::Column::State.eq(RetryJobState::Running.as_str()));
            within(stop, webhook_retry_job::Column::Owner, scope).exec(&tx).await?;
            commit(tx, ())
        })
        .await?;
        self.retry_job(id, scope).await
    }

    /// Claims the oldest job that no node runs, except these owners'.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn claim_retry_job(&self, lease: Duration, but: &[Owner]) -> Result<Option<ClaimedJob>, StoreError> {
        // One that ends later than a whole lease from now was taken before the database's clock was set back.
        let free = |at: Timestamp| {
            Condition::any()
                .add(webhook_retry_job::Column::LeaseExpiresAt.is_null())
                .add(webhook_retry_job::Column::LeaseExpiresAt.lt(at.0))
                .add(webhook_retry_job::Column::LeaseExpiresAt.gt(at.plus(lease * 2).0))
        };
        let open = |at: Timestamp| {
            webhook_retry_job::Entity::find()
                .filter(webhook_retry_job::Column::State.eq(RetryJobState::Running.as_str()))
                .filter(free(at))
                .filter(webhook_retry_job::Column::Owner.is_not_in(but.iter().map(Owner::as_str)))
                .order_by_asc(webhook_retry_job::Column::Id)
                .limit(1)
        };
        // Usually there is none, which is found out without a write transaction.
        let at = now(self.read()).await?;
        if open(at).one(self.read()).await?.is_none() {
            return Ok(None);
        }
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let found = open(at).lock_with_behavior(LockType::Update, LockBehavior::SkipLocked).one(&tx).await?;
            let Some(mut row) = found else { return roll_back(None) };
            let token = Uuid::new_v4().simple().to_string();
            row.lease_token = Some(token.clone());
            row.lease_expires_at = Some(at.plus(lease).0);
            let row = row.into_active_model().reset_all().update(&tx).await?;
            let (position, last) = (DeadLetterId::from_text(&row.position), DeadLetterId::from_text(&row.last));
            // One that can't be read is leased all the same, so that it is not the first again at once.
            let job = RetryJob::try_from(row).map(|job| ClaimedJob { job, position, last, lease: token });
            commit(tx, Some(job))
        })
        .await?
        .transpose()
    }

    /// The next dead letters of a job, oldest first, at most `limit`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn retry_job_page(&self, of: &ClaimedJob, limit: u64) -> Result<Vec<DeadLetter>, StoreError> {
        let rows = |after: Option<String>| {
            let find = webhook_dead_letter::Entity::find()
                .filter(of.job.filter.condition())
                .filter(webhook_dead_letter::Column::Id.gt(after.unwrap_or_default()))
                .filter(webhook_dead_letter::Column::Id.lte(of.last.as_str()))
                .order_by_asc(webhook_dead_letter::Column::Id)
                .limit(limit);
            async move { Ok(find.all(self.read()).await?) }
        };
        let after = Some(of.position.as_str().to_owned());
        readable_page("dead letter", limit, after, rows, |row: &webhook_dead_letter::Model| &row.id).await
    }

    /// Records a job's position and the outcomes of the attempts with its id, adds `skipped`, and renews the lease;
    /// `done`: there are no more. False if the job is no longer this node's, or was cancelled.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn advance_retry_job(
        &self,
        of: &ClaimedJob,
        skipped: i64,
        done: bool,
        lease: Duration,
    ) -> Result<bool, StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let found = webhook_retry_job::Entity::find_by_id(of.job.id.as_str())
                .filter(webhook_retry_job::Column::LeaseToken.eq(&of.lease))
                .lock_exclusive()
                .one(&tx)
                .await?;
            let Some(mut row) = found else { return roll_back(false) };
            // Counted from the attempts, so that what a crash interrupted is neither lost nor counted twice.
            let ended = |outcomes: Vec<AttemptOutcome>| {
                webhook_attempt::Entity::find()
                    .filter(webhook_attempt::Column::RequestId.eq(of.job.id.as_str()))
                    .filter(webhook_attempt::Column::Outcome.is_in(outcomes.into_iter().map(AttemptOutcome::as_str)))
            };
            let count = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
            row.succeeded = count(ended(vec![AttemptOutcome::Succeeded]).count(&tx).await?);
            row.failed = count(ended(vec![AttemptOutcome::Failed, AttemptOutcome::Unknown]).count(&tx).await?);
            row.skipped += skipped;
            of.position.as_str().clone_into(&mut row.position);
            row.lease_expires_at = Some(at.plus(lease).0);
            let running = row.state == RetryJobState::Running.as_str();
            if running && done {
                RetryJobState::Done.as_str().clone_into(&mut row.state);
                row.finished_at = Some(at.0);
            }
            row.into_active_model().reset_all().update(&tx).await?;
            commit(tx, running)
        })
        .await
    }

    /// Releases a job for other nodes.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn release_retry_job(&self, of: &ClaimedJob) -> Result<(), StoreError> {
        self.write(|tx| async move {
            webhook_retry_job::Entity::update_many()
                .col_expr(webhook_retry_job::Column::LeaseToken, Expr::val(Option::<String>::None))
                .col_expr(webhook_retry_job::Column::LeaseExpiresAt, Expr::val(Option::<i64>::None))
                .filter(webhook_retry_job::Column::Id.eq(of.job.id.as_str()))
                .filter(webhook_retry_job::Column::LeaseToken.eq(&of.lease))
                .exec(&tx)
                .await?;
            commit(tx, ())
        })
        .await
    }
}

impl TryFrom<webhook_retry_job::Model> for RetryJob {
    type Error = StoreError;

    fn try_from(row: webhook_retry_job::Model) -> Result<Self, StoreError> {
        Ok(Self {
            state: convert::name("job state", &row.state)?,
            id: RetryJobId::from_text(row.id),
            owner: row.owner.into(),
            filter: convert::json("dead letter filter", &row.filter)?,
            matched: row.matched,
            succeeded: row.succeeded,
            failed: row.failed,
            skipped: row.skipped,
            created_at: Timestamp(row.created_at),
            finished_at: row.finished_at.map(Timestamp),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::RetryJobState;

    /// Databases have them: a variant may be renamed, its name may not.
    #[test]
    fn stored_names_stay_as_they_are() {
        for (state, name) in [
            (RetryJobState::Running, "running"),
            (RetryJobState::Done, "done"),
            (RetryJobState::Cancelled, "cancelled"),
        ] {
            assert_eq!((state.as_str(), name.parse()), (name, Ok(state)));
        }
    }
}
