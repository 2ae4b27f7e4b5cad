use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::delivery::pace::HORIZON;

fn due(target: &str, count: usize) -> Due {
    Due { owner: "me".into(), target: target.into(), host: target.into(), count, ahead: true }
}

fn of(owner: &str, host: &str, target: &str) -> Due {
    Due { owner: owner.into(), host: host.into(), ..due(target, usize::MAX) }
}

/// Claims all that may be claimed and sends all that may be sent.
fn send(fairness: &mut Fairness<String>, due: &[Due], now: Instant) -> Vec<String> {
    for share in fairness.shares(due, now) {
        assert!(share.at_once <= share.count && share.count > 0);
        for _ in 0..share.count {
            fairness.claimed(&share.owner, &share.target, share.target.clone(), now);
        }
    }
    std::iter::from_fn(|| fairness.next(now)).collect()
}

fn counts(shares: &[Share]) -> Vec<(&str, usize, usize)> {
    let mut all: Vec<_> = shares.iter().map(|share| (share.target.as_str(), share.count, share.at_once)).collect();
    all.sort_unstable();
    all
}

/// A target that has taken a delivery just now.
fn answers(fairness: &mut Fairness<String>, due: &Due, now: Instant) {
    let one = Due { count: 1, ..due.clone() };
    assert_eq!(send(fairness, &[one], now), [due.target.as_str()]);
    fairness.succeeded(&due.owner, &due.target, now);
}

#[test]
fn four_a_target_and_no_more_than_there_are() {
    let (mut fairness, now) = (Fairness::new(4, 64), Instant::now());
    let mut sent = send(&mut fairness, &[due("a", 100), due("b", 2), due("c", 0)], now);
    sent.sort();
    assert_eq!(sent.join(""), "aaaabb");
    assert!(send(&mut fairness, &[due("a", 96)], now).is_empty());
    fairness.failed("me", "a", None, now);
    assert_eq!(send(&mut fairness, &[due("a", 96)], now), ["a"]);
    assert!(send(&mut fairness, &[of("other", "a", "a")], now).len() == 4, "of each owner");
}

#[test]
fn scarce_sends_go_round() {
    let (mut fairness, now) = (Fairness::new(4, 8), Instant::now());
    let all: Vec<_> = ["a", "b", "c", "d", "e"].map(|name| due(name, 10)).to_vec();
    let mut served = Vec::new();
    for _ in 0..10 {
        for target in send(&mut fairness, &all, now) {
            fairness.failed("me", &target, None, now);
            served.push(target);
        }
    }
    assert_eq!(served.join(""), "abcdeabcde", "{served:?}");
}

/// Ten owners, one of them with a hundred targets on a hundred hosts: it has as many turns as each of the others.
#[test]
fn turns_go_round_the_owners_first() {
    let (mut fairness, now) = (Fairness::new(4, 40), Instant::now());
    let mut all: Vec<_> = (0..9).map(|n| of(&format!("o{n}"), "host", &format!("o{n}"))).collect();
    all.extend((0..100).map(|n| of("many", &format!("host {n}"), "many")));
    let mut served = std::collections::HashMap::<String, usize>::new();
    for _ in 0..100 {
        for target in send(&mut fairness, &all, now) {
            let owner = target.clone();
            fairness.failed(&owner, &target, None, now);
            *served.entry(owner).or_default() += 1;
        }
        // Failing is not what this is about.
        for owner in fairness.owners.values_mut() {
            owner.targets.values_mut().for_each(|target| target.succeeded(now - LATELY * 2));
        }
    }
    let (least, most) = (served.values().min().unwrap(), served.values().max().unwrap());
    assert!(served.len() == 10 && most - least <= most / 5, "{served:?}");
}

/// Two hosts of one owner that hang, eight paths each: others are sent at once, and so are the owner's other receivers.
#[test]
fn whoever_has_hanging_receivers_only_holds_up_nobody() {
    let (mut fairness, now) = (Fairness::new(4, 64), Instant::now());
    let mut all: Vec<_> = (0..16).map(|n| of("bad", ["one", "two"][n % 2], &format!("http://{n}"))).collect();
    let hanging = send(&mut fairness, &all, now).len();
    assert!((8..=12).contains(&hanging), "{hanging}");
    all.push(of("bad", "three", "new"));
    all.push(of("other", "good", "good"));
    let later = now + MAX_WAIT * 2;
    fairness.unsent(later);
    let sent = send(&mut fairness, &all, later);
    assert!(sent.iter().filter(|target| *target == "good").count() == 4, "{sent:?}");
    assert!(sent.iter().any(|target| target == "new"), "{sent:?}");
    // One that has answered gets its share whatever hangs.
    answers(&mut fairness, &of("bad", "four", "well"), later);
    assert_eq!(send(&mut fairness, &[of("bad", "four", "well")], later), ["well"; 4]);
}

/// However many owners have nothing but receivers that hang, there is a place for the next.
#[test]
fn many_owners_with_hanging_receivers_leave_places_to_the_next() {
    let (mut fairness, now) = (Fairness::<String>::new(4, 256), Instant::now());
    let all: Vec<_> = (0..40)
        .flat_map(|owner| {
            (0..64).map(move |n| of(&format!("o{owner}"), &format!("h{}", n % 8), &format!("{owner} {n}")))
        })
        .collect();
    let hanging = send(&mut fairness, &all, now).len();
    assert!((150..=250).contains(&hanging), "{hanging}");
    assert_eq!(send(&mut fairness, &[of("good", "h", "good")], now)[..2], ["good", "good"]);
}

#[test]
fn an_owner_alone_gets_half_and_leaves_half() {
    let (mut fairness, now) = (Fairness::new(4, 64), Instant::now());
    let all: Vec<_> = (0..100).map(|n| of("one", &format!("h{n}"), &format!("{n}"))).collect();
    for due in &all {
        answers(&mut fairness, due, now);
    }
    assert_eq!(send(&mut fairness, &all, now).len(), 32);
    let others: Vec<_> = (0..100).map(|n| of("two", &format!("h{n}"), &format!("{n}"))).collect();
    for due in &others[..20] {
        answers(&mut fairness, due, now);
    }
    assert_eq!(send(&mut fairness, &others[..20], now).len(), 16, "half of what is free");
}

#[test]
fn a_host_with_many_targets_leaves_places_to_the_owners_other_hosts() {
    let (mut fairness, now) = (Fairness::new(4, 60), Instant::now());
    let all: Vec<_> = (0..50).map(|n| of("me", "one", &format!("https://one/{n}"))).collect();
    for due in &all {
        answers(&mut fairness, due, now);
    }
    let sent = send(&mut fairness, &all, now).len();
    assert!((18..=22).contains(&sent), "{sent}");
    assert_eq!(send(&mut fairness, &[due("two", 9)], now), ["two"; 4]);
    let later = now + MAX_WAIT * 2;
    fairness.succeeded("me", "https://one/0", later);
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
        fairness.failed("me", "a", None, now);
    }
    for wait in [1, 2, 4, 8, 16, 32, 60, 60] {
        let wait = Duration::from_secs(wait);
        assert_eq!(fairness.held_until("me", "a", now), Some(now + wait));
        assert!(send(&mut fairness, &[due("a", 9)], now + wait - Duration::from_millis(1)).is_empty());
        now += wait;
        assert_eq!(send(&mut fairness, &[due("a", 9)], now), ["a"], "one probe at a time");
        fairness.failed("me", "a", None, now);
    }
    assert_eq!(fairness.held_until("other", "a", now), None, "others' deliveries may go well");
    now += Duration::from_secs(60);
    send(&mut fairness, &[due("a", 9)], now);
    fairness.succeeded("me", "a", now);
    assert_eq!(send(&mut fairness, &[due("a", 9)], now), ["a"; 4]);
}

#[test]
fn retry_after_holds_the_target_back() {
    let (mut fairness, now) = (Fairness::default(), Instant::now());
    send(&mut fairness, &[due("a", 1), due("b", 1)], now);
    fairness.failed("me", "a", Some(Duration::from_secs(30)), now);
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
        fairness.claimed("me", "fast", "fast".to_owned(), now);
    }
    for _ in 0..50 {
        now += Duration::from_millis(1);
        assert_eq!(fairness.next(now).as_deref(), Some("fast"));
        fairness.succeeded("me", "fast", now);
        for share in fairness.shares(&all[..1], now) {
            (0..share.count).for_each(|_| fairness.claimed("me", "fast", "fast".to_owned(), now));
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
        fairness.give_back("me", &target, most);
    }
    // Five failures, and what was in line leaves it.
    let sent = send(&mut fairness, &all, now);
    assert_eq!(sent.iter().filter(|target| *target == "fast").count(), 4);
    let line = fairness.ahead();
    for _ in 0..5 {
        fairness.failed("me", "fast", None, now);
        fairness.next(now);
    }
    assert_eq!(fairness.unsent(now).len(), line - 4);
    assert_eq!(fairness.shares(&all[..1], now), []);
}

/// The line of an owner whose receivers are quick leaves room for whoever comes next.
#[test]
fn a_line_is_never_one_owners_alone() {
    let (mut fairness, now) = (Fairness::<String>::new(4, 64), Instant::now());
    let quick = |owner: &str| (0..40).map(|n| of(owner, &format!("h{n}"), &format!("{owner}{n}"))).collect::<Vec<_>>();
    for owner in ["one", "two"] {
        for due in quick(owner) {
            for _ in 0..20 {
                answers(&mut fairness, &due, now);
            }
        }
    }
    let of_one: usize = fairness.shares(&quick("one"), now).iter().map(|share| share.count).sum();
    assert!((600..AHEAD).contains(&of_one), "{of_one}");
    let of_two: usize = fairness.shares(&quick("two"), now).iter().map(|share| share.count).sum();
    assert!(of_two >= 100, "{of_two}");
    assert!(fairness.ahead() <= AHEAD + 64);
}

#[test]
fn targets_at_rest_are_forgotten() {
    let (mut fairness, now) = (Fairness::default(), Instant::now());
    send(&mut fairness, &[due("a", 1), due("b", 1)], now);
    assert_eq!(fairness.shares(&[due("c", 1)], now).len(), 1);
    fairness.succeeded("me", "a", now);
    fairness.failed("me", "b", None, now);
    fairness.forget_idle(now + LATELY + HORIZON * 2);
    assert_eq!(fairness.owners["me"].targets.len(), 2);
    assert_eq!(fairness.owners["me"].hosts.len(), 2);
    fairness.give_back("me", "c", 1);
    fairness.forget_idle(now + Duration::from_secs(3_600));
    assert!(fairness.owners.is_empty());
    assert_eq!((fairness.free(), fairness.ahead()), (IN_FLIGHT, 0));
}

const OWNERS: usize = 3;
/// Targets of each owner, two to a host.
const TARGETS: usize = 4;
const LIMIT: usize = 20;

proptest! {
    /// Whatever happens: the limits hold, whatever was claimed is sent or given back, once, and nothing waits for long.
    #[test]
    fn limits_always_hold_and_all_come_back(
        steps in proptest::collection::vec((0usize..12, 0usize..40, 0u64..9_000, 0usize..12, any::<bool>()), 1..120),
    ) {
        let mut fairness = Fairness::new(4, LIMIT);
        let mut now = Instant::now();
        let mut flying: Vec<(usize, usize)> = Vec::new();
        let (mut claimed, mut gone) = (0, HashSet::new());
        let owner_of = |target: usize| format!("o{}", target / TARGETS);
        for (which, count, later, ends, good) in steps {
            now += Duration::from_millis(later);
            let all: Vec<_> = (0..OWNERS * TARGETS)
                .map(|name| {
                    let count = if name == which { count } else { 9 };
                    Due { count, ..of(&owner_of(name), &(name / 2).to_string(), &name.to_string()) }
                })
                .collect();
            for share in fairness.shares(&all, now) {
                let flying = flying.iter().filter(|(target, _)| target.to_string() == share.target).count();
                prop_assert!(flying + share.at_once <= 4);
                let there = if good { share.count } else { share.count / 2 };
                for _ in 0..there {
                    let one = (share.target.parse().unwrap(), claimed);
                    fairness.claimed(&share.owner, &share.target, one, now);
                    claimed += 1;
                }
                fairness.give_back(&share.owner, &share.target, share.count - there);
            }
            for (_, id) in fairness.unsent(now) {
                prop_assert!(gone.insert(id), "given back once");
            }
            while let Some(one) = fairness.next(now) {
                let of_owner = flying.iter().filter(|(target, _)| target / TARGETS == one.0 / TARGETS).count();
                prop_assert!(of_owner < LIMIT - flying.len(), "an owner leaves as much as it takes");
                flying.push(one);
            }
            prop_assert_eq!(flying.len() + fairness.free(), LIMIT);
            prop_assert_eq!(claimed, flying.len() + fairness.ahead() + gone.len() + fairness.unsent.len());
            for name in 0..OWNERS * TARGETS {
                prop_assert!(flying.iter().filter(|(target, _)| *target == name).count() <= 4);
            }
            for (name, owner) in &fairness.owners {
                let mine = |target: usize| owner_of(target) == **name;
                let in_flight = flying.iter().filter(|(target, _)| mine(*target)).count();
                prop_assert_eq!(owner.counts.sends, in_flight);
                prop_assert_eq!(owner.counts.sends, owner.hosts.values().map(|host| host.counts.sends).sum::<usize>());
                prop_assert_eq!(owner.counts.unsure, owner.hosts.values().map(|host| host.counts.unsure).sum::<usize>());
                prop_assert_eq!(owner.counts.ahead, owner.hosts.values().map(|host| host.counts.ahead).sum::<usize>());
                prop_assert!(owner.counts.unsure <= (LIMIT / 4).max(1));
            }
            for _ in 0..ends.min(flying.len()) {
                let (target, id) = flying.swap_remove(which % flying.len());
                prop_assert!(gone.insert(id), "sent once");
                let (owner, target) = (owner_of(target), target.to_string());
                if good { fairness.succeeded(&owner, &target, now) } else { fairness.failed(&owner, &target, None, now) }
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
            fairness.succeeded(&owner_of(target), &target.to_string(), now);
        }
        for (_, id) in fairness.unsent(now) {
            prop_assert!(gone.insert(id), "given back once");
        }
        prop_assert_eq!((gone.len(), fairness.ahead(), fairness.free()), (claimed, 0, LIMIT));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Owners whose receivers all hang come one after the other, each with as many hosts and paths as it likes: whoever comes
    /// next with one receiver is served at once, as long as there are not more of them than a quarter of the places.
    #[test]
    fn a_newcomer_is_served_beside_any_hanging_owners(
        hostile in proptest::collection::vec((1usize..20, 1usize..10), 0..24),
        limit in 64usize..400,
    ) {
        let (mut fairness, mut now) = (Fairness::<String>::new(4, limit), Instant::now());
        // The owners before go on asking.
        let mut all = Vec::new();
        for (owner, (hosts, paths)) in hostile.iter().take(limit / 16).enumerate() {
            for n in 0..hosts * paths {
                all.push(of(&format!("o{owner}"), &format!("h{}", n % hosts), &format!("{owner} {n}")));
            }
            for _ in 0..3 {
                now += MAX_WAIT * 2;
                fairness.unsent(now);
                send(&mut fairness, &all, now);
            }
        }
        all.push(of("zz", "good", "good"));
        let sent = send(&mut fairness, &all, now);
        prop_assert!(sent.iter().any(|target| target == "good"), "{} in flight of {limit}", limit - fairness.free());
    }
}
