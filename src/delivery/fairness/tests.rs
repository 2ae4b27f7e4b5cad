use proptest::prelude::*;

use super::*;

fn due(target: &str) -> Due {
    of("me", target, target)
}

fn of(owner: &str, host: &str, target: &str) -> Due {
    Due { owner: owner.into(), host: host.into(), target: target.into() }
}

/// Sends all that may be sent.
fn send(fairness: &mut Fairness, due: &[Due], now: Instant) -> Vec<String> {
    let shares = fairness.shares(due, now);
    assert!(shares.iter().all(|share| share.count > 0));
    shares.into_iter().flat_map(|share| std::iter::repeat_n(share.target, share.count)).collect()
}

/// Sends one to a target that has more.
fn send_one(fairness: &mut Fairness, due: &Due, now: Instant) {
    let sent = send(fairness, std::slice::from_ref(due), now).len();
    assert!(sent > 0, "{due:?}");
    fairness.give_back(&due.owner, &due.target, sent - 1);
}

/// A target that has taken a delivery just now.
fn answers(fairness: &mut Fairness, due: &Due, now: Instant) {
    send_one(fairness, due, now);
    fairness.succeeded(&due.owner, &due.target, now);
}

fn failed(fairness: &mut Fairness, target: &str, now: Instant) {
    fairness.failed(&"me".into(), target, None, now);
}

#[test]
fn four_a_target_and_no_more() {
    let (mut fairness, now) = (Fairness::new(4, 64), Instant::now());
    assert_eq!(send(&mut fairness, &[due("a"), due("b")], now).join(""), "aaaabbbb");
    assert!(send(&mut fairness, &[due("a")], now).is_empty());
    fairness.give_back(&"me".into(), "b", 2);
    assert_eq!(send(&mut fairness, &[due("a"), due("b")], now).join(""), "bb");
    failed(&mut fairness, "a", now);
    assert_eq!(send(&mut fairness, &[due("a")], now), ["a"]);
    assert!(send(&mut fairness, &[of("other", "a", "a")], now).len() == 4, "of each owner");
}

#[test]
fn scarce_sends_go_round() {
    let (mut fairness, now) = (Fairness::new(4, 8), Instant::now());
    let all: Vec<_> = ["a", "b", "c", "d", "e"].map(due).to_vec();
    let mut served: std::collections::HashMap<String, usize> = std::collections::HashMap::new();
    for _ in 0..10 {
        for target in send(&mut fairness, &all, now) {
            failed(&mut fairness, &target, now);
            *served.entry(target).or_default() += 1;
        }
    }
    let (least, most) = (served.values().min().unwrap(), served.values().max().unwrap());
    assert!(served.len() == 5 && most - least <= 1, "{served:?}");
}

/// Ten owners with targets on eight hosts, one of them with a hundred: it has as many turns as each of the others.
#[test]
fn turns_go_round_the_owners_first() {
    let (mut fairness, now) = (Fairness::new(4, 40), Instant::now());
    let few = |owner: usize| (0..8).map(move |n| of(&format!("o{owner}"), &format!("h{n}"), &format!("o{owner} {n}")));
    let mut all: Vec<_> = (0..9).flat_map(few).collect();
    all.extend((0..100).map(|n| of("many", &format!("host {n}"), &format!("many {n}"))));
    let mut served = std::collections::HashMap::<String, usize>::new();
    for _ in 0..100 {
        for target in send(&mut fairness, &all, now) {
            let owner = target.split(' ').next().unwrap().to_owned();
            fairness.failed(&owner.as_str().into(), &target, None, now);
            *served.entry(owner).or_default() += 1;
        }
        // Failing is not what this is about.
        for owner in fairness.owners.values_mut() {
            owner.targets.values_mut().for_each(|target| target.succeeded(now - LATELY * 2));
        }
    }
    let (least, most) = (served.values().min().unwrap(), served.values().max().unwrap());
    assert!(served.len() == 10 && most - least <= most / 20, "{served:?}");
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
    let sent = send(&mut fairness, &all, now);
    assert!(sent.iter().filter(|target| *target == "good").count() == 4, "{sent:?}");
    assert!(sent.iter().any(|target| target == "new"), "{sent:?}");
    // One that has answered gets its share whatever hangs.
    answers(&mut fairness, &of("bad", "four", "well"), now);
    assert_eq!(send(&mut fairness, &[of("bad", "four", "well")], now), ["well"; 4]);
}

/// However many owners have nothing but receivers that hang, there is a place for the next.
#[test]
fn many_owners_with_hanging_receivers_leave_places_to_the_next() {
    let (mut fairness, now) = (Fairness::new(4, 256), Instant::now());
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
    assert_eq!(send(&mut fairness, &[due("two")], now), ["two"; 4]);
}

#[test]
fn five_failures_in_a_row_then_probes_from_a_second_to_a_minute() {
    let (mut fairness, mut now) = (Fairness::default(), Instant::now());
    let me: Owner = "me".into();
    for _ in 0..5 {
        send_one(&mut fairness, &due("a"), now);
        failed(&mut fairness, "a", now);
    }
    for wait in [1, 2, 4, 8, 16, 32, 60, 60] {
        let wait = Duration::from_secs(wait);
        assert_eq!(fairness.held_until(&me, "a", now), Some(now + wait));
        assert!(send(&mut fairness, &[due("a")], now + wait - Duration::from_millis(1)).is_empty());
        now += wait;
        assert_eq!(send(&mut fairness, &[due("a")], now), ["a"], "one probe at a time");
        failed(&mut fairness, "a", now);
    }
    assert_eq!(fairness.held_until(&"other".into(), "a", now), None, "others' deliveries may go well");
    now += Duration::from_secs(60);
    send(&mut fairness, &[due("a")], now);
    fairness.succeeded(&me, "a", now);
    assert_eq!(send(&mut fairness, &[due("a")], now), ["a"; 4]);
}

#[test]
fn retry_after_holds_the_target_back() {
    let (mut fairness, now) = (Fairness::default(), Instant::now());
    send_one(&mut fairness, &due("a"), now);
    send_one(&mut fairness, &due("b"), now);
    fairness.failed(&"me".into(), "a", Some(Duration::from_secs(30)), now);
    let later = now + Duration::from_secs(29);
    assert_eq!(send(&mut fairness, &[due("a"), due("b")], later), ["b"; 3]);
    assert_eq!(send(&mut fairness, &[due("a")], now + Duration::from_secs(30)), ["a"; 4]);
}

#[test]
fn targets_at_rest_are_forgotten() {
    let (mut fairness, now) = (Fairness::default(), Instant::now());
    send_one(&mut fairness, &due("a"), now);
    send_one(&mut fairness, &due("b"), now);
    send_one(&mut fairness, &due("c"), now);
    fairness.succeeded(&"me".into(), "a", now);
    failed(&mut fairness, "b", now);
    fairness.forget_idle(now + LATELY + Duration::from_secs(1));
    assert_eq!(fairness.owners[&Owner::from("me")].targets.len(), 2, "one failed, one is being sent to");
    assert_eq!(fairness.owners[&Owner::from("me")].hosts.len(), 2);
    fairness.give_back(&"me".into(), "c", 1);
    fairness.forget_idle(now + Duration::from_secs(3_600));
    assert!(fairness.owners.is_empty());
    assert_eq!(fairness.free(), IN_FLIGHT);
}

const OWNERS: usize = 3;
/// Targets of each owner, two to a host.
const TARGETS: usize = 4;
const LIMIT: usize = 20;

proptest! {
    /// Whatever happens: the limits hold, and every place comes back.
    #[test]
    fn limits_always_hold_and_all_come_back(
        steps in proptest::collection::vec((0usize..12, 0u64..9_000, 0usize..12, any::<bool>()), 1..120),
    ) {
        let mut fairness = Fairness::new(4, LIMIT);
        let mut now = Instant::now();
        let mut flying: Vec<usize> = Vec::new();
        let owner_of = |target: usize| Owner::from(format!("o{}", target / TARGETS));
        for (which, later, ends, good) in steps {
            now += Duration::from_millis(later);
            let all: Vec<_> = (0..OWNERS * TARGETS)
                .filter(|name| *name != which)
                .map(|name| of(owner_of(name).as_str(), &(name / 2).to_string(), &name.to_string()))
                .collect();
            for share in fairness.shares(&all, now) {
                let there = if good { share.count } else { share.count / 2 };
                let target: usize = share.target.parse().unwrap();
                flying.extend(std::iter::repeat_n(target, there));
                fairness.give_back(&share.owner, &share.target, share.count - there);
                let of_owner = flying.iter().filter(|one| **one / TARGETS == target / TARGETS).count();
                prop_assert!(of_owner <= LIMIT / 2, "an owner leaves as much as it takes");
                prop_assert!(flying.iter().filter(|one| **one == target).count() <= 4);
            }
            prop_assert_eq!(flying.len() + fairness.free(), LIMIT);
            for (name, owner) in &fairness.owners {
                let in_flight = flying.iter().filter(|target| owner_of(**target) == *name).count();
                prop_assert_eq!(owner.counts.sends, in_flight);
                prop_assert_eq!(owner.counts.sends, owner.hosts.values().map(|host| host.counts.sends).sum::<usize>());
                prop_assert_eq!(owner.counts.unsure, owner.hosts.values().map(|host| host.counts.unsure).sum::<usize>());
                prop_assert!(owner.counts.unsure <= (LIMIT / 4).max(1));
            }
            for _ in 0..ends.min(flying.len()) {
                let target = flying.swap_remove(which % flying.len());
                let (owner, target) = (owner_of(target), target.to_string());
                if good { fairness.succeeded(&owner, &target, now) } else { fairness.failed(&owner, &target, None, now) }
            }
            fairness.forget_idle(now);
        }
        for target in flying {
            fairness.succeeded(&owner_of(target), &target.to_string(), now);
        }
        prop_assert_eq!(fairness.free(), LIMIT);
        fairness.forget_idle(now + Duration::from_secs(7_200));
        prop_assert!(fairness.owners.is_empty());
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
        let (mut fairness, mut now) = (Fairness::new(4, limit), Instant::now());
        // The owners before go on asking.
        let mut all = Vec::new();
        for (owner, (hosts, paths)) in hostile.iter().take(limit / 16).enumerate() {
            for n in 0..hosts * paths {
                all.push(of(&format!("o{owner}"), &format!("h{}", n % hosts), &format!("{owner} {n}")));
            }
            for _ in 0..3 {
                now += Duration::from_secs(10);
                send(&mut fairness, &all, now);
            }
        }
        all.push(of("zz", "good", "good"));
        let sent = send(&mut fairness, &all, now);
        prop_assert!(sent.iter().any(|target| target == "good"), "{} in flight of {limit}", limit - fairness.free());
    }
}
