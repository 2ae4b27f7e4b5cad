use proptest::prelude::*;

use super::*;

const SIGN: Sign = Sign::Status(502);

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// One that has just been found to be at fault at `now`.
fn at_fault(now: Instant) -> Outage {
    let mut outage = Outage::default();
    for request in 0..REQUESTS as u64 {
        let (workers, verdict) = outage.failed(SIGN, request, now, now);
        assert_eq!(workers, request + 1 == REQUESTS as u64);
        assert_eq!(verdict.is_workers(), workers);
    }
    outage
}

#[tokio::test(start_paused = true)]
async fn many_requests_that_fail_alike_without_a_success_are_the_workers_fault() {
    let now = Instant::now();
    let mut outage = Outage::default();
    let (_, first) = outage.failed(SIGN, 0, now, now);
    assert!(first.is_open() && outage.gate(now) == Gate::Open);
    for request in 1..REQUESTS as u64 {
        outage.failed(SIGN, request, now, now + ms(request));
    }
    let found = now + ms(REQUESTS as u64 - 1);
    assert!(first.is_workers(), "what failed before is not the requests' fault either");
    assert_eq!(outage.complaint(), Some((SIGN, now)), "since the first failure");
    assert_eq!(outage.gate(found), Gate::Closed);
    assert_eq!(outage.changes_at(found), Some(found + FIRST_GAP));
}

#[tokio::test(start_paused = true)]
async fn many_lines_that_fail_alike_just_after_a_success_are_no_outage_until_it_lasts() {
    let now = Instant::now();
    let mut outage = Outage::default();
    outage.succeeded(now);
    for request in 0..1_000 {
        let (workers, _) = outage.failed(SIGN, request, now, now + GRACE - ms(1));
        assert!(!workers);
    }
    assert!(outage.failed(SIGN, 0, now, now + GRACE).0);
}

#[tokio::test(start_paused = true)]
async fn one_request_alone_is_at_fault_itself_however_often_it_fails() {
    let now = Instant::now();
    let mut outage = Outage::default();
    for _ in 0..1_000 {
        assert!(!outage.failed(SIGN, 7, now, now).0);
    }
    assert_eq!((outage.gate(now), outage.complaint()), (Gate::Open, None));
}

#[tokio::test(start_paused = true)]
async fn requests_that_fail_while_others_succeed_are_at_fault_themselves() {
    let now = Instant::now();
    let mut outage = Outage::default();
    for request in 0..1_000 {
        let (workers, verdict) = outage.failed(SIGN, request, now, now);
        assert!(!workers && verdict.is_open());
        if request % 4 == 3 {
            outage.succeeded(now);
            assert!(!verdict.is_open() && !verdict.is_workers());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn small_batches_that_fail_one_after_the_other_are_no_outage() {
    let mut now = Instant::now();
    let mut outage = Outage::default();
    for request in 0..100 {
        assert!(!outage.failed(SIGN, request, now, now).0);
        if request % 5 == 4 {
            now += FORGOTTEN;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn failures_of_many_kinds_are_no_outage_and_a_few_strays_among_them_do_not_hide_one() {
    let now = Instant::now();
    let mut outage = Outage::default();
    for request in 0..40 {
        let sign = Sign::Status(500 + u16::try_from(request % 4).unwrap());
        assert!(!outage.failed(sign, request, now, now).0, "each line has its own");
    }
    let mut outage = Outage::default();
    let workers = |request| {
        let sign = if request % 8 == 0 { Sign::Status(504) } else { SIGN };
        outage.failed(sign, request, now, now).0
    };
    assert_eq!((0..40).position(workers), Some(9));
}

#[tokio::test(start_paused = true)]
async fn connections_that_break_together_are_one_failure() {
    let mut now = Instant::now();
    let mut outage = Outage::default();
    let mut request = 0;
    for _ in 0..REQUESTS - 1 {
        for _ in 0..64 {
            assert!(!outage.failed(Sign::Broken, request, now, now).0);
            request += 1;
        }
        now += ms(2_000);
    }
    assert!(outage.failed(Sign::Broken, request, now, now).0, "it breaks off whatever comes, again and again");
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_cuts_off_whatever_comes_is_at_fault_and_one_that_stops_once_is_not() {
    let mut now = Instant::now();
    let mut outage = Outage::default();
    for request in 0..64 {
        assert!(!outage.failed(Sign::CutOff, request, now, now).0, "a stop cuts all of them off");
    }
    for request in 1..REQUESTS as u64 {
        assert_eq!(outage.complaint(), None);
        now += TOGETHER;
        outage.failed(Sign::CutOff, request, now, now);
    }
    assert_eq!(outage.complaint().unwrap().0.to_string(), "cuts off every answer");
    let mut outage = Outage::default();
    for _ in 0..100 {
        now += TOGETHER;
        assert!(!outage.failed(Sign::CutOff, 7, now, now).0, "one request alone");
    }
    let (sign, since) = outage.suspicion(now).unwrap();
    assert_eq!((sign, since), (Sign::CutOff, now - TOGETHER * 99), "its batch says what it waits for");
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_over_when_another_kind_of_answer_shows_it() {
    for (before, now_it_is, ends) in [
        (Sign::Broken, Sign::CutOff, true),
        (Sign::Broken, SIGN, true),
        (Sign::Broken, Sign::Bad(1), true),
        (SIGN, Sign::CutOff, true),
        (Sign::Bad(1), Sign::CutOff, true),
        (SIGN, Sign::Bad(1), false),
        (SIGN, Sign::Broken, false),
        (Sign::CutOff, SIGN, false),
    ] {
        let (mut outage, mut now) = (Outage::default(), Instant::now());
        for request in 0..REQUESTS as u64 {
            now += TOGETHER;
            outage.failed(before, request, now, now);
        }
        assert_eq!(outage.complaint().unwrap().0, before);
        let (at_fault, _) = outage.failed(now_it_is, 99, now, now + ms(1));
        assert!(at_fault && outage.complaint().is_some(), "it was sent before");
        now += FIRST_GAP;
        let (at_fault, verdict) = outage.failed(now_it_is, 100, now, now);
        assert_eq!((at_fault, outage.complaint().is_none()), (!ends, ends), "{before:?} {now_it_is:?}");
        assert!(!ends || (verdict.is_open() && outage.gate(now) == Gate::Open), "{before:?} {now_it_is:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_says_nothing_else_shows_that_connections_hold() {
    let mut now = Instant::now();
    let mut outage = Outage::default();
    for request in 0..3 {
        outage.failed(Sign::Broken, request, now, now);
        now += SUSPICIOUS;
    }
    assert_eq!(outage.suspicion(now).unwrap().0, Sign::Broken);
    assert!(!outage.answered_otherwise(now));
    assert_eq!(outage.suspicion(now), None);
    for request in 0..REQUESTS as u64 {
        outage.failed(Sign::Broken, request, now, now);
        now += TOGETHER;
    }
    assert!(outage.complaint().is_some());
    assert!(!outage.answered_otherwise(now - FIRST_GAP - TOGETHER), "it was sent before");
    assert!(outage.answered_otherwise(now));
    assert_eq!((outage.complaint(), outage.suspicion(now), outage.gate(now)), (None, None, Gate::Open));
    let mut outage = at_fault(now);
    assert!(!outage.answered_otherwise(now + FIRST_GAP), "a 429 is no end of a gateway's 502");
}

#[tokio::test(start_paused = true)]
async fn a_suspicion_of_long_ago_is_forgotten() {
    let now = Instant::now();
    let mut outage = Outage::default();
    outage.failed(SIGN, 0, now, now);
    outage.failed(SIGN, 1, now, now + SUSPICIOUS);
    let last = now + SUSPICIOUS;
    assert!(outage.suspicion(last + FORGOTTEN - ms(1)).is_some());
    assert_eq!(outage.suspicion(last + FORGOTTEN), None, "nobody has asked since");
}

#[tokio::test(start_paused = true)]
async fn the_gaps_grow_until_one_succeeds() {
    let mut now = Instant::now();
    let mut outage = at_fault(now);
    let mut gaps = Vec::new();
    for request in 100..108 {
        let next = outage.changes_at(now).unwrap();
        assert_eq!(outage.gate(next - ms(1)), Gate::Closed);
        assert_eq!(outage.gate(next), Gate::Trial(1));
        gaps.push((next - now).as_millis());
        // What was sent before comes back late: it says nothing new.
        outage.failed(SIGN, 1, now, next);
        assert_eq!(outage.gate(next), Gate::Trial(1));
        now = next + ms(3);
        assert!(outage.failed(Sign::Status(503), request, next, now).0);
    }
    assert_eq!(gaps, [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
    assert_eq!(outage.complaint().unwrap().0, Sign::Status(503), "the newest word");
    assert!(outage.succeeded(now));
    assert_eq!((outage.gate(now), outage.changes_at(now), outage.complaint()), (Gate::Open, None, None));
    assert!(!outage.succeeded(now));
}

#[tokio::test(start_paused = true)]
async fn what_an_outage_has_left_behind_is_no_request_s_fault_when_it_is_over() {
    let now = Instant::now();
    let mut outage = at_fault(now);
    let over = now + ms(500);
    assert!(outage.succeeded(over));
    let (workers, verdict) = outage.failed(SIGN, 50, now + ms(499), over + ms(1));
    assert!(workers && verdict.is_workers());
    assert_eq!((outage.gate(over + ms(1)), outage.complaint()), (Gate::Open, None), "it is well all the same");
    let (workers, verdict) = outage.failed(SIGN, 51, over, over + ms(2));
    assert!(!workers && verdict.is_open());
}

#[tokio::test(start_paused = true)]
async fn requests_on_trial_that_do_not_fail_bring_more() {
    let now = Instant::now();
    let outage = at_fault(now);
    let next = now + FIRST_GAP;
    let seen: Vec<Gate> = (0..4).map(|times| outage.gate(next + TRUST * times)).collect();
    assert_eq!(seen, [Gate::Trial(1), Gate::Trial(2), Gate::Trial(4), Gate::Trial(8)]);
    assert_eq!(outage.changes_at(next + ms(1)), Some(next + TRUST));
    let far = next + TRUST * 1_000;
    let most = (1 << MOST_TRUST) + 1_000 - MOST_TRUST;
    assert_eq!(outage.gate(far), Gate::Trial(most), "however many told nothing, there is another one");
    assert_eq!(outage.changes_at(far), Some(next + TRUST * 1_001));
}

#[tokio::test(start_paused = true)]
async fn a_push_back_holds_for_a_moment_that_doubles_and_ends_with_the_first_success() {
    let mut now = Instant::now();
    let mut outage = Outage::default();
    let mut pauses = Vec::new();
    for _ in 0..8 {
        outage.pushed_back(None, now, now);
        // Others that were under way at the same time say the same.
        outage.pushed_back(None, now, now + ms(1));
        let until = outage.changes_at(now).unwrap();
        assert_eq!((outage.gate(until - ms(1)), outage.gate(until)), (Gate::Closed, Gate::Open));
        pauses.push((until - now).as_millis());
        now = until;
    }
    assert_eq!(pauses, [50, 100, 200, 400, 800, 1_600, 2_000, 2_000]);
    outage.pushed_back(None, now, now);
    assert!(outage.succeeded(now));
    assert_eq!((outage.gate(now), outage.changes_at(now)), (Gate::Open, None));
    outage.pushed_back(None, now, now);
    assert_eq!(outage.changes_at(now), Some(now + FIRST_PAUSE), "forgotten");
}

#[tokio::test(start_paused = true)]
async fn a_few_push_backs_among_successes_hold_nothing_and_many_do() {
    let now = Instant::now();
    let mut outage = Outage::default();
    for _ in 0..100 {
        for _ in 0..EARNS_ONE {
            outage.succeeded(now);
        }
        outage.pushed_back(None, now, now);
        assert_eq!(outage.gate(now), Gate::Open);
    }
    for _ in 0..1_000 {
        outage.succeeded(now);
    }
    let free = (0..100).take_while(|_| {
        outage.pushed_back(None, now, now);
        outage.gate(now) == Gate::Open
    });
    assert_eq!(free.count(), MOST_EARNED as usize, "one that takes nothing any more is held soon");
    assert_eq!(outage.changes_at(now), Some(now + FIRST_PAUSE));
}

#[tokio::test(start_paused = true)]
async fn what_a_worker_asks_for_is_kept_even_if_another_request_succeeds() {
    let now = Instant::now();
    let mut outage = Outage::default();
    outage.pushed_back(Some(ms(3_000)), now, now);
    outage.pushed_back(Some(ms(1_000)), now, now);
    outage.succeeded(now);
    assert_eq!(outage.changes_at(now), Some(now + ms(3_000)));
    assert_eq!((outage.gate(now + ms(2_999)), outage.gate(now + ms(3_000))), (Gate::Closed, Gate::Open));
    assert_eq!(outage.changes_at(now + ms(3_000)), None, "what is past is not looked at again");
}

#[derive(Clone, Debug)]
enum Step {
    Pass(u64),
    Fail(u16, u64),
    Break(u64),
    Cut(u64),
    Other,
    Push(Option<u64>),
    Succeed,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u64..8_000).prop_map(Step::Pass),
        (0u16..3, 0u64..20).prop_map(|(status, request)| Step::Fail(500 + status, request)),
        (0u64..20).prop_map(Step::Break),
        (0u64..20).prop_map(Step::Cut),
        Just(Step::Other),
        prop::option::of(0u64..60_000).prop_map(Step::Push),
        Just(Step::Succeed),
        Just(Step::Reset),
    ]
}

proptest! {
    /// Whatever comes back: it is never closed for longer than it asked for or the longest gap, what it says of the future
    /// comes true, and a success leaves nothing but what it asked for.
    #[test]
    fn it_never_stays_closed(steps in prop::collection::vec(step(), 0..200)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let _entered = runtime.enter();
        let (mut outage, mut now) = (Outage::default(), Instant::now());
        let mut asked = now;
        for step in steps {
            match step {
                Step::Pass(millis) => now += ms(millis),
                Step::Fail(status, request) => {
                    let (workers, verdict) = outage.failed(Sign::Status(status), request, now, now);
                    prop_assert_eq!(workers, outage.complaint().is_some());
                    prop_assert!(!workers || verdict.is_workers());
                }
                Step::Break(request) => drop(outage.failed(Sign::Broken, request, now, now)),
                Step::Cut(request) => drop(outage.failed(Sign::CutOff, request, now, now)),
                Step::Other => drop(outage.answered_otherwise(now)),
                Step::Push(wish) => {
                    asked = wish.map_or(asked, |wish| asked.max(now + ms(wish)));
                    outage.pushed_back(wish.map(ms), now, now);
                }
                Step::Succeed => {
                    outage.succeeded(now);
                    prop_assert_eq!(outage.gate(now) == Gate::Open, now >= asked);
                    prop_assert_eq!(outage.complaint(), None);
                }
                Step::Reset => outage.reset(),
            }
            let opens = now.max(asked) + LONGEST_GAP;
            prop_assert!(outage.gate(opens) != Gate::Closed);
            if outage.gate(now) == Gate::Closed {
                let next = outage.changes_at(now);
                prop_assert!(next.is_some_and(|next| next > now && next <= opens));
            } else if let Some(next) = outage.changes_at(now) {
                prop_assert!(next > now && outage.gate(next) != Gate::Closed);
            }
        }
    }
}
