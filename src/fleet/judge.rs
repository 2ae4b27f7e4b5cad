//! Passes the outcome of a request on to its worker: whether the worker is healthy, at fault, or overloaded.
//! [`super::outage`] decides, for the worker or for the requested model ([`super::outages`]).

use std::{io, sync::Arc};

use tokio::time::Instant;

use super::{
    Failure, FailureKind, Inner, Slot, Worker,
    outage::{Sign, Verdict},
    outages::{Judged, Turn},
};
use crate::telemetry::{Family, WORKERS};

/// Counter of failures of this server itself, by `error`.
const OWN_FAULTS: &str = "tidemill_own_faults_total";
/// Outages of workers that began.
const OUTAGES: Family =
    Family::counter("tidemill_worker_outages_total", "times that a worker failed every request alike and was held");

/// Says what this module's metrics are.
pub(super) fn describe_metrics() {
    metrics::describe_counter!(
        OWN_FAULTS,
        "requests and health checks that failed because this server lacked a resource, by resource"
    );
}

impl Slot {
    /// Reports the outcome of a request that was sent at `sent`. Call it once per request. `request` identifies it over
    /// all its tries. If the worker is at fault, the failure becomes a [`FailureKind::Outage`]; if that may turn out
    /// later, the failure has a [`Failure::blame`].
    ///
    /// # Errors
    /// The failure.
    pub fn tell<T>(&self, request: u64, sent: Instant, result: Result<T, Failure>) -> Result<T, Failure> {
        match result {
            Ok(answer) => {
                let ends = {
                    let mut state = self.worker.state.lock();
                    state.cuts.answered();
                    state.outages.succeeded(self.holder.model(), Instant::now())
                };
                if ends {
                    self.gate_has_moved();
                }
                Ok(answer)
            }
            Err(failure) => Err(self.charge(request, sent, failure)),
        }
    }

    /// The same for an `Infer` call. Its success ends an outage, but its failure counts only for itself, because its
    /// caller chose its body and deadline: one caller must not be able to have a worker held for all.
    ///
    /// # Errors
    /// The failure.
    pub fn tell_of_call<T>(&self, sent: Instant, result: Result<T, Failure>) -> Result<T, Failure> {
        match result {
            Ok(answer) => self.tell(0, sent, Ok(answer)),
            Err(failure) => Err(failure),
        }
    }

    fn charge(&self, request: u64, sent: Instant, failure: Failure) -> Failure {
        let (model, now) = (self.holder.model(), Instant::now());
        let Some(sign) = sign(&failure) else {
            // What answers at all does not break off every request, for example.
            if failure.answer.is_some() && self.worker.state.lock().outages.answered_otherwise(model, sent) {
                self.gate_has_moved();
            }
            return failure;
        };
        let (judged, cut) = {
            let mut state = self.worker.state.lock();
            let cut = (failure.kind == FailureKind::CutOff).then(|| state.cuts.cut_off(request, now));
            (state.outages.failed(model, sign, request, sent, now), cut)
        };
        let Judged { at_fault, blame, turn } = judged;
        if at_fault || turn != Turn::None {
            self.gate_has_moved();
        }
        if !at_fault {
            return Failure { blame: Some(blame), cut, ..failure };
        }
        if turn == Turn::Begins {
            // The last requests of a worker that has been removed bring its series not back.
            if !self.worker.gone.is_cancelled() {
                WORKERS.count(OUTAGES, &self.worker.url);
            }
            tracing::warn!(
                worker = %self.worker.id, url = %self.worker.url, ?model, last = %failure.message,
                "the worker {sign}: it gets single requests on trial until it answers again"
            );
        }
        Failure { kind: FailureKind::Outage, ..failure }
    }

    fn gate_has_moved(&self) {
        self.fleet.refresh(&self.worker);
        self.worker.gate_moved.notify_one();
    }
}

/// Whether the failure may be the worker's fault, and what it looks like.
fn sign(failure: &Failure) -> Option<Sign> {
    let error = failure.answer.as_ref().filter(|answer| !answer.is_success());
    match (failure.kind, error) {
        (FailureKind::Status | FailureKind::Refused | FailureKind::BadAnswer, Some(answer)) => {
            Some(Sign::Status(answer.status))
        }
        // It may be as good as this worker's answers get.
        (FailureKind::BadAnswer, None) if failure.is_doubtful => None,
        (FailureKind::BadAnswer, None) => failure.looks.map(Sign::Bad),
        (FailureKind::CutOff, _) => Some(Sign::CutOff),
        (FailureKind::Connection, _) => Some(Sign::Broken),
        // A time-out too: slow lines and an engine that hangs look the same, and each try costs the worker a whole
        // time-out, which the tries bound. The health check finds a worker that answers nothing at all.
        _ => None,
    }
}

/// Updates a worker's gate as time passes, until the worker is removed.
pub(super) async fn keep_gate(fleet: Arc<Inner>, worker: Arc<Worker>) {
    loop {
        let at = worker.state.lock().outages.changes_at(Instant::now());
        let changes = async {
            match at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = worker.gone.cancelled() => return,
            () = worker.gate_moved.notified() => {}
            () = changes => fleet.refresh(&worker),
        }
    }
}

/// What this server lacks (file descriptors, memory, ports, a network), if the error came from that and not from the
/// worker.
pub(super) fn own_fault(error: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && let Some(lack) = lack(io)
        {
            return Some(lack);
        }
        at = error.source();
    }
    None
}

/// Error numbers that are equal on Linux, macOS and the BSDs, and for which std has no kinds.
const EMFILE: i32 = 24;
const ENFILE: i32 = 23;

fn lack(error: &io::Error) -> Option<&'static str> {
    match (error.raw_os_error(), error.kind()) {
        (Some(EMFILE), _) => Some("too many open files in this process"),
        (Some(ENFILE), _) => Some("too many open files on this machine"),
        (_, io::ErrorKind::OutOfMemory) => Some("out of memory"),
        (_, io::ErrorKind::AddrNotAvailable) => Some("no free local port or address"),
        (_, io::ErrorKind::NetworkDown) => Some("the network is down"),
        (_, io::ErrorKind::NetworkUnreachable) => Some("no route to the network"),
        _ => None,
    }
}

impl Inner {
    /// Notes that this server itself is at fault for something that failed. No worker is suspected for it.
    pub(super) fn note_own_fault(&self, lack: &'static str, what: &str) {
        metrics::counter!(OWN_FAULTS, "error" => lack).increment(1);
        if let Some(more) = self.own_faults.may() {
            tracing::error!(
                lack,
                more,
                "{what} failed because of this server itself; no worker is at fault, no try is used up"
            );
        }
    }
}

/// Time between two log lines about this server's own faults.
pub(super) const SAY_AGAIN: std::time::Duration = std::time::Duration::from_secs(10);

impl Failure {
    /// Whether the worker is at fault, or may still turn out to be: others may have told that since this was counted.
    #[must_use]
    pub fn may_be_the_workers(&self) -> bool {
        self.blame.as_ref().is_some_and(|blame| blame.verdict() != Verdict::Request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_faults_are_told_from_a_workers_wherever_they_lie_in_the_chain() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] io::Error);
        let of = |number| own_fault(&Outer(io::Error::from_raw_os_error(number)));
        assert_eq!(of(EMFILE), Some("too many open files in this process"));
        assert_eq!(of(ENFILE), Some("too many open files on this machine"));
        let kind = |kind: io::ErrorKind| own_fault(&io::Error::from(kind));
        for lack in [io::ErrorKind::OutOfMemory, io::ErrorKind::AddrNotAvailable, io::ErrorKind::NetworkUnreachable] {
            assert!(kind(lack).is_some(), "{lack}");
        }
        for worker in [io::ErrorKind::ConnectionRefused, io::ErrorKind::ConnectionReset, io::ErrorKind::HostUnreachable]
        {
            assert_eq!(kind(worker), None, "{worker}");
        }
    }
}
