use proptest::prelude::*;

use super::*;
use crate::delivery::pace::HORIZON;

fn due(target: &str, count: usize) -> Due {
    Due { target: target.into(), host: target.into(), count, ahead: true }
}

/// Claims all that may be claimed and sends all that may be sent.
fn send(fairness: &mut Fairness<String>, due: &[Due], now: Instant) -> Vec<String> {
    for share in fairness.shares(due, now) {
        assert!(share.at_once <= share.count && share.count > 0);
        for _ in 0..share.count {
            fairness.claimed(&share.target, share.target.clone(), now);
        }
    }
    std::iter::from_fn(|| fairness.next(now)).collect()
}

fn counts(shares: &[Share]) -> Vec<(&str, usize, usize)> {
    let mut all: Vec<_> = shares.iter().map(|share| (share.target.as_str(), share.count, share.at_once)).collect();
    all.sort_unstable();
    all
}

#[test]
fn four_a_target_and_no_more_than_there_are() {
    let (mut fairness, now) = (Fairness::new(4, 64), Instant::now());
    let mut sent = send(&mut fairness, &[due("a", 100), due("b", 2), due("c", 0)], now);
    sent.sort();
    assert_eq!(sent.join(""), "aaaabb");
    assert!(send(&mut fairness, &[due("a", 96)], now).is_empty());
    fairness.succeeded("a", now);
    assert_eq!(send(&mut fairness, &[due("a", 96)], now), ["a"]);
}

#[test]
fn scarce_sends_go_round() {
    let (mut fairness, now) = (Fairness::new(4, 2), Instant::now());
    let all: Vec<_> = ["a", "b", "c", "d", "e"].map(|name| due(name, 10)).to_vec();
    let mut served = Vec::new();
    for _ in 0..5 {
        for target in send(&mut fairness, &all, now) {
            fairness.failed(&target, None, now);
            served.push(target);
        }
    }
    assert_eq!(served.join(""), "abcdeabcde");
}

#[test]
fn a_host_with_many_targets_leaves_half_to_others() {
    let (mut fairness, now) = (Fairness::new(4, 8), Instant::now());
    let one = |path: usize| Due { host: "one".into(), ..due(&format!("https://one/{path}"), 9) };
    let all: Vec<_> = (0..20).map(one).collect();
    assert_eq!(send(&mut fairness, &all, now).len(), 4);
    assert_eq!(send(&mut fairness, &[due("two", 9)], now), ["two"; 4]);
    let later = now + MAX_WAIT * 2;
    fairness.succeeded("https://one/0", later);
    assert!(fairness.next(later).is_none(), "what stood in line for too long is not sent");
    let unsent = fairness.unsent(later);
    assert!(unsent.iter().all(|target| target.starts_with("https://one/")));
    assert_eq!(fairness.ahead(), 0);
}

#[test]
fn five_failures_in_a_row_then_probes_from_a_second_to_a_minute() {
    let (mut fairness, mut now) = (Fairness::default(), Instant::now());
    for _ in 0..5 {
        assert_eq!(send(&mut fairness, &[due("a", 1)], now), ["a"]);
        fairness.failed("a", None, now);
    }
    for wait in [1, 2, 4, 8, 16, 32, 60, 60] {
        let wait = Duration::from_secs(wait);
        assert_eq!(fairness.held_until("a", now), Some(now + wait));
        assert!(send(&mut fairness, &[due("a", 9)], now + wait - Duration::from_millis(1)).is_empty());
        now += wait;
        assert_eq!(send(&mut fairness, &[due("a", 9)], now), ["a"], "one probe at a time");
        fairness.failed("a", None, now);
    }
    now += Duration::from_secs(60);
    send(&mut fairness, &[due("a", 9)], now);
    fairness.succeeded("a", now);
    assert_eq!(send(&mut fairness, &[due("a", 9)], now), ["a"; 4]);
}

#[test]
fn retry_after_holds_the_target_back() {
    let (mut fairness, now) = (Fairness::default(), Instant::now());
    send(&mut fairness, &[due("a", 1), due("b", 1)], now);
    fairness.failed("a", Some(Duration::from_secs(30)), now);
    let later = now + Duration::from_secs(29);
    assert_eq!(send(&mut fairness, &[due("a", 9), due("b", 9)], later), ["b"; 3]);
    assert_eq!(send(&mut fairness, &[due("a", 9)], now + Duration::from_secs(30)), ["a"; 4]);
}

#[test]
fn what_stands_in_line_follows_what_was_delivered_lately() {
    let (mut fairness, mut now) = (Fairness::new(4, 64), Instant::now());
    let all = [due("fast", 9_999), due("new", 9_999)];
    assert_eq!(counts(&fairness.shares(&all[..1], now)), [("fast", 4, 4)], "nothing is known of it");
    for _ in 0..4 {
        fairness.claimed("fast", "fast".to_owned(), now);
    }
    for _ in 0..50 {
        now += Duration::from_millis(1);
        assert_eq!(fairness.next(now).as_deref(), Some("fast"));
        fairness.succeeded("fast", now);
        for share in fairness.shares(&all[..1], now) {
            (0..share.count).for_each(|_| fairness.claimed("fast", "fast".to_owned(), now));
        }
    }
    let line = fairness.ahead();
    assert!((50..=104).contains(&line), "{line}");
    assert_eq!(fairness.drain().len(), line);
    let no_line = Due { ahead: false, ..all[0].clone() };
    for (due, most) in [(all[1].clone(), 4), (no_line, 4), (all[0].clone(), 104)] {
        let target = due.target.clone();
        let shares = fairness.shares(&[due], now);
        assert_eq!(counts(&shares), [(&*target, most, 4)]);
        fairness.give_back(&target, most);
    }
    // Five failures, and what was in line leaves it.
    let sent = send(&mut fairness, &all, now);
    assert_eq!(sent.iter().filter(|target| *target == "fast").count(), 4);
    let line = fairness.ahead();
    for _ in 0..5 {
        fairness.failed("fast", None, now);
        fairness.next(now);
    }
    assert_eq!(fairness.unsent(now).len(), line - 4);
    assert_eq!(fairness.shares(&all[..1], now), []);
}

#[test]
fn where_nothing_ends_nothing_is_claimed_ahead() {
    let (mut fairness, now) = (Fairness::new(4, 8), Instant::now());
    let all: Vec<_> = (0..20).map(|name| due(&name.to_string(), 100)).collect();
    assert_eq!(send(&mut fairness, &all, now).len(), 8);
    let later = now + MAX_WAIT * 2;
    assert_eq!((fairness.ahead(), fairness.unsent(later).len()), (32, 32));
    assert_eq!((fairness.ahead(), fairness.shares(&all, later)), (0, Vec::new()));
}

#[test]
fn targets_at_rest_are_forgotten() {
    let (mut fairness, now) = (Fairness::default(), Instant::now());
    send(&mut fairness, &[due("a", 1), due("b", 1)], now);
    assert_eq!(fairness.shares(&[due("c", 1)], now).len(), 1);
    fairness.succeeded("a", now);
    fairness.failed("b", None, now);
    fairness.forget_idle(now + HORIZON * 2);
    assert_eq!(fairness.targets.len(), 2);
    fairness.give_back("c", 1);
    fairness.forget_idle(now + Duration::from_secs(3_600));
    assert_eq!((fairness.targets.len(), fairness.hosts.len()), (0, 0));
    assert_eq!((fairness.free(), fairness.ahead()), (IN_FLIGHT, 0));
}

proptest! {
    /// Whatever happens: the limits hold, whatever was claimed is sent or given back, once, and nothing waits for long.
    #[test]
    fn limits_always_hold_and_all_come_back(
        steps in proptest::collection::vec((0usize..6, 0usize..40, 0u64..9_000, 0usize..12, any::<bool>()), 1..120),
    ) {
        let mut fairness = Fairness::new(4, 10);
        let mut now = Instant::now();
        let mut flying: Vec<(usize, usize)> = Vec::new();
        let (mut claimed, mut gone) = (0, std::collections::HashSet::new());
        for (which, count, later, ends, good) in steps {
            now += Duration::from_millis(later);
            let all: Vec<_> = (0..6)
                .map(|name| {
                    let count = if name == which { count } else { 9 };
                    Due { host: (name / 3).to_string(), ..due(&name.to_string(), count) }
                })
                .collect();
            for share in fairness.shares(&all, now) {
                let flying = flying.iter().filter(|(target, _)| target.to_string() == share.target).count();
                prop_assert!(flying + share.at_once <= 4);
                let there = if good { share.count } else { share.count / 2 };
                for _ in 0..there {
                    fairness.claimed(&share.target, (share.target.parse().unwrap(), claimed), now);
                    claimed += 1;
                }
                fairness.give_back(&share.target, share.count - there);
            }
            for (_, id) in fairness.unsent(now) {
                prop_assert!(gone.insert(id), "given back once");
            }
            while let Some(one) = fairness.next(now) {
                flying.push(one);
            }
            prop_assert_eq!(flying.len() + fairness.free(), 10);
            prop_assert_eq!(claimed, flying.len() + fairness.ahead() + gone.len() + fairness.unsent.len());
            for name in 0..6 {
                prop_assert!(flying.iter().filter(|(target, _)| *target == name).count() <= 4);
            }
            for host in 0..2 {
                prop_assert!(flying.iter().filter(|(target, _)| target / 3 == host).count() <= 5);
            }
            for _ in 0..ends.min(flying.len()) {
                let (target, id) = flying.swap_remove(which % flying.len());
                prop_assert!(gone.insert(id), "sent once");
                let target = target.to_string();
                if good { fairness.succeeded(&target, now) } else { fairness.failed(&target, None, now) }
            }
            fairness.forget_idle(now);
        }
        // Nothing is stuck: with every end the next goes.
        for _ in 0..claimed {
            while let Some(one) = fairness.next(now) {
                flying.push(one);
            }
            let Some((target, id)) = flying.pop() else { break };
            prop_assert!(gone.insert(id), "sent once");
            fairness.succeeded(&target.to_string(), now);
        }
        for (_, id) in fairness.unsent(now) {
            prop_assert!(gone.insert(id), "given back once");
        }
        prop_assert_eq!((gone.len(), fairness.ahead(), fairness.free()), (claimed, 0, 10));
    }
}
