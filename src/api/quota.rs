//! How much one caller may have under way at a time.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tonic::Status;

use super::{auth::Caller, limits::refused, peer::Peer};

/// Whom a call counts for: the token's name, and without tokens the peer. An extension of every request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Account(Arc<str>);

impl Account {
    /// Without tokens everybody has the same rights, but not the same share: each peer counts for itself.
    pub(super) fn of(caller: &Caller, peer: Option<&Peer>) -> Self {
        match (caller.owner.as_str(), peer) {
            // No token's name has a space.
            ("", Some(peer)) => Self(format!("peer {peer}").into()),
            (owner, _) => Self(owner.into()),
        }
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// What one caller may have of one kind at a time.
pub(super) struct Quota {
    /// 0: no limit.
    most: u64,
    kind: Kind,
    used: Mutex<HashMap<Account, u64>>,
}

/// What is limited, in the words of the refusal.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    /// The reason.
    pub(super) reason: &'static str,
    /// Such as "streams that watch batches".
    pub(super) what: &'static str,
    /// What to do about it.
    pub(super) advice: &'static str,
    /// When to try again.
    pub(super) again: Duration,
}

impl Quota {
    pub(super) fn new(most: u64, kind: Kind) -> Arc<Self> {
        Arc::new(Self { most, kind, used: Mutex::default() })
    }

    /// Takes some for as long as the result is there.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` with when to try again: the caller has too much under way.
    pub(super) fn take(self: &Arc<Self>, account: &Account, amount: u64) -> Result<Held, Status> {
        let mut used = self.used.lock();
        let mine = used.get(account).copied().unwrap_or(0);
        if self.most > 0 && mine.saturating_add(amount) > self.most {
            drop(used);
            let Kind { reason, what, advice, again } = self.kind;
            let message =
                format!("{mine} {what} of yours are under way at this server, and {} is the most; {advice}", self.most);
            return Err(refused(reason, message, again));
        }
        used.insert(account.clone(), mine + amount);
        Ok(Held { quota: self.clone(), account: account.clone(), amount })
    }
}

/// A part of a quota. Given back when it is dropped.
pub(super) struct Held {
    quota: Arc<Quota>,
    account: Account,
    amount: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut used = self.quota.used.lock();
        if let Some(mine) = used.get_mut(&self.account) {
            *mine = mine.saturating_sub(self.amount);
            if *mine == 0 {
                used.remove(&self.account);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::StatusExt;

    use super::*;

    const KIND: Kind = Kind { reason: "TOO_MANY_X", what: "x", advice: "see --limit-x", again: Duration::from_secs(3) };

    fn account(name: &str) -> Account {
        Account::of(&Caller { owner: name.into(), ..Caller::anonymous() }, None)
    }

    #[test]
    fn one_callers_use_is_not_anothers_and_comes_back() {
        let quota = Quota::new(3, KIND);
        let two = quota.take(&account("ana"), 2).unwrap();
        let one = quota.take(&account("ana"), 1).unwrap();
        let refusal = quota.take(&account("ana"), 1).map(drop).unwrap_err();
        assert_eq!(refusal.code(), Code::ResourceExhausted);
        assert_eq!(refusal.get_details_error_info().unwrap().reason, "TOO_MANY_X");
        assert_eq!(refusal.get_details_retry_info().unwrap().retry_delay.unwrap().as_secs(), 3);
        assert!(refusal.message().contains("--limit-x"), "{refusal:?}");
        drop(quota.take(&account("bob"), 3).unwrap());
        drop(two);
        assert!(quota.take(&account("ana"), 3).is_err());
        drop(one);
        drop(quota.take(&account("ana"), 3).unwrap());
        assert!(quota.used.lock().is_empty(), "nobody is remembered who has nothing");
        let free = Quota::new(0, KIND);
        let _all: Vec<Held> = (0..1_000).map(|_| free.take(&account("ana"), 1).unwrap()).collect();
    }

    #[test]
    fn without_tokens_each_peer_counts_for_itself() {
        let of = |address: [u8; 4]| Account::of(&Caller::anonymous(), Some(&Peer::of(address.into())));
        assert_ne!(of([10, 0, 0, 1]), of([10, 0, 0, 2]));
        let named = Caller { owner: "ana".into(), ..Caller::anonymous() };
        assert_eq!(Account::of(&named, Some(&Peer::of([10, 0, 0, 1].into()))), account("ana"));
    }
}
