use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::{
    fleet::{
        FailureKind,
        outage::{Outage, REQUESTS, Sign},
    },
    scheduler::TryPolicy,
};

const A: Lane = Lane { model: 0, alone: false };
const SUSPECT: Lane = Lane { model: 0, alone: true };
const B: Lane = Lane { model: 1, alone: false };

fn line(id: &str, model: &str) -> String {
    format!(
        r#"{{"custom_id":"{id}","method":"POST","url":"/v1/completions","body":{{"model":"{model}","prompt":"{id}"}}}}"#
    )
}

fn list(text: &str, done: &[u32]) -> WorkList {
    WorkList::read(text.to_owned().into(), &["a".into(), "b".into()], &done.iter().copied().collect()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn lines_are_found_and_come_in_order() {
    let text = format!("{}\r\n\n  \n{}\n{}\n{}", line("x", "a"), line("y", "b"), line("done", "a"), line("z", "a"));
    let mut list = list(&text, &[4]);
    assert_eq!(list.open(), 3);
    assert_eq!(list.open_models(), 0b11);
    let x = list.take(A).unwrap();
    assert_eq!((list.index(x), list.custom_id(x)), (0, &b"\"x\""[..]));
    assert_eq!(list.body(x), r#"{"model":"a","prompt":"x"}"#);
    let y = list.take(B).unwrap();
    assert_eq!((list.index(y), list.take(B)), (3, None));
    list.done(y);
    list.done(y);
    assert_eq!((list.open(), list.open_models()), (2, 0b01));

    let now = Instant::now();
    let policy = TryPolicy::default();
    let fail = |list: &mut WorkList| policy.next(list.failed(x, WorkerKey(7)), FailureKind::Connection, None, 0.0);
    assert!(fail(&mut list).is_some());
    list.later(x, now + Duration::from_secs(1));
    list.wake(now);
    assert_eq!(list.ready(0), 1, "z, x still waits");
    assert!(list.has_later());
    list.wake(now + Duration::from_secs(1));
    assert_eq!(list.take(A), Some(x), "what has waited goes first");
    for death in 1..=3 {
        assert!(fail(&mut list).is_some());
        let now = now + Duration::from_secs(10 * death);
        let lost = Lost { worker: WorkerKey(7), now, lived: Duration::from_secs(4), apart: 0, answers: 0 };
        assert!(!list.lost(x, lost));
        list.later(x, now);
        list.wake(now);
        let suspect = (death == 3).then_some(x);
        assert_eq!((list.ready(0), list.peek(SUSPECT)), (2, suspect), "it was there at {death} deaths");
        if suspect.is_none() {
            assert_eq!(list.take(A), Some(x));
        }
    }
    assert_eq!(list.failed_on(x), [WorkerKey(7)]);
    assert_eq!(list.take_suspects(0, 64), (vec![x], Duration::from_secs(6)));
    list.acquit(x);
    assert_eq!(list.unfinished().len(), 2);
}

/// A line that was failed with 502.
fn failing(list: &mut WorkList, outage: &mut Outage, now: Instant) -> LineKey {
    let x = list.take(A).unwrap();
    let (_, blame) = outage.failed(Sign::Status(502), 0, now, now);
    list.doubt(x, Some(blame), now);
    x
}

#[tokio::test(start_paused = true)]
async fn a_line_is_sent_again_and_again_while_its_worker_answers_nothing() {
    let (mut list, mut outage, start) = (list(&line("x", "a"), &[]), Outage::default(), Instant::now());
    let x = failing(&mut list, &mut outage, start);
    let patience = TryPolicy::default().patience;
    let (mut now, mut asked) = (start, Vec::new());
    while let Some(at) = list.ask_again(x, patience, now) {
        asked.push((at - start).as_millis());
        now = at;
        let (_, blame) = outage.failed(Sign::Status(502), 0, now, now);
        list.doubt(x, Some(blame), now);
    }
    assert_eq!(asked[..4], [500, 1_500, 3_500, 5_500]);
    let last = *asked.last().unwrap();
    assert!((22_000..=25_000).contains(&last), "an outage of 20 s is survived: {last} ms");
}

#[tokio::test(start_paused = true)]
async fn a_line_that_fails_while_others_are_answered_is_not_sent_again() {
    let (mut list, mut outage, now) = (list(&line("x", "a"), &[]), Outage::default(), Instant::now());
    let x = failing(&mut list, &mut outage, now);
    outage.succeeded(now);
    let (_, blame) = outage.failed(Sign::Status(502), 0, now, now);
    list.doubt(x, Some(blame), now);
    let patience = Duration::from_secs(25);
    assert_eq!(list.ask_again(x, patience, now), None);
    assert!(!list.has_last_chance(x, patience, now + patience));
}

#[tokio::test(start_paused = true)]
async fn a_line_has_one_more_try_when_its_worker_answers_again_after_a_while() {
    let patience = Duration::from_secs(25);
    for (after, has) in [(FIRST_ASK, true), (FIRST_ASK / 2, false)] {
        let (mut list, mut outage, now) = (list(&line("x", "a"), &[]), Outage::default(), Instant::now());
        let x = failing(&mut list, &mut outage, now);
        outage.succeeded(now + after);
        assert_eq!(list.has_last_chance(x, patience, now + after), has);
        assert!(!list.has_last_chance(x, patience, now + after), "but one");
    }
}

#[tokio::test(start_paused = true)]
async fn all_tries_of_an_outage_are_given_back() {
    let (mut list, mut outage, now) = (list(&line("x", "a"), &[]), Outage::default(), Instant::now());
    let policy = TryPolicy::default();
    let x = failing(&mut list, &mut outage, now);
    for _ in 1..5 {
        assert!(policy.next(list.tally(x), FailureKind::Status, None, 0.0).is_some());
        let (_, blame) = outage.failed(Sign::Status(502), 0, now, now);
        list.doubt(x, Some(blame), now);
    }
    assert!(policy.next(list.tally(x), FailureKind::Status, None, 0.0).is_none(), "that was the last");
    (1..REQUESTS as u64).for_each(|request| drop(outage.failed(Sign::Status(502), request, now, now)));
    list.doubt(x, None, now);
    for _ in 1..5 {
        assert!(policy.next(list.tally(x), FailureKind::Status, None, 0.0).is_some(), "all five are left");
    }
}

#[test]
fn a_priority_is_set_where_the_client_has_set_none() {
    let own = r#"{"custom_id":"o","method":"POST","url":"/v1/completions","body":{ "priority" : 3, "model":"a"}}"#;
    let nested =
        r#"{"custom_id":"n","method":"POST","url":"/v1/completions","body": {"x":{"priority":1},"model":"a"} }"#;
    let mut list = list(&format!("{own}\n{nested}"), &[]);
    let (own, nested) = (list.take(A).unwrap(), list.take(A).unwrap());
    assert!(list.has_priority(own) && !list.has_priority(nested));
    assert_eq!(list.body_with_priority(nested, -9), r#"{"priority":-9,"x":{"priority":1},"model":"a"}"#);
    assert_eq!(list.body(nested), r#"{"x":{"priority":1},"model":"a"}"#);
}

#[test]
fn bytes_that_were_not_uploaded_are_noticed() {
    let read = |text: &str| WorkList::read(text.to_owned().into(), &["a".into()], &LineSet::default());
    assert_eq!(read(&format!("{}\n{{\n", line("x", "a"))).unwrap_err().line, 1);
    assert!(read(&line("x", "other")).is_err());
    assert_eq!(read("").unwrap().open(), 0);
}

proptest! {
    /// Whatever is taken, put off and done: a line is ready, waiting, taken or done, never two of them, and none is lost.
    #[test]
    fn every_line_is_in_one_place(
        models in prop::collection::vec(0usize..2, 1..20),
        blank in prop::collection::vec(any::<bool>(), 20),
        done in prop::collection::btree_set(0u32..20, 0..6),
        steps in prop::collection::vec((0u8..5, 0usize..20, 0u64..5_000), 0..120),
    ) {
        let mut text = String::new();
        let mut places = Vec::new();
        for (at, model) in models.iter().enumerate() {
            if blank[at] { text.push_str(" \r\n"); }
            places.push(u32::try_from(text.matches('\n').count()).unwrap());
            text.push_str(&line(&at.to_string(), ["a", "b"][*model]));
            text.push('\n');
        }
        let done: Vec<u32> = done.into_iter().collect();
        let mut list = list(&text, &done);
        let expected: BTreeSet<u32> = places.iter().copied().filter(|place| !done.contains(place)).collect();
        let unfinished: BTreeSet<u32> = list.unfinished().into_iter().map(|key| list.index(key)).collect();
        prop_assert_eq!(&unfinished, &expected);
        let (mut now, mut taken, mut ended) = (Instant::now(), Vec::new(), BTreeSet::new());
        let mut later = 0;
        for (step, pick, millis) in steps {
            match step {
                0 | 1 => {
                    let model = pick % 2;
                    let lane = Lane { model, alone: false };
                    let first = list.peek(lane);
                    let key = list.take(lane);
                    prop_assert_eq!(first, key);
                    if let Some(key) = key {
                        let at = places.iter().position(|place| *place == list.index(key)).unwrap();
                        prop_assert_eq!(models[at], model);
                        let id = format!("\"{at}\"");
                        prop_assert_eq!(list.custom_id(key), id.as_bytes());
                        prop_assert!(!taken.contains(&key) && !ended.contains(&key));
                        taken.push(key);
                    }
                }
                2 if !taken.is_empty() => {
                    list.later(taken.swap_remove(pick % taken.len()), now + Duration::from_millis(millis));
                    later += 1;
                }
                3 if !taken.is_empty() => {
                    let key = taken.swap_remove(pick % taken.len());
                    list.done(key);
                    ended.insert(key);
                }
                _ => {
                    let before = list.ready(0) + list.ready(1);
                    now += Duration::from_millis(millis);
                    list.wake(now);
                    later -= list.ready(0) + list.ready(1) - before;
                    prop_assert!(list.next_due().is_none_or(|due| due > now));
                }
            }
            prop_assert_eq!(list.has_later(), later > 0);
            prop_assert_eq!(list.ready(0) + list.ready(1) + later + taken.len() + ended.len(), expected.len());
            prop_assert_eq!(list.open(), expected.len() - ended.len());
            let model_at = |place: u32| models[places.iter().position(|other| *other == place).unwrap()];
            let open = list.unfinished().into_iter().map(|key| model_at(list.index(key)));
            prop_assert_eq!(list.open_models(), open.fold(0i64, |mask, model| mask | 1 << model));
        }
    }
}
