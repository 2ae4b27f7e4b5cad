//! Places for uploads, and which upload gives way to another. [`Places`] decides, purely; [`Uploads`] waits.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::oneshot, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{Account, Received};

/// Identifies an upload of this process that has a place or waits for one.
type Id = u64;

/// In bytes per second: a slower upload of an account with more than its fair share gives way at once.
const TRICKLE: u64 = 64 * 1024;
/// A slower upload gives way to an account without any place, even if no account has more than one.
const CRAWL: u64 = 16 * 1024;
/// An upload's speed is measured after this time.
const KNOWN: Duration = Duration::from_secs(5);
/// After waiting this long, an account with less than its fair share gets a place, however fast the other uploads are.
const FAIR: Duration = Duration::from_secs(10);
/// How often waiting uploads check whether another one has to give way.
const LOOK: Duration = Duration::from_secs(1);

/// The taken places, and the uploads that wait for one.
#[derive(Debug)]
struct Places {
    most: usize,
    taken: BTreeMap<Id, Taken>,
    waiting: BTreeMap<Id, (Account, Instant)>,
}

#[derive(Debug)]
struct Taken {
    account: Account,
    since: Instant,
    /// Counts the received bytes. `None`: the server itself does the work, in negligible time.
    received: Option<Received>,
    /// Whether it was asked to give way and still holds its place.
    leaving: bool,
}

impl Taken {
    /// Bytes per second, once measured.
    fn speed(&self, now: Instant) -> Option<u64> {
        let age = now.saturating_duration_since(self.since);
        let bytes = self.received.as_ref().filter(|_| !self.leaving && age >= KNOWN)?.bytes();
        Some(bytes / age.as_secs().max(1))
    }
}

impl Places {
    fn counts(&self) -> HashMap<&Account, usize> {
        let mut counts = HashMap::new();
        for taken in self.taken.values() {
            *counts.entry(&taken.account).or_default() += 1;
        }
        counts
    }

    /// Which waiting upload gets a free place: one of the account with the fewest places, then the longest waiting.
    fn grant(&mut self) -> Option<Id> {
        if self.taken.len() >= self.most {
            return None;
        }
        let counts = self.counts();
        let next =
            self.waiting.iter().min_by_key(|(id, (account, _))| (counts.get(account).copied().unwrap_or(0), **id));
        next.map(|(id, _)| *id)
    }

    /// Which upload gives way now, if one must. One must if a waiting account would, with one place more, still have
    /// fewer than another account has now. The slowest upload of the accounts with the most places goes: at once if it
    /// is slower than [`TRICKLE`], else after the other has waited for [`FAIR`]. If no account has more than one place,
    /// an account without any replaces the slowest upload below [`CRAWL`].
    fn gives_way(&self, now: Instant) -> Option<Id> {
        let counts = self.counts();
        let leaving = self.taken.values().filter(|taken| taken.leaving).count();
        let count = |account: &Account| counts.get(account).copied().unwrap_or(0);
        let most = counts.values().copied().max()?;
        let is_poor = |account: &Account| count(account) + 1 < most || (most == 1 && count(account) == 0);
        let mut poor: Vec<Instant> =
            self.waiting.values().filter(|(account, _)| is_poor(account)).map(|(_, since)| *since).collect();
        poor.sort_unstable();
        // Uploads that are leaving make place for the first ones.
        let since = *poor.get(leaving)?;
        let rich = self.taken.iter().filter(|(_, taken)| count(&taken.account) == most);
        let (id, speed) = rich
            .filter_map(|(id, taken)| taken.speed(now).map(|speed| (*id, speed)))
            .min_by_key(|(id, speed)| (*speed, std::cmp::Reverse(*id)))?;
        let goes = match most {
            1 => speed < CRAWL,
            _ => speed < TRICKLE || now.saturating_duration_since(since) >= FAIR,
        };
        goes.then_some(id)
    }
}

/// Hands out the places.
pub(crate) struct Uploads {
    inner: Mutex<Inner>,
}

struct Inner {
    places: Places,
    /// Notified when the place is granted.
    told: HashMap<Id, oneshot::Sender<()>>,
    /// Cancelled when the upload must give way.
    give_way: HashMap<Id, CancellationToken>,
    next: Id,
}

/// A place for an upload, free again when dropped.
pub struct Place {
    uploads: Arc<Uploads>,
    id: Id,
    give_way: CancellationToken,
}

impl Place {
    /// Completes when the upload must give way.
    pub fn gives_way(&self) -> impl Future<Output = ()> + Send + use<> {
        self.give_way.clone().cancelled_owned()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inner = self.uploads.inner.lock();
        inner.places.taken.remove(&self.id);
        inner.give_way.remove(&self.id);
        inner.grant();
    }
}

/// A waiting upload. Dropping it ends the wait, and frees a place that was granted meanwhile.
struct Waits<'a> {
    uploads: &'a Arc<Uploads>,
    id: Id,
    over: bool,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        if !self.over {
            let mut inner = self.uploads.inner.lock();
            inner.places.waiting.remove(&self.id);
            inner.told.remove(&self.id);
            if inner.places.taken.remove(&self.id).is_some() {
                inner.grant();
            }
        }
    }
}

impl Inner {
    fn grant(&mut self) {
        while let Some(id) = self.places.grant() {
            let Some((account, _)) = self.places.waiting.remove(&id) else { return };
            let taken = Taken { account, since: Instant::now(), received: None, leaving: false };
            self.places.taken.insert(id, taken);
            if let Some(told) = self.told.remove(&id) {
                // Whoever has just gone gives the place back as it does.
                let _ = told.send(());
            }
        }
    }
}

impl Uploads {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        let places = Places { most: most.max(1), taken: BTreeMap::new(), waiting: BTreeMap::new() };
        let inner = Inner { places, told: HashMap::new(), give_way: HashMap::new(), next: 0 };
        Arc::new(Self { inner: Mutex::new(inner) })
    }

    /// Whether an upload waits.
    pub(crate) fn is_crowded(&self) -> bool {
        !self.inner.lock().places.waiting.is_empty()
    }

    /// Waits for a place, at most that long. `received` counts what comes of the upload; without it the server does the
    /// work itself, and need not give way.
    pub(crate) async fn enter(
        self: &Arc<Self>,
        account: &Account,
        received: Option<Received>,
        patience: Duration,
    ) -> Option<Place> {
        let (tell, mut told) = oneshot::channel();
        let id = {
            let mut inner = self.inner.lock();
            let id = inner.next;
            inner.next += 1;
            inner.places.waiting.insert(id, (account.clone(), Instant::now()));
            inner.told.insert(id, tell);
            inner.grant();
            id
        };
        let mut waits = Waits { uploads: self, id, over: false };
        let deadline = tokio::time::sleep(patience);
        let mut deadline = std::pin::pin!(deadline);
        loop {
            tokio::select! {
                biased;
                granted = &mut told => {
                    granted.ok()?;
                    break;
                }
                () = &mut deadline => return None,
                () = tokio::time::sleep(LOOK) => self.look(),
            }
        }
        waits.over = true;
        let give_way = CancellationToken::new();
        let mut inner = self.inner.lock();
        inner.give_way.insert(id, give_way.clone());
        if let Some(taken) = inner.places.taken.get_mut(&id) {
            (taken.received, taken.since) = (received, Instant::now());
        }
        drop(inner);
        Some(Place { uploads: self.clone(), id, give_way })
    }

    /// Asks an upload to give way if one must.
    fn look(&self) {
        let mut inner = self.inner.lock();
        let Some(id) = inner.places.gives_way(Instant::now()) else { return };
        if let Some(taken) = inner.places.taken.get_mut(&id) {
            taken.leaving = true;
        }
        if let Some(give_way) = inner.give_way.get(&id) {
            give_way.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Caller;

    fn account(name: &str) -> Account {
        Account::of(&Caller { owner: name.into(), ..Caller::anonymous() }, None)
    }

    fn places(most: usize, taken: &[(&str, u64)], waiting: &[(&str, u64)], start: Instant) -> Places {
        let taken = (0..).zip(taken).map(|(id, (name, speed))| {
            let received = Received::of(speed * 100);
            (id, Taken { account: account(name), since: start, received: Some(received), leaving: false })
        });
        let waiting =
            (100..).zip(waiting).map(|(id, (name, since))| (id, (account(name), start + Duration::from_secs(*since))));
        Places { most, taken: taken.collect(), waiting: waiting.collect() }
    }

    #[test]
    fn a_free_place_goes_to_whoever_has_fewest_then_to_whoever_came_first() {
        let start = Instant::now();
        let taken = [("ana", 0), ("ana", 0), ("bob", 0)];
        let mut all = places(4, &taken, &[("ana", 0), ("bob", 1), ("eve", 2), ("eve", 2)], start);
        assert_eq!(all.grant(), Some(102), "eve has none");
        all.waiting.retain(|_, (waits, _)| *waits != account("eve"));
        assert_eq!(all.grant(), Some(101), "bob has one");
        all.waiting.remove(&101);
        assert_eq!(all.grant(), Some(100));
        all.most = 3;
        assert_eq!(all.grant(), None);
    }

    #[test]
    fn the_slowest_upload_of_whoever_has_most_gives_way() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let taken = [("ana", 9_000), ("ana", 2_048), ("ana", 1 << 20), ("bob", 1)];
        let all = places(4, &taken, &[("eve", 95)], start);
        assert_eq!(all.gives_way(at(100)), Some(1), "a trickle at once, and not bob's only one");
        assert_eq!(all.gives_way(at(3)), None, "nobody is slow yet");
        let fast = [("ana", 1 << 20), ("ana", 1 << 21), ("bob", 1)];
        let all = places(3, &fast, &[("eve", 95)], start);
        assert_eq!(all.gives_way(at(100)), None, "who sends has a while");
        assert_eq!(all.gives_way(at(105)), Some(0));
        let all = places(2, &[("ana", 20_000), ("bob", 17_000)], &[("eve", 0), ("ana", 0)], start);
        assert_eq!(all.gives_way(at(100)), None, "one each is fair");
        let mut all = places(2, &[("ana", 20_000), ("bob", 2_048)], &[("eve", 0), ("ana", 0)], start);
        assert_eq!(all.gives_way(at(3)), None, "nobody is known to crawl yet");
        assert_eq!(all.gives_way(at(100)), Some(1), "one who crawls keeps nobody out");
        all.waiting.retain(|_, (waits, _)| *waits == account("ana"));
        assert_eq!(all.gives_way(at(100)), None, "but makes no place for a second one");
        let all = places(3, &[("ana", 1), ("ana", 1), ("ana", 1)], &[("ana", 0)], start);
        assert_eq!(all.gives_way(at(100)), None, "nobody gives way to himself");
        let mut all = places(3, &[("ana", 1), ("ana", 2), ("ana", 3)], &[("eve", 0)], start);
        all.taken.get_mut(&0).unwrap().leaving = true;
        assert_eq!(all.gives_way(at(100)), None, "one for one");
        all.waiting.insert(200, (account("bob"), start));
        assert_eq!(all.gives_way(at(100)), Some(1));
    }

    #[tokio::test(start_paused = true)]
    async fn one_with_all_places_lets_another_in_and_nothing_is_lost() {
        let uploads = Uploads::new(4);
        let patience = Duration::from_secs(30);
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(uploads.enter(&account("ana"), Some(Received::default()), patience).await.unwrap());
        }
        let more = uploads.enter(&account("ana"), Some(Received::default()), Duration::from_secs(3)).await;
        assert!(more.is_none() && !uploads.is_crowded(), "her own wait in line");
        let began = Instant::now();
        let waiting = tokio::spawn({
            let uploads = uploads.clone();
            async move { uploads.enter(&account("bob"), Some(Received::default()), patience).await.unwrap() }
        });
        let one = held.pop().unwrap();
        one.gives_way().await;
        drop(one);
        let bobs = waiting.await.unwrap();
        assert!(began.elapsed() <= Duration::from_secs(7), "{:?}", began.elapsed());
        drop((held, bobs));
        assert!(uploads.inner.lock().places.taken.is_empty() && uploads.inner.lock().give_way.is_empty());
        // Whoever waits no more leaves nothing behind, even if the place came at that moment.
        let (ana, bob) = (account("ana"), account("bob"));
        let full: Vec<_> = futures::future::join_all((0..4).map(|_| uploads.enter(&ana, None, patience))).await;
        let mut late = Box::pin(uploads.enter(&bob, None, patience));
        assert!(futures::poll!(&mut late).is_pending());
        drop(full);
        drop(late);
        assert!(uploads.inner.lock().places.taken.is_empty() && uploads.inner.lock().places.waiting.is_empty());
    }
}
