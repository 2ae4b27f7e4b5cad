//! Chooses the connection that is closed for a new one when the limit is reached. Pure: no sockets, no clock.

use std::collections::{BTreeSet, HashMap};

use tokio::time::Instant;

use crate::access::Peer;

/// A connection of this process.
pub(super) type Id = u64;

/// All open connections, by peer.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    all: HashMap<Id, Member>,
    peers: HashMap<Peer, Connections>,
}

#[derive(Clone, Copy, Debug)]
struct Member {
    peer: Peer,
    /// Since when it has no request; none: it has one.
    idle_since: Option<Instant>,
}

/// The connections of one peer.
#[derive(Debug, Default)]
struct Connections {
    all: BTreeSet<Id>,
    /// The connections without a request, the longest idle one first.
    idle: BTreeSet<(Instant, Id)>,
}

impl Crowd {
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// A connection has come. It has no request yet.
    pub(super) fn enter(&mut self, id: Id, peer: Peer, now: Instant) {
        self.all.insert(id, Member { peer, idle_since: Some(now) });
        let connections = self.peers.entry(peer).or_default();
        connections.all.insert(id);
        connections.idle.insert((now, id));
    }

    /// A connection has gone, or is to go.
    pub(super) fn leave(&mut self, id: Id) {
        let Some(member) = self.all.remove(&id) else { return };
        let Some(connections) = self.peers.get_mut(&member.peer) else { return };
        connections.all.remove(&id);
        if let Some(since) = member.idle_since {
            connections.idle.remove(&(since, id));
        }
        if connections.all.is_empty() {
            self.peers.remove(&member.peer);
        }
    }

    /// Says since when a connection has no request; none: it has one.
    pub(super) fn set_idle(&mut self, id: Id, since: Option<Instant>) {
        let Some(member) = self.all.get_mut(&id) else { return };
        let before = std::mem::replace(&mut member.idle_since, since);
        let Some(connections) = self.peers.get_mut(&member.peer) else { return };
        if let Some(before) = before {
            connections.idle.remove(&(before, id));
        }
        if let Some(since) = since {
            connections.idle.insert((since, id));
        }
    }

    /// Which connection gives way to one more of this peer: the longest idle one of the peer that has most. A peer with
    /// fewer connections than the newcomer's gives none up. Where nobody has an idle one to give, the newest connection
    /// of a peer that has at least two more than the newcomer's would, or else none.
    pub(super) fn gives_way(&self, newcomer: Peer) -> Option<Id> {
        let own = self.peers.get(&newcomer).map_or(0, |own| own.all.len());
        let idle = self
            .peers
            .iter()
            .filter(|(peer, connections)| connections.all.len() > own || **peer == newcomer)
            .filter_map(|(_, connections)| connections.idle.first().map(|first| (connections.all.len(), *first)))
            .max_by_key(|(count, first)| (*count, std::cmp::Reverse(*first)));
        if let Some((_, (_, id))) = idle {
            return Some(id);
        }
        let largest = self.peers.values().max_by_key(|connections| (connections.all.len(), connections.all.first()))?;
        if largest.all.len() > own + 1 { largest.all.last().copied() } else { None }
    }

    /// The connection to close if one must be closed: the longest idle one of the peer with the most connections.
    pub(super) fn least_missed(&self) -> Option<Id> {
        let idle = self.peers.values().filter_map(|of| of.idle.first().map(|first| (of.all.len(), *first)));
        idle.max_by_key(|(count, first)| (*count, std::cmp::Reverse(*first))).map(|(_, (_, id))| id)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn peer(number: u8) -> Peer {
        Peer::of([10, 0, 0, number].into())
    }

    /// A crowd of (peer, idle since this second or busy), numbered from 0.
    fn crowd(start: Instant, members: &[(u8, Option<u64>)]) -> Crowd {
        let mut crowd = Crowd::default();
        for (id, (of, idle)) in (0..).zip(members) {
            crowd.enter(id, peer(*of), start);
            crowd.set_idle(id, idle.map(|second| start + Duration::from_secs(second)));
        }
        crowd
    }

    #[test]
    fn the_longest_idle_connection_of_whoever_has_most_gives_way() {
        let start = Instant::now();
        let all = [(1, Some(9)), (1, Some(5)), (1, None), (2, Some(1))];
        assert_eq!(crowd(start, &all).gives_way(peer(3)), Some(1), "the older one of peer 2 is not touched");
        assert_eq!(crowd(start, &all).gives_way(peer(1)), Some(1));
        assert_eq!(crowd(start, &[(1, Some(3)), (2, Some(2))]).gives_way(peer(3)), Some(1), "alike: the longest idle");
    }

    #[test]
    fn whoever_has_much_takes_nothing_from_whoever_has_little() {
        let start = Instant::now();
        let all = [(1, None), (1, None), (1, None), (2, Some(1))];
        assert_eq!(crowd(start, &all).gives_way(peer(1)), None);
        assert_eq!(crowd(start, &all).gives_way(peer(2)), Some(3), "its own");
        assert_eq!(crowd(start, &all[..3]).gives_way(peer(2)), Some(2), "the newest of those at work");
        assert_eq!(crowd(start, &[(1, None), (2, None)]).gives_way(peer(3)), None, "one each is fair");
        assert_eq!(crowd(start, &all).least_missed(), Some(3));
    }

    #[test]
    fn what_has_gone_is_forgotten() {
        let start = Instant::now();
        let mut crowd = crowd(start, &[(1, Some(1)), (1, None)]);
        crowd.set_idle(1, Some(start));
        crowd.leave(0);
        crowd.leave(1);
        crowd.leave(1);
        crowd.set_idle(1, None);
        assert!(crowd.len() == 0 && crowd.peers.is_empty() && crowd.least_missed().is_none());
    }

    proptest! {
        /// However one peer behaves, another always gets in until it has its half.
        #[test]
        fn nobody_can_keep_others_out(limit in 2usize..40, busy in proptest::collection::vec(any::<bool>(), 100)) {
            let (start, mut crowd, mut id) = (Instant::now(), Crowd::default(), 0);
            let mut come = |crowd: &mut Crowd, peer: Peer, busy: bool| {
                if crowd.len() == limit {
                    let Some(victim) = crowd.gives_way(peer) else { return false };
                    crowd.leave(victim);
                }
                id += 1;
                crowd.enter(id, peer, start + Duration::from_millis(id));
                if busy {
                    crowd.set_idle(id, None);
                }
                true
            };
            for busy in &busy {
                come(&mut crowd, peer(1), *busy);
            }
            for _ in 0..limit / 2 {
                prop_assert!(come(&mut crowd, peer(2), true));
            }
            let first = crowd.peers[&peer(2)].all.len();
            for busy in &busy {
                come(&mut crowd, peer(1), *busy);
            }
            prop_assert_eq!(crowd.peers[&peer(2)].all.len(), first, "and keeps it");
        }
    }
}
