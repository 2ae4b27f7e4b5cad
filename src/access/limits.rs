//! Limits per caller: token buckets, one set per token name, and places for uploads.
//!
//! Each server counts for itself and forgets at a restart. Queued lines are counted in the database, for all servers.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    LimitReached,
    pace::{LONGEST, Received},
    places::{Place, Uploads},
    quota::{Account, Held, Quota},
    refusal::{Kind, LATER, REFUSED},
};
use crate::domain::Owner;

/// The period of the byte limit.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// The burst: this many seconds' worth of requests may come at once.
const BURST_SECONDS: f64 = 2.0;
/// How long an upload waits for its turn. Clients notice no failure in this time, and their deadlines are longer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The retry delay where places become free all the time.
const SOON: Duration = Duration::from_secs(1);
/// The most bytes of waiting `Infer` requests that one caller may hold in this server's memory.
const INFER_BYTES: u64 = 256 * 1024 * 1024;

const WATCHES: Kind = Kind {
    reason: "TOO_MANY_WATCHES",
    what: "streams that watch",
    advice: "end some, or ask for a higher --limit-watches",
    again: LATER,
};
const DOWNLOADS: Kind = Kind {
    reason: "TOO_MANY_DOWNLOADS",
    what: "downloads and result streams",
    advice: "end some, or ask for a higher --limit-downloads",
    again: LATER,
};
const INFERS: Kind = Kind {
    reason: "TOO_MANY_INFER_CALLS",
    what: "Infer calls",
    advice: "end some, or ask for a higher --limit-infer-calls",
    again: SOON,
};
const INFER_MEMORY: Kind = Kind {
    reason: "TOO_MANY_INFER_BYTES",
    what: "bytes of Infer requests",
    advice: "wait for some to end",
    again: SOON,
};

/// The limits of one token name at one server. 0 means no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallerLimits {
    /// RPCs per second; a burst of twice as many is allowed.
    pub requests_per_second: u32,
    /// Bytes uploaded in about 24 hours. The allowance refills evenly over a day.
    pub bytes_per_day: u64,
    /// Requests without a result in all of the caller's batches, on all servers.
    pub queued_lines: u64,
    /// Uploads at a time, of all callers together; more of them wait. Each holds up to 12 MB of memory.
    pub concurrent_uploads: u32,
    /// `Infer` calls of one caller at a time, waiting or running.
    pub infer_calls: u32,
    /// Streams of one caller that watch batches, health or reflection.
    pub watches: u32,
    /// Downloads and result streams of one caller, over gRPC and HTTP.
    pub downloads: u32,
    /// The longest that an upload may take, at any speed.
    pub longest_upload: Duration,
    /// How long an upload waits for its turn before it is refused.
    pub upload_patience: Duration,
}

impl Default for CallerLimits {
    fn default() -> Self {
        Self {
            requests_per_second: 0,
            bytes_per_day: 0,
            queued_lines: 0,
            concurrent_uploads: 64,
            infer_calls: 1_000,
            watches: 10_000,
            downloads: 200,
            longest_upload: LONGEST,
            upload_patience: PATIENCE,
        }
    }
}

/// A bucket's refill rate and capacity.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rate {
    per_second: f64,
    most: f64,
}

/// The amount left at a time. Pure: times are arguments, counted from any fixed point.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bucket {
    left: f64,
    at: Duration,
}

impl Rate {
    fn full(self, now: Duration) -> Bucket {
        Bucket { left: self.most, at: now }
    }

    /// Takes an amount if the bucket has it, else nothing. An amount above the capacity is taken from a full bucket,
    /// which then owes the rest: such a call is served late, but not never.
    ///
    /// # Errors
    /// The time until the bucket has the amount.
    fn take(self, bucket: &mut Bucket, amount: f64, now: Duration) -> Result<(), Duration> {
        let passed = now.saturating_sub(bucket.at).as_secs_f64();
        bucket.left = (bucket.left + passed * self.per_second).min(self.most);
        bucket.at = bucket.at.max(now);
        let wanted = amount.min(self.most);
        // A hair's breadth is left to rounding.
        if bucket.left + 1e-6 >= wanted {
            bucket.left -= amount;
            return Ok(());
        }
        Err(Duration::try_from_secs_f64((wanted - bucket.left) / self.per_second).unwrap_or(DAY))
    }
}

#[derive(Clone, Copy)]
struct Buckets {
    requests: Bucket,
    bytes: Bucket,
}

/// The limits, and how much of them is used.
pub struct Limiter {
    limits: CallerLimits,
    requests: Rate,
    bytes: Rate,
    began: Instant,
    /// At most one per name in the token file.
    accounts: Mutex<HashMap<Owner, Buckets>>,
    uploads: Arc<Uploads>,
    infers: Arc<Quota>,
    infer_bytes: Arc<Quota>,
    pub(crate) watches: Arc<Quota>,
    pub(crate) downloads: Arc<Quota>,
}

/// Work that a call creates. Every way to create work passes [`Limiter::admit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A batch of an uploaded file.
    Batch,
    /// A batch whose lines the server first writes to a file, with their number of bytes.
    Lines(u64),
    /// A request that runs at once, with its number of bytes.
    Now(u64),
}

/// What a call holds while it creates its work.
#[derive(Default)]
pub struct Admitted {
    _place: Option<Place>,
    _call: Option<Held>,
    bytes: Option<Held>,
}

impl Admitted {
    /// Counts the bytes of a request whose body comes: `bytes` in all so far, or as many as it announces.
    ///
    /// # Errors
    /// [`LimitReached`]: the caller has too many of them in this server's memory.
    pub fn hold(&mut self, bytes: u64) -> Result<(), LimitReached> {
        self.bytes.as_mut().map_or(Ok(()), |held| held.grow(bytes))
    }
}

impl Limiter {
    /// A limiter without any use yet.
    #[allow(clippy::cast_precision_loss)] // limits, not accounts
    #[must_use]
    pub fn new(limits: CallerLimits) -> Self {
        metrics::describe_counter!(REFUSED, "calls that were refused because of a limit, by reason");
        let (per_second, per_day) = (f64::from(limits.requests_per_second), limits.bytes_per_day as f64);
        Self {
            limits,
            requests: Rate { per_second, most: per_second * BURST_SECONDS },
            bytes: Rate { per_second: per_day / DAY.as_secs_f64(), most: per_day },
            began: Instant::now(),
            accounts: Mutex::default(),
            uploads: Uploads::new(limits.concurrent_uploads as usize),
            infers: Quota::new(limits.infer_calls.into(), INFERS),
            infer_bytes: Quota::new(INFER_BYTES, INFER_MEMORY),
            watches: Quota::new(limits.watches.into(), WATCHES),
            downloads: Quota::new(limits.downloads.into(), DOWNLOADS),
        }
    }

    fn take(
        &self,
        owner: &Owner,
        take: impl FnOnce(&mut Buckets, Duration) -> Result<(), Duration>,
    ) -> Result<(), Duration> {
        let now = self.began.elapsed();
        let mut accounts = self.accounts.lock();
        if let Some(account) = accounts.get_mut(owner) {
            return take(account, now);
        }
        let mut account = Buckets { requests: self.requests.full(now), bytes: self.bytes.full(now) };
        let taken = take(&mut account, now);
        accounts.insert(owner.clone(), account);
        taken
    }

    /// Counts a call.
    ///
    /// # Errors
    /// [`LimitReached::Requests`].
    pub fn request(&self, owner: &Owner) -> Result<(), LimitReached> {
        if self.limits.requests_per_second == 0 {
            return Ok(());
        }
        self.take(owner, |account, now| self.requests.take(&mut account.requests, 1.0, now))
            .map_err(|wait| LimitReached::Requests { per_second: self.limits.requests_per_second, wait }.counted())
    }

    /// Counts uploaded bytes.
    ///
    /// # Errors
    /// [`LimitReached::Bytes`].
    #[allow(clippy::cast_precision_loss)]
    pub fn bytes(&self, owner: &Owner, bytes: u64) -> Result<(), LimitReached> {
        if self.limits.bytes_per_day == 0 {
            return Ok(());
        }
        self.take(owner, |account, now| self.bytes.take(&mut account.bytes, bytes as f64, now))
            .map_err(|wait| LimitReached::Bytes { per_day: self.limits.bytes_per_day, wait }.counted())
    }

    /// The longest that an upload may take.
    #[must_use]
    pub fn longest_upload(&self) -> Duration {
        self.limits.longest_upload
    }

    /// The most lines that one caller may have queued, if that is limited.
    #[must_use]
    pub fn most_lines(&self) -> Option<i64> {
        (self.limits.queued_lines > 0).then(|| i64::try_from(self.limits.queued_lines).unwrap_or(i64::MAX))
    }

    /// Checks whether `added` lines fit beside the `queued` ones.
    ///
    /// # Errors
    /// [`LimitReached::QueuedLines`].
    pub fn lines(&self, queued: i64, added: i64) -> Result<(), LimitReached> {
        match self.most_lines() {
            Some(most) if queued.saturating_add(added) > most => {
                Err(LimitReached::QueuedLines { queued, added, most }.counted())
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Admits work: counts its bytes. A call that makes the server write a file first waits for its turn, as an upload
    /// does.
    ///
    /// # Errors
    /// [`LimitReached`]: the caller is at a limit.
    pub async fn admit(&self, owner: &Owner, account: &Account, work: Work) -> Result<Admitted, LimitReached> {
        match work {
            Work::Batch => Ok(Admitted::default()),
            Work::Lines(bytes) => {
                let place = self.upload(account, None).await?;
                self.bytes(owner, bytes)?;
                Ok(Admitted { _place: Some(place), ..Admitted::default() })
            }
            Work::Now(bytes) => {
                let mut admitted = self.expect(account)?;
                admitted.hold(bytes)?;
                self.bytes(owner, bytes)?;
                Ok(admitted)
            }
        }
    }

    /// Admits a request that runs at once before its body has come, so that no more bodies are read than may run.
    /// [`Admitted::hold`] counts the bytes while they come.
    ///
    /// # Errors
    /// [`LimitReached`]: the caller is at a limit.
    pub fn expect(&self, account: &Account) -> Result<Admitted, LimitReached> {
        let (call, bytes) = (self.infers.take(account, 1)?, self.infer_bytes.take(account, 0)?);
        Ok(Admitted { _call: Some(call), bytes: Some(bytes), ..Admitted::default() })
    }

    /// Whether uploads wait for a place.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.uploads.is_crowded()
    }

    /// Waits for a place for an upload. Until then the server reads nothing of it, and flow control holds the client
    /// back.
    ///
    /// # Errors
    /// [`LimitReached::Uploads`] if no place becomes free in time.
    pub async fn upload(&self, account: &Account, received: Option<Received>) -> Result<Place, LimitReached> {
        self.uploads
            .enter(account, received, self.limits.upload_patience)
            .await
            .ok_or_else(|| LimitReached::Uploads { most: self.limits.concurrent_uploads }.counted())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::access::Caller;

    #[test]
    fn a_bucket_says_when_it_will_do() {
        let rate = Rate { per_second: 2.0, most: 4.0 };
        let start = Duration::from_secs(100);
        let mut bucket = rate.full(start);
        for _ in 0..4 {
            rate.take(&mut bucket, 1.0, start).unwrap();
        }
        assert_eq!(rate.take(&mut bucket, 1.0, start), Err(Duration::from_millis(500)));
        rate.take(&mut bucket, 1.0, start + Duration::from_millis(500)).unwrap();
        rate.take(&mut bucket, 40.0, start + Duration::from_secs(60)).unwrap();
        let late = rate.take(&mut bucket, 1.0, start + Duration::from_secs(60));
        assert_eq!(late, Err(Duration::from_millis(18_500)), "what was over the top is paid back");
    }

    proptest! {
        #[test]
        fn never_more_than_the_burst_and_the_rate(steps in proptest::collection::vec((0u64..2_000, 1u32..4), 1..200)) {
            let rate = Rate { per_second: 5.0, most: 10.0 };
            let (mut now, mut taken) = (Duration::ZERO, 0.0);
            let mut bucket = rate.full(now);
            for (wait, amount) in steps {
                now += Duration::from_millis(wait);
                match rate.take(&mut bucket, f64::from(amount), now) {
                    Ok(()) => taken += f64::from(amount),
                    Err(wait) => {
                        let mut then = bucket;
                        prop_assert!(rate.take(&mut then, f64::from(amount), now + wait + Duration::from_micros(1)).is_ok());
                    }
                }
                prop_assert!(taken <= 10.0 + 5.0 * now.as_secs_f64() + 0.01);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn callers_do_not_pay_for_each_other() {
        let limits = CallerLimits {
            requests_per_second: 3,
            bytes_per_day: 86_400,
            queued_lines: 10,
            concurrent_uploads: 1,
            ..CallerLimits::default()
        };
        let limiter = Limiter::new(limits);
        let (ana_owns, bob_owns): (Owner, Owner) = ("ana".into(), "bob".into());
        for _ in 0..6 {
            limiter.request(&ana_owns).unwrap();
        }
        let refusal = limiter.request(&ana_owns).unwrap_err();
        assert_eq!(refusal.reason(), "TOO_MANY_REQUESTS");
        assert!(refusal.retry_after() <= Duration::from_millis(334));
        limiter.request(&bob_owns).unwrap();
        limiter.bytes(&ana_owns, 86_400).unwrap();
        let refusal = limiter.bytes(&ana_owns, 100).unwrap_err();
        assert_eq!(refusal.retry_after().as_secs(), 100);
        tokio::time::advance(Duration::from_secs(101)).await;
        limiter.bytes(&ana_owns, 100).unwrap();
        limiter.lines(4, 6).unwrap();
        limiter.lines(4, 7).unwrap_err();
        let ana = Account::of(&Caller { owner: "ana".into(), ..Caller::anonymous() }, None);
        let first = limiter.upload(&ana, None).await.unwrap();
        let refusal = limiter.upload(&ana, None).await.map(drop).unwrap_err();
        assert_eq!(refusal, LimitReached::Uploads { most: 1 });
        // What the server writes for a call waits for a turn too.
        assert!(limiter.admit(&ana_owns, &ana, Work::Lines(1)).await.is_err());
        drop(first);
        drop(limiter.admit(&ana_owns, &ana, Work::Lines(1)).await.unwrap());
        let refusal = limiter.admit(&ana_owns, &ana, Work::Now(1_000)).await.map(drop).unwrap_err();
        assert!(matches!(refusal, LimitReached::Bytes { .. }), "{refusal:?}");
    }

    #[test]
    fn nothing_is_limited_where_nothing_is_said() {
        let limiter = Limiter::new(CallerLimits::default());
        for _ in 0..10_000 {
            limiter.request(&Owner::nobody()).unwrap();
            limiter.bytes(&Owner::nobody(), u64::MAX / 2).unwrap();
        }
        limiter.lines(i64::MAX, i64::MAX).unwrap();
    }
}
