//! Shortens leases and waits when the database's clock was set back: they would last longer by as much.

use std::time::Duration;

use futures::{FutureExt, future::BoxFuture};
use tokio::time::Instant;

use super::{Sweep, SweepError, Swept};
use crate::{
    delivery::Webhooks,
    domain::Clocks,
    store::{Store, StoreError},
};

const EVERY: Duration = Duration::from_secs(10);
/// A server that has just started does not know whether the clock was set back. Others may have longer leases than its own: up
/// to this many times as long, they are left alone.
const OTHERS_LEASES: u32 = 10;

/// Whether the database's clock may have been set back since the last call.
async fn may_be_back(store: &Store, clocks: &mut Clocks) -> Result<bool, StoreError> {
    let asked = Instant::now().into_std();
    let said = store.clock().await?;
    Ok(clocks.may_be_back(asked, Instant::now().into_std(), said))
}

/// Leases of segments.
pub(super) struct Leases {
    store: Store,
    clocks: Clocks,
    lease: Duration,
    longest: Duration,
}

impl Leases {
    pub(super) fn new(store: &Store, lease: Duration) -> Self {
        let longest = lease.saturating_mul(OTHERS_LEASES);
        Self { store: store.clone(), clocks: Clocks::default(), lease, longest }
    }

    async fn mend(&mut self) -> Result<Swept, SweepError> {
        let mended = async {
            let is_back = may_be_back(&self.store, &mut self.clocks).await?;
            if is_back { self.store.mend_leases(self.longest).await } else { Ok(0) }
        };
        match mended.await {
            Ok(leases) => {
                if leases > 0 {
                    tracing::warn!(leases, "the database's clock was set back; leases are shortened accordingly");
                }
                self.longest = self.lease;
                Ok(Swept::all(leases))
            }
            Err(error) => {
                // The next check starts from scratch.
                *self = Self::new(&self.store, self.lease);
                Err(error.into())
            }
        }
    }
}

impl Sweep for Leases {
    fn name(&self) -> &'static str {
        "clock-leases"
    }

    fn every(&self) -> Duration {
        EVERY
    }

    fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>> {
        self.mend().boxed()
    }
}

/// Due times and leases of webhooks.
pub(super) struct DueTimes {
    webhooks: Webhooks,
    clocks: Clocks,
}

impl DueTimes {
    pub(super) fn new(webhooks: &Webhooks) -> Self {
        Self { webhooks: webhooks.clone(), clocks: Clocks::default() }
    }

    async fn mend(&mut self) -> Result<Swept, SweepError> {
        let mended = async {
            let is_back = may_be_back(self.webhooks.store(), &mut self.clocks).await?;
            if is_back { self.webhooks.mend_due_times().await } else { Ok(0) }
        };
        let mended = mended.await;
        if mended.is_err() {
            // The next check starts from scratch.
            self.clocks = Clocks::default();
        }
        Ok(Swept::all(mended?))
    }
}

impl Sweep for DueTimes {
    fn name(&self) -> &'static str {
        "clock-webhooks"
    }

    fn every(&self) -> Duration {
        self.webhooks.reap_interval()
    }

    fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>> {
        self.mend().boxed()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    };

    use sea_orm::{ConnectionTrait, Database, Statement};

    use super::*;
    use crate::{domain::Timestamp, store::with_clock};

    #[tokio::test]
    async fn a_clock_set_back_is_noticed_and_leases_are_cut() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("db");
        let store = Store::sqlite(&file).await.unwrap();
        let raw = Database::connect(format!("sqlite://{}", file.display())).await.unwrap();
        let (second, hour) = (1_000_000, 3_600_000_000);
        let start = Timestamp::now().0;
        let insert = format!(
            "INSERT INTO segments (batch_id, idx, first_line, line_span, requests, byte_offset, byte_length, models, state, \
             lease_owner, lease_expires_at, epoch) VALUES ('b', 0, 1, 1, 1, 0, 1, 1, 'leased', 'dead', {}, 1)",
            start + 30 * second
        );
        raw.execute_unprepared(&insert).await.unwrap();
        let ends = async || -> i64 {
            let sql = Statement::from_string(raw.get_database_backend(), "SELECT lease_expires_at FROM segments");
            raw.query_one_raw(sql).await.unwrap().unwrap().try_get_by_index(0).unwrap()
        };
        let lease = Duration::from_secs(30);
        let clock = Arc::new(AtomicI64::new(start));
        let mut sweep = Leases::new(&store, lease);
        let mut look = async || with_clock(clock.clone(), sweep.tick()).await.unwrap().done;
        assert_eq!(look().await, 0, "the first look");
        clock.fetch_add(hour, Ordering::Relaxed);
        assert_eq!(look().await, 0, "an hour ahead");
        clock.fetch_sub(2 * hour, Ordering::Relaxed);
        assert_eq!(look().await, 1, "and two back");
        assert_eq!(ends().await, start - hour + 30 * second);
        assert_eq!(look().await, 0, "once");
        // A server that starts then has seen nothing of it.
        raw.execute_unprepared(&format!("UPDATE segments SET lease_expires_at = {}", start + hour)).await.unwrap();
        let mut other = Leases::new(&store, lease);
        let mended = with_clock(clock.clone(), other.tick()).await.unwrap().done;
        assert_eq!((mended, ends().await), (1, start - hour + 300 * second));
    }
}
