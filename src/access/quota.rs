//! How many calls of a kind one caller may have under way at a time.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use super::{Caller, LimitReached, Peer, refusal::Kind};

/// Who pays for a call: the token's name or, without tokens, the peer. An extension of every request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Account(Arc<str>);

impl Account {
    /// The account of a caller. Without tokens all callers have the same rights, but each peer has its own limits.
    #[must_use]
    pub fn of(caller: &Caller, peer: Option<&Peer>) -> Self {
        match (caller.owner.as_str(), peer) {
            // No token's name has a space.
            ("", Some(peer)) => Self(format!("peer {peer}").into()),
            (owner, _) => Self(owner.into()),
        }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The limit of one kind, and its use by each account.
pub(crate) struct Quota {
    /// 0 means no limit.
    most: u64,
    kind: Kind,
    used: Mutex<HashMap<Account, u64>>,
}

impl Quota {
    pub(crate) fn new(most: u64, kind: Kind) -> Arc<Self> {
        Arc::new(Self { most, kind, used: Mutex::default() })
    }

    /// Takes an amount until the result is dropped.
    ///
    /// # Errors
    /// [`LimitReached::AtATime`]: the caller has too much under way.
    pub(crate) fn take(self: &Arc<Self>, account: &Account, amount: u64) -> Result<Held, LimitReached> {
        let mut used = self.used.lock();
        let mine = used.get(account).copied().unwrap_or(0);
        if self.most > 0 && mine.saturating_add(amount) > self.most {
            drop(used);
            return Err(LimitReached::AtATime { kind: self.kind, used: mine, most: self.most }.counted());
        }
        used.insert(account.clone(), mine + amount);
        Ok(Held { quota: self.clone(), account: account.clone(), amount })
    }
}

/// An amount taken from a quota, given back when it is dropped.
pub struct Held {
    quota: Arc<Quota>,
    account: Account,
    amount: u64,
}

impl Held {
    /// Takes more until it holds `amount` in all. It never holds less than before.
    ///
    /// # Errors
    /// [`LimitReached::AtATime`]: the caller has too much under way.
    pub(crate) fn grow(&mut self, amount: u64) -> Result<(), LimitReached> {
        let more = amount.saturating_sub(self.amount);
        if more > 0 {
            let mut taken = self.quota.take(&self.account, more)?;
            // One gives back both.
            self.amount += std::mem::take(&mut taken.amount);
        }
        Ok(())
    }
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
    use std::time::Duration;

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
        assert_eq!((refusal.reason(), refusal.retry_after()), ("TOO_MANY_X", Duration::from_secs(3)));
        assert_eq!(refusal.to_string(), "you already have 3 x at this server, and 3 is the limit; see --limit-x");
        drop(quota.take(&account("bob"), 3).unwrap());
        drop(two);
        assert!(quota.take(&account("ana"), 3).is_err());
        drop(one);
        let mut grown = quota.take(&account("ana"), 0).unwrap();
        grown.grow(2).unwrap();
        grown.grow(1).unwrap();
        assert!(quota.take(&account("ana"), 2).is_err() && grown.grow(4).is_err());
        grown.grow(3).unwrap();
        drop(grown);
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
