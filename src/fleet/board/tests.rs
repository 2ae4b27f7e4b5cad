use proptest::prelude::*;

use super::*;
use crate::domain::{Priority, Timestamp, Weight};

fn want(model: &str, rank: Rank, avoid: &[u32]) -> Want {
    Want { model: model.into(), rank, avoid: avoid.iter().map(|key| WorkerKey(*key)).collect(), alone: false }
}

/// Who holds the slots of those who have no name.
fn nobody(model: &str) -> Holder {
    want(model, rank(0, 0), &[]).holder()
}

fn alone(model: &str) -> Want {
    Want { alone: true, ..want(model, rank(0, 5), &[]) }
}

fn tenant(name: u64) -> Tenant {
    Tenant { name, weight: Weight::default() }
}

fn rank(priority: i32, expires_at: i64) -> Rank {
    Rank::batch(Priority::new(priority).unwrap(), Timestamp(expires_at))
}

fn board(workers: &[(u32, &[&str], u32)]) -> Board {
    let mut board = Board::default();
    for (key, models, limit) in workers {
        board.set(WorkerKey(*key), models.iter().map(|model| Arc::from(*model)), true, true, *limit);
    }
    board
}

#[test]
fn the_best_rank_goes_first_then_who_asked_first() {
    let mut board = board(&[(1, &["m"], 1)]);
    assert_eq!(board.take(&want("m", rank(0, 5), &[])), Some(WorkerKey(1)));
    let late = board.queue(want("m", rank(0, 9), &[]));
    let low = board.queue(want("m", rank(-1, 1), &[]));
    let early = board.queue(want("m", rank(0, 2), &[]));
    let early_too = board.queue(want("m", rank(0, 2), &[]));
    let high = board.queue(want("m", rank(1, 99), &[]));
    let now = board.queue(want("m", Rank::interactive(), &[]));
    let mut order = Vec::new();
    for _ in 0..6 {
        board.release(WorkerKey(1), &nobody("m"));
        order.extend(board.grant().into_iter().map(|(ticket, _)| ticket));
    }
    assert_eq!(order, [now, high, early, early_too, late, low]);
}

#[test]
fn on_trial_a_worker_gets_as_few_as_it_is_given_from_all_in_turns() {
    let mut board = board(&[(1, &["m"], 4)]);
    let hung = want("m", rank(1, 1), &[]);
    assert_eq!(board.take(&hung), Some(WorkerKey(1)));
    board.trial(WorkerKey(1), Some(1));
    assert_eq!(board.take(&hung), None, "who does not wait gets none");
    let high = board.queue_for(want("m", rank(1, 1), &[]), 50);
    let low = board.queue_for(want("m", rank(-1, 9), &[]), 50);
    let mut order = Vec::new();
    for _ in 0..4 {
        order.extend(board.grant().into_iter().map(|(ticket, _)| ticket));
        assert!(board.grant().is_empty(), "one at a time");
        // It failed, and after a while another one is tried.
        board.release(WorkerKey(1), &nobody("m"));
        board.set(WorkerKey(1), [Arc::from("m")], true, false, 4);
        assert!(board.grant().is_empty() && board.capacity("m") == 4);
        board.set(WorkerKey(1), [Arc::from("m")], true, true, 4);
        board.trial(WorkerKey(1), Some(1));
    }
    assert_eq!(order, [high, low, high, low], "what the first sends may be what it fails");
    // One caller's calls, however many, may be what it fails as well.
    let now = board.queue(want("m", Rank::interactive(), &[]));
    board.trial(WorkerKey(1), Some(3));
    let all: Vec<_> = board.grant().into_iter().map(|(ticket, _)| ticket).collect();
    assert_eq!(all, [high, low, now]);
    board.trial(WorkerKey(1), None);
    assert!(board.grant().is_empty(), "the one that hangs and the three are all four");
}

#[test]
fn on_trial_who_must_be_alone_has_a_turn_too() {
    let mut board = board(&[(1, &["m"], 4)]);
    board.trial(WorkerKey(1), Some(1));
    let suspect = board.queue(alone("m"));
    assert_eq!(board.grant().to_vec(), [(suspect, WorkerKey(1))]);
    let other = board.queue(want("m", rank(0, 1), &[]));
    board.trial(WorkerKey(1), Some(2));
    assert!(board.grant().is_empty());
    assert!(board.join(WorkerKey(1)));
    assert_eq!(board.grant().to_vec(), [(other, WorkerKey(1))]);
}

#[test]
fn a_held_model_gets_its_trials_and_the_others_go_on() {
    let one = WorkerKey(1);
    let mut board = board(&[(1, &["dead", "well"], 4)]);
    let hold = |board: &mut Board, allowed| board.hold(one, vec![("dead".into(), allowed)]);
    assert!(hold(&mut board, 0));
    let dead = board.queue_for(want("dead", rank(1, 1), &[]), 9);
    assert_eq!((board.take(&want("dead", rank(1, 1), &[])), board.grant().len()), (None, 0));
    assert_eq!(board.take(&want("well", rank(0, 9), &[])), Some(one));
    assert!(hold(&mut board, 1));
    assert_eq!(board.grant().as_slice(), [(dead, one)]);
    assert!(hold(&mut board, 1) && board.grant().is_empty(), "one in all, however often that is said");
    assert_eq!(board.take(&want("well", rank(0, 9), &[])), Some(one));
    assert!(hold(&mut board, 0) && hold(&mut board, 1));
    assert_eq!(board.grant().as_slice(), [(dead, one)]);
    assert_eq!(board.take(&want("well", rank(0, 9), &[])), None, "the slots are the worker's, whatever the model");
    for model in ["dead", "dead", "well", "well"] {
        board.release(one, &nobody(model));
    }
    assert!(board.hold(one, Vec::new()), "it is answered again");
    assert_eq!(board.grant().len(), 4);
}

#[test]
fn who_must_be_alone_with_a_held_model_keeps_the_worker_only_while_it_may_be_sent() {
    let one = WorkerKey(1);
    let mut board = board(&[(1, &["dead", "well"], 4)]);
    let well = want("well", rank(0, 9), &[]);
    assert_eq!(board.take(&well), Some(one));
    let suspect = board.queue(alone("dead"));
    assert!(board.grant().is_empty());
    assert_eq!(board.take(&well), None, "kept for the suspect");
    board.hold(one, vec![("dead".into(), 0)]);
    assert!(board.grant().is_empty());
    assert_eq!(board.take(&well), Some(one), "its model is held: the others go on");
    board.hold(one, vec![("dead".into(), 1)]);
    assert!(board.grant().is_empty(), "not idle yet");
    assert_eq!(board.take(&well), None, "kept for the trial");
    board.release(one, &nobody("well"));
    board.release(one, &nobody("well"));
    assert_eq!(board.grant().as_slice(), [(suspect, one)]);
    assert_eq!(board.take(&well), None, "it is alone");
}

#[test]
fn wishes_of_one_rank_take_turns_and_what_is_free_at_once_is_one_turn() {
    let mut board = board(&[(1, &["m"], 4)]);
    let one = want("m", rank(0, 5), &[]);
    for _ in 0..4 {
        assert_eq!(board.take(&one), Some(WorkerKey(1)));
    }
    let [a, b] = [board.queue_for(one.clone(), 100), board.queue_for(one, 100)];
    let later = board.queue_for(want("m", rank(0, 6), &[]), 100);
    let mut granted = |slots: usize| {
        for _ in 0..slots {
            board.release(WorkerKey(1), &nobody("m"));
        }
        board.grant().into_iter().map(|(ticket, _)| ticket).collect::<Vec<_>>()
    };
    assert_eq!([granted(1), granted(1), granted(3), granted(2)], [vec![a], vec![b], vec![a; 3], vec![b; 2]]);
    assert_eq!(granted(1), [a], "{later:?} has a later deadline");
}

#[test]
fn a_limit_that_falls_takes_no_slot_back_and_one_that_grows_gives_more() {
    let mut board = board(&[(1, &["m"], 3)]);
    let one = want("m", rank(0, 5), &[]);
    let take = |board: &mut Board| board.take(&one).is_some();
    assert!(take(&mut board) && take(&mut board) && !board.was_full(WorkerKey(1)));
    assert!(take(&mut board) && !take(&mut board));
    board.release(WorkerKey(1), &nobody("m"));
    assert!(board.was_full(WorkerKey(1)) && !board.was_full(WorkerKey(1)), "since the last question");
    assert!(!board.relimit(WorkerKey(1), 1));
    assert_eq!(board.load(WorkerKey(1)), (2, 1));
    board.release(WorkerKey(1), &nobody("m"));
    assert!(!take(&mut board));
    assert!(board.relimit(WorkerKey(1), 4));
    assert!(take(&mut board) && take(&mut board) && take(&mut board) && !take(&mut board));
    assert!(!board.relimit(WorkerKey(9), 4), "there is no such worker");
}

#[test]
fn interactive_calls_of_two_tenants_share() {
    let mut board = board(&[(1, &["m"], 4)]);
    let [ana, bob] = [tenant(1), tenant(2)].map(|tenant| want("m", Rank::interactive().of(tenant), &[]));
    // Bob runs a large batch: that does not count against his calls.
    let batch = want("m", rank(1, 1).of(tenant(2)), &[]);
    assert!((0..4).all(|_| board.take(&batch).is_some()));
    let many = board.queue_for(ana.clone(), 1_000);
    for _ in 0..4 {
        board.release(WorkerKey(1), &batch.holder());
    }
    assert_eq!(board.grant().len(), 4, "nobody else waits");
    let few = board.queue_for(bob, 2);
    let mut order = Vec::new();
    for _ in 0..4 {
        board.release(WorkerKey(1), &ana.holder());
        order.extend(board.grant().into_iter().map(|(ticket, _)| ticket));
    }
    assert_eq!(order, [few, few, many, many], "until he has as many");
    board.more(many);
    let left = board.waiting[&many].slots;
    assert_eq!(left, 1_000 - 6 + 1);
    for _ in 0..left {
        assert!(board.is_waiting(many));
        board.fewer(many);
    }
    assert!(!board.is_waiting(many) && board.waiting.is_empty());
}

#[test]
fn nobody_jumps_the_queue() {
    let mut board = board(&[(1, &["m"], 1), (2, &["other"], 1)]);
    board.take(&want("m", rank(0, 5), &[])).unwrap();
    board.queue(want("m", rank(0, 5), &[]));
    board.release(WorkerKey(1), &nobody("m"));
    assert_eq!(board.take(&want("m", rank(0, 5), &[])), None, "somebody of the same rank waits");
    assert_eq!(board.take(&want("other", rank(0, 5), &[])), Some(WorkerKey(2)), "for another model nobody waits");
    assert_eq!(board.take(&want("m", Rank::interactive(), &[])), Some(WorkerKey(1)), "a better rank may");
}

#[test]
fn a_worker_that_failed_it_is_the_last_choice() {
    let mut board = board(&[(1, &["m"], 2), (2, &["m"], 1)]);
    assert_eq!(board.take(&want("m", rank(0, 1), &[1])), Some(WorkerKey(2)));
    assert_eq!(board.take(&want("m", rank(0, 1), &[1])), None, "better to wait for the other one");
    assert_eq!(board.take(&want("m", rank(0, 1), &[1, 2])), Some(WorkerKey(1)), "all have failed it");
    board.open(WorkerKey(2), false);
    assert_eq!(board.take(&want("m", rank(0, 1), &[1])), Some(WorkerKey(1)), "no other is there");
}

#[test]
fn a_closed_worker_gets_nothing_and_opens_to_those_who_wait() {
    let mut board = board(&[(1, &["m"], 8)]);
    assert!(board.open(WorkerKey(1), false));
    assert!(!board.open(WorkerKey(1), false));
    assert_eq!(board.take(&want("m", rank(0, 1), &[])), None);
    assert_eq!(board.capacity("m"), 0);
    let ticket = board.queue(want("m", rank(0, 1), &[]));
    assert!(board.grant().is_empty());
    board.open(WorkerKey(1), true);
    assert_eq!(board.grant().as_slice(), [(ticket, WorkerKey(1))]);
    assert_eq!(board.capacity("m"), 8);
}

#[test]
fn who_must_be_alone_gets_an_idle_worker_for_itself() {
    let mut board = board(&[(1, &["m"], 4)]);
    let normal = want("m", rank(0, 5), &[]);
    board.take(&normal).unwrap();
    board.take(&normal).unwrap();
    assert_eq!(board.take(&alone("m")), None);
    let ticket = board.queue(alone("m"));
    assert!(board.grant().is_empty());
    assert_eq!(board.take(&normal), None, "it is kept free: otherwise it would never be idle");
    let next = board.queue(want("m", Rank::interactive(), &[]));
    assert!(board.grant().is_empty());
    board.release(WorkerKey(1), &nobody("m"));
    assert!(board.grant().is_empty());
    board.release(WorkerKey(1), &nobody("m"));
    assert_eq!(board.grant().as_slice(), [(ticket, WorkerKey(1))]);
    assert_eq!(board.take(&normal), None, "nothing else goes there meanwhile");
    board.release(WorkerKey(1), &nobody("m"));
    assert_eq!(board.grant().as_slice(), [(next, WorkerKey(1))]);
}

#[test]
fn a_kept_worker_that_is_not_needed_is_for_all_again() {
    let mut board = board(&[(1, &["m"], 2), (2, &["m"], 1)]);
    let normal = want("m", rank(0, 5), &[]);
    for _ in 0..3 {
        board.take(&normal).unwrap();
    }
    let first = board.queue(alone("m"));
    let second = board.queue(alone("m"));
    assert!(board.grant().is_empty());
    board.release(WorkerKey(1), &nobody("m"));
    let kept = if board.take(&normal).is_some() { WorkerKey(2) } else { WorkerKey(1) };
    assert!(board.leave(first));
    assert!(!board.leave(second), "one at a time is kept");
    board.grant();
    board.release(kept, &nobody("m"));
    assert!(board.take(&normal).is_some());
    let last = board.queue(alone("m"));
    board.grant();
    for key in [1, 2] {
        board.open(WorkerKey(key), false);
        board.open(WorkerKey(key), true);
    }
    assert!(board.take(&normal).is_some() || board.desks[&WorkerKey(1)].in_flight == 2, "a closed worker is not kept");
    board.leave(last);
}

#[test]
fn a_small_batch_is_not_stuck_behind_a_large_one_of_another_tenant() {
    let mut board = board(&[(1, &["m"], 4)]);
    let large = |at| want("m", rank(0, at).of(tenant(1)), &[]);
    let small = want("m", rank(0, 99).of(tenant(2)), &[]);
    for _ in 0..4 {
        board.take(&large(1)).unwrap();
    }
    let waits = [board.queue(large(1)), board.queue(large(1)), board.queue(small.clone())];
    let free = |board: &mut Board, holder: &Holder| {
        board.release(WorkerKey(1), holder);
        board.grant().into_iter().map(|(ticket, _)| ticket).collect::<Vec<_>>()
    };
    assert_eq!(
        free(&mut board, &large(1).holder()),
        [waits[2]],
        "its deadline is later, but it has nothing in flight yet"
    );
    let second = board.queue(small.clone());
    assert_eq!(free(&mut board, &large(1).holder()), [second], "one against three");
    let third = board.queue(small);
    assert_eq!(free(&mut board, &large(1).holder()), [waits[0]], "now the large one has fewer");
    assert!(board.waiting.contains_key(&third));
}

proptest! {
    #[test]
    fn limits_hold_and_no_slot_is_idle_while_somebody_waits(steps in proptest::collection::vec((0u8..5, 0u32..3, 0i32..3, proptest::bool::weighted(0.2)), 1..200)) {
        let mut board = board(&[(0, &["a"], 2), (1, &["a", "b"], 3), (2, &["b"], 1)]);
        let mut out: Vec<(WorkerKey, Holder)> = Vec::new();
        let mut tickets: Vec<(Ticket, Holder)> = Vec::new();
        for (step, pick, priority, sole) in steps {
            let model = if pick == 0 { "a" } else { "b" };
            let rank = rank(priority - 1, i64::from(pick)).of(tenant(u64::from(step % 2)));
            let wish = Want { alone: sole, ..want(model, rank, &[pick]) };
            let holder = wish.holder();
            match step {
                0 => out.extend(board.take(&wish).map(|worker| (worker, holder))),
                1 => tickets.push((board.queue_for(wish, pick + 1), holder)),
                2 if !out.is_empty() => {
                    let (worker, holder) = out.swap_remove(pick as usize % out.len());
                    board.release(worker, &holder);
                }
                3 if !tickets.is_empty() => {
                    board.leave(tickets.swap_remove(0).0);
                }
                _ => {
                    let open = priority != 0;
                    board.open(WorkerKey(pick), open);
                }
            }
            for (ticket, worker) in board.grant() {
                let at = tickets.iter().position(|(other, _)| *other == ticket).unwrap();
                out.push((worker, tickets[at].1.clone()));
            }
            tickets.retain(|(ticket, _)| board.is_waiting(*ticket));
            for (key, desk) in &board.desks {
                prop_assert!(desk.in_flight <= desk.limit);
                prop_assert!(!desk.alone || desk.in_flight == 1);
                prop_assert!(desk.reserved.is_none_or(|ticket| desk.open && board.waiting.contains_key(&ticket)));
                prop_assert_eq!(desk.in_flight as usize, out.iter().filter(|(worker, _)| worker == key).count());
            }
            for (holder, held) in board.shares.held() {
                prop_assert_eq!(held as usize, out.iter().filter(|(_, other)| *other == holder).count());
            }
            prop_assert_eq!(board.shares.held().map(|(_, held)| held).sum::<u32>() as usize, out.len());
            for (_, wish, _) in board.waiting() {
                let fits = board.desks.iter().any(|(key, desk)| (if wish.alone { desk.idle(None) } else { desk.free() }) && desk.models.contains(&wish.model) && !wish.avoid.contains(key));
                prop_assert!(!fits, "a fitting slot is idle");
            }
        }
    }

    /// Tenants that always have more to send have the same number of slots, however many segments each runs, whatever
    /// their deadlines, and whoever was there first; of one tenant's segments the nearest deadline gets them.
    #[test]
    fn tenants_share(
        limit in 4u32..40,
        segments in proptest::collection::vec(1usize..5, 2..5),
        picks in proptest::collection::vec(any::<proptest::sample::Index>(), 200),
    ) {
        let mut board = board(&[(1, &["m"], limit)]);
        let mut out: Vec<Want> = Vec::new();
        let mut waiting: BTreeMap<Ticket, Want> = BTreeMap::new();
        // The first tenant has all slots before the others come.
        for (name, segments) in (1u64..).zip(&segments) {
            for segment in 0..*segments {
                let wish = want("m", rank(0, 100 / i64::try_from(name).unwrap() + segment as i64).of(tenant(name)), &[]);
                waiting.insert(board.queue(wish.clone()), wish);
            }
            // What is free is filled, and then one slot comes back at a time.
            for pick in std::iter::once(None).chain(picks.iter().map(Some)) {
                if let Some(pick) = pick {
                    let left = out.swap_remove(pick.index(out.len()));
                    board.release(WorkerKey(1), &left.holder());
                }
                loop {
                    let granted = board.grant();
                    prop_assert!(pick.is_none() || granted.len() <= 1);
                    if granted.is_empty() {
                        break;
                    }
                    for (ticket, _) in granted {
                        let wish = waiting.remove(&ticket).unwrap();
                        let better = |(rank, _): &Ticket| rank.tenant == wish.rank.tenant && *rank < wish.rank;
                        prop_assert!(pick.is_none() || !waiting.keys().any(better), "a later deadline went first");
                        out.push(wish.clone());
                        waiting.insert(board.queue(wish.clone()), wish);
                    }
                }
            }
        }
        prop_assert_eq!(out.len(), limit as usize);
        let held = |at: usize| out.iter().filter(|wish| wish.rank.tenant == tenant(at as u64 + 1)).count();
        let shares: Vec<usize> = (0..segments.len()).map(held).collect();
        let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
        prop_assert!(most - least <= 1, "{:?}", shares);
    }
}
