//! Explains why a batch makes no progress.

use std::time::{Duration, UNIX_EPOCH};

use crate::{
    domain::BatchStatus,
    fleet::{Complaint, WorkerState, WorkerView},
};

/// The most workers that a reason names.
const WORKERS_NAMED: usize = 5;

/// The facts from which the reason follows.
#[derive(Clone, Debug)]
pub struct Situation<'a> {
    /// The batch's state.
    pub status: BatchStatus,
    /// Whether a request has ended in the last seconds.
    pub moving: bool,
    /// Whether a node runs one of its segments.
    pub running: bool,
    /// The batch's models that no healthy worker serves.
    pub unserved: &'a [&'a str],
    /// The batch's models.
    pub models: &'a [String],
    pub workers: &'a [WorkerView],
    /// Whether the reason may name workers and quote their answers, which only admins may see.
    pub for_admins: bool,
    /// The number of unfinished batches ahead of it.
    pub queue_position: i64,
}

/// Why the batch makes no progress. `None` if it does, or if there is nothing to wait for.
#[must_use]
pub fn waiting_reason(of: &Situation<'_>) -> Option<String> {
    match of.status {
        BatchStatus::Validating | BatchStatus::InProgress => {}
        BatchStatus::Finalizing
        | BatchStatus::Completed
        | BatchStatus::Failed
        | BatchStatus::Expired
        | BatchStatus::Cancelling
        | BatchStatus::Cancelled => return None,
    }
    if of.moving {
        return None;
    }
    if of.workers.is_empty() {
        return Some("no worker is registered: start the server with --worker URL or call RegisterWorker".into());
    }
    if let [model, others @ ..] = of.unserved {
        let more = match others.len() {
            0 => String::new(),
            others => format!(" nor {others} more of its models"),
        };
        let known = if of.for_admins { known(of.workers) } else { of.workers.len().to_string() };
        return Some(format!("no healthy worker serves the model {model:?}{more} (known workers: {known})"));
    }
    if let Some((worker, complaint)) = at_fault(of) {
        let since = UNIX_EPOCH + Duration::from_secs(u64::try_from(complaint.since.unix_seconds()).unwrap_or(0));
        let since = humantime::format_rfc3339_seconds(since);
        let worker = if of.for_admins { format!("worker {}", worker.url) } else { "the worker".to_owned() };
        let asked = complaint.model.as_ref().map(|model| format!(", asked for the model {model:?},"));
        let asked = asked.unwrap_or_default();
        let then = if complaint.is_certain { "its requests wait" } else { "requests wait some seconds for it" };
        return Some(format!(
            "{worker}{asked} {} since {since}; it is asked again every few seconds, and {then}",
            complaint.what
        ));
    }
    if let Some(model) = of.models.iter().find(|model| is_full_of_calls(of, model)) {
        return Some(format!(
            "live calls, which go first, have taken all places of the workers that serve the model {model:?}; batches go on \
             as soon as one ends"
        ));
    }
    match of.queue_position {
        position if of.running || position <= 0 => None,
        // Without a prefix: whoever shows the reason already says that the batch waits.
        1 => Some("behind 1 batch".into()),
        position => Some(format!("behind {position} batches")),
    }
}

/// The worker that has been at fault for longest, if all workers that serve one of the batch's models are.
fn at_fault<'a>(of: &Situation<'a>) -> Option<(&'a WorkerView, &'a Complaint)> {
    let of_model = |model: &String| {
        let serving = of.workers.iter().filter(|worker| worker.state == WorkerState::Healthy && worker.serves(model));
        let complaints: Option<Vec<_>> =
            serving.map(|worker| worker.complaint_of(model).map(|complaint| (worker, complaint))).collect();
        complaints.unwrap_or_default()
    };
    of.models.iter().flat_map(of_model).min_by_key(|(_, complaint)| complaint.since)
}

/// Whether all workers that serve the model run nothing but live calls, and as many as they may.
fn is_full_of_calls(of: &Situation<'_>, model: &str) -> bool {
    let mut serving = of.workers.iter().filter(|worker| worker.state == WorkerState::Healthy && worker.serves(model));
    let is_full = |worker: &WorkerView| worker.limit > 0 && worker.live >= worker.limit;
    serving.next().is_some_and(is_full) && serving.all(is_full)
}

fn known(workers: &[WorkerView]) -> String {
    let mut all: Vec<String> = workers.iter().take(WORKERS_NAMED).map(one).collect();
    if workers.len() > WORKERS_NAMED {
        all.push(format!("and {} more", workers.len() - WORKERS_NAMED));
    }
    all.join(", ")
}

fn one(worker: &WorkerView) -> String {
    let state = match worker.state {
        WorkerState::Starting => "starting",
        WorkerState::Healthy => "healthy",
        WorkerState::Draining => "draining",
        WorkerState::Down => "down",
    };
    match (&worker.last_error, worker.models.as_slice()) {
        (Some(error), _) if worker.state == WorkerState::Down => format!("{} {state}: {error}", worker.url),
        (_, []) => format!("{} {state}", worker.url),
        (_, models) => format!("{} {state} with {}", worker.url, models.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::{OwnHealth, Timestamp, WorkerId};

    fn worker(url: &str, state: WorkerState, models: &[&str]) -> WorkerView {
        WorkerView {
            id: WorkerId::from_text("worker_1"),
            url: url.into(),
            models: models.iter().map(|model| (*model).to_owned()).collect(),
            state,
            in_flight: 0,
            live: 0,
            limit: 1,
            load: None,
            output_tokens_per_second: 0.0,
            requests_per_second: 0.0,
            prefix_hit_rate: None,
            request_time: None,
            last_error: (state == WorkerState::Down).then(|| "connection refused".into()),
            complaints: Vec::new(),
            health: OwnHealth::default(),
            created_at: Timestamp(0),
        }
    }

    const STILL: Situation<'static> = Situation {
        status: BatchStatus::InProgress,
        moving: false,
        running: false,
        unserved: &[],
        models: &[],
        workers: &[],
        for_admins: true,
        queue_position: 0,
    };

    #[test]
    fn every_reason_says_what_to_look_at() {
        let reason = waiting_reason(&STILL).unwrap();
        assert!(reason.contains("--worker URL"), "{reason}");
        let workers = [worker("http://a", WorkerState::Healthy, &["m"]), worker("http://b", WorkerState::Down, &["x"])];
        let of = Situation { workers: &workers, unserved: &["x", "y"], ..STILL };
        assert_eq!(
            waiting_reason(&of).unwrap(),
            "no healthy worker serves the model \"x\" nor 1 more of its models (known workers: http://a healthy with m, \
             http://b down: connection refused)"
        );
        let of = Situation { workers: &workers, queue_position: 3, ..STILL };
        assert_eq!(waiting_reason(&of).unwrap(), "behind 3 batches");
        let of = Situation { workers: &workers, queue_position: 1, ..STILL };
        assert_eq!(waiting_reason(&of).unwrap(), "behind 1 batch");
    }

    #[test]
    fn only_admins_see_where_workers_are_and_what_they_answer() {
        let mut workers =
            vec![worker("http://a", WorkerState::Down, &["m"]), worker("http://b", WorkerState::Down, &[])];
        let models = ["m".to_owned()];
        let of = Situation { workers: &workers, unserved: &["m"], models: &models, for_admins: false, ..STILL };
        assert_eq!(waiting_reason(&of).unwrap(), "no healthy worker serves the model \"m\" (known workers: 2)");
        workers[0].state = WorkerState::Healthy;
        workers[0].complaints = vec![Complaint {
            what: "answers 401 to every request".into(),
            model: None,
            since: Timestamp(0),
            is_certain: true,
        }];
        let of = Situation { workers: &workers, models: &models, for_admins: false, ..STILL };
        let reason = waiting_reason(&of).unwrap();
        assert!(reason.starts_with("the worker answers 401 to every request since 1970-01-01T00:00:00Z"), "{reason}");
    }

    #[test]
    fn what_moves_or_has_its_turn_has_no_reason() {
        let workers = [worker("http://a", WorkerState::Healthy, &["m"])];
        let of = Situation { workers: &workers, queue_position: 3, ..STILL };
        assert_eq!(waiting_reason(&Situation { moving: true, ..of.clone() }), None);
        assert_eq!(waiting_reason(&Situation { running: true, ..of.clone() }), None);
        assert_eq!(waiting_reason(&Situation { queue_position: 0, ..of.clone() }), None);
        for status in BatchStatus::ALL.into_iter().filter(|status| status.is_terminal()) {
            assert_eq!(waiting_reason(&Situation { status, workers: &[], ..of.clone() }), None);
        }
    }

    #[test]
    fn a_worker_that_fails_every_request_is_the_reason_if_no_other_serves_the_model() {
        let complaint = |seconds: i64, model: Option<&str>| {
            vec![Complaint {
                what: "answers 502 to every request".into(),
                model: model.map(str::to_owned),
                since: Timestamp(seconds * 1_000_000),
                is_certain: true,
            }]
        };
        let mut workers = vec![
            worker("http://a", WorkerState::Healthy, &["m"]),
            worker("http://b", WorkerState::Healthy, &["m"]),
            worker("http://c", WorkerState::Healthy, &["other"]),
        ];
        workers[0].complaints = complaint(1_764_465_323, None);
        let models = ["m".to_owned()];
        let reason = |workers: &[WorkerView], running| {
            waiting_reason(&Situation { workers, models: &models, running, queue_position: 2, ..STILL })
        };
        assert_eq!(reason(&workers, false).unwrap(), "behind 2 batches");
        workers[1].complaints = complaint(1_764_465_300, Some("other"));
        assert_eq!(reason(&workers, false).unwrap(), "behind 2 batches", "another model's");
        workers[1].complaints = complaint(1_764_465_300, None);
        for running in [false, true] {
            assert_eq!(
                reason(&workers, running).unwrap(),
                "worker http://b answers 502 to every request since 2025-11-30T01:15:00Z; it is asked again every few \
                 seconds, and its requests wait"
            );
        }
    }

    #[test]
    fn live_calls_in_all_places_are_the_reason() {
        let mut workers = vec![worker("http://a", WorkerState::Healthy, &["m"]); 2];
        let models = ["m".to_owned()];
        workers[0].live = 1;
        let reason = |workers: &[WorkerView]| {
            waiting_reason(&Situation { workers, models: &models, running: true, for_admins: false, ..STILL })
        };
        assert_eq!(reason(&workers), None, "the other has room");
        workers[1].live = 1;
        let said = "live calls, which go first, have taken all places of the workers that serve the model \"m\"; batches \
                    go on as soon as one ends";
        assert_eq!(reason(&workers).unwrap(), said);
        workers[1].state = WorkerState::Draining;
        assert_eq!(reason(&workers).unwrap(), said);
    }

    #[test]
    fn a_large_fleet_is_not_listed_whole() {
        let workers = vec![worker("http://a", WorkerState::Down, &[]); 500];
        let reason = waiting_reason(&Situation { workers: &workers, unserved: &["m"], ..STILL }).unwrap();
        assert!(reason.ends_with("and 495 more)") && reason.len() < 400, "{reason}");
    }

    proptest! {
        /// A reason is there exactly while something is waited for, is one line of bounded length, and names a model only
        /// if nobody serves it.
        #[test]
        fn a_reason_is_given_exactly_while_there_is_one(
            status in prop::sample::select(BatchStatus::ALL.to_vec()),
            (moving, running) in any::<(bool, bool)>(),
            unserved in prop::collection::vec("[a-z/\"\n]{1,30}", 0..4),
            states in prop::collection::vec(0usize..4, 0..20),
            queue_position in -1i64..5,
        ) {
            let all = [WorkerState::Starting, WorkerState::Healthy, WorkerState::Draining, WorkerState::Down];
            let workers: Vec<_> = states.iter().map(|state| worker("http://w", all[*state], &["m"])).collect();
            let unserved: Vec<&str> = unserved.iter().map(String::as_str).collect();
            let of = Situation { status, moving, running, unserved: &unserved, models: &[], workers: &workers, for_admins: true, queue_position };
            let reason = waiting_reason(&of);
            let can_wait = matches!(status, BatchStatus::Validating | BatchStatus::InProgress) && !moving;
            let behind = !running && queue_position > 0;
            prop_assert_eq!(reason.is_some(), can_wait && (workers.is_empty() || !unserved.is_empty() || behind));
            if let Some(reason) = reason {
                prop_assert!(!reason.contains('\n') && reason.len() < 600, "{reason}");
                let names_model = !workers.is_empty() && !unserved.is_empty();
                prop_assert_eq!(reason.contains("serves the model"), names_model);
                prop_assert_eq!(reason.starts_with("behind "), !workers.is_empty() && !names_model);
                // "waiting: …" is how the command line begins, and "waiting" is the name of the field.
                prop_assert!(!reason.starts_with("waiting"), "{reason}");
            }
        }
    }
}
