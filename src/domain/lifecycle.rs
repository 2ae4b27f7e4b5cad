//! The lifecycle of a batch as one pure function: `(state, input) -> (state, ...)`, or a refusal.

use strum::{EnumCount, EnumString, IntoStaticStr, VariantArray};

use super::variants;

/// The states of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EnumCount, VariantArray, EnumString, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum BatchStatus {
    /// Its input is being checked.
    Validating,
    /// Its requests wait or run.
    InProgress,
    /// No further request is sent; the results are being completed.
    Finalizing,
    /// Ended: every request has its line.
    Completed,
    /// Ended: it could not be run.
    Failed,
    /// Ended: its window closed first.
    Expired,
    /// Being cancelled.
    Cancelling,
    /// Ended: cancelled.
    Cancelled,
}

impl BatchStatus {
    /// All of them.
    pub const ALL: [Self; Self::COUNT] = variants();

    /// The state's name in OpenAI's terms, as stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// The state of that name.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    /// Whether the state is final.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        match self {
            Self::Completed | Self::Failed | Self::Expired | Self::Cancelled => true,
            Self::Validating | Self::InProgress | Self::Finalizing | Self::Cancelling => false,
        }
    }
}

/// How a batch ends whose remaining lines are not to run: they are written as errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// The client cancelled it.
    Cancelled,
    /// Its window closed.
    Expired,
}

impl Ending {
    /// The `error.code` of the lines that were not run.
    #[must_use]
    pub fn error_code(self) -> &'static str {
        match self {
            Self::Cancelled => "batch_cancelled",
            Self::Expired => "batch_expired",
        }
    }

    /// The `error.message` of the lines that were not run.
    #[must_use]
    pub fn error_message(self) -> &'static str {
        match self {
            Self::Cancelled => "The batch was cancelled before this request was answered.",
            Self::Expired => "The batch's completion window closed before this request was answered.",
        }
    }

    /// The ending of that name.
    #[must_use]
    pub fn from_error_code(text: &str) -> Option<Self> {
        [Self::Cancelled, Self::Expired].into_iter().find(|ending| ending.error_code() == text)
    }
}

/// What can happen to a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BatchTrigger {
    /// Its input is valid.
    Validated,
    /// Its input can't be run, or its results can't be stored.
    Unrunnable,
    /// The client has asked to cancel it.
    CancelRequested,
    /// Its window has closed.
    WindowClosed,
    /// Every line of every segment has its result.
    AllLinesDone,
}

/// The result of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// The states entered, in order; empty if the input changes nothing. Each one is an event of its own.
    pub entered: &'static [BatchStatus],
    /// How the batch is to end, if this input has decided it.
    pub ending: Option<Ending>,
}

/// An input that the state does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a batch that is {} can't take the input {input:?}", from.as_str())]
pub struct BatchRefusal {
    /// The state.
    pub from: BatchStatus,
    pub input: BatchTrigger,
}

/// The state machine of a batch. `ending` is how the batch was already decided to end.
///
/// # Errors
/// [`BatchRefusal`] where the input makes no sense in the state: the caller must write nothing.
#[allow(clippy::match_same_arms)] // read as a table: one block an input
pub fn apply(from: BatchStatus, ending: Option<Ending>, input: BatchTrigger) -> Result<Transition, BatchRefusal> {
    use BatchStatus::{Cancelled, Cancelling, Completed, Expired, Failed, Finalizing, InProgress, Validating};
    const UNCHANGED: Transition = Transition { entered: &[], ending: None };
    let enter = |entered: &'static [BatchStatus]| Ok(Transition { entered, ending: None });
    let refused = Err(BatchRefusal { from, input });
    match (from, input) {
        (Validating, BatchTrigger::Validated) => enter(&[InProgress]),
        (InProgress | Finalizing | Cancelling | Completed | Failed | Expired | Cancelled, BatchTrigger::Validated) => {
            refused
        }

        (Validating | InProgress, BatchTrigger::Unrunnable) => enter(&[Failed]),
        // Without the input the remaining lines can't even be written as cancelled, so the batch has failed; finished
        // results are kept.
        (Finalizing | Cancelling, BatchTrigger::Unrunnable) => enter(&[Failed]),
        (Completed | Failed | Expired | Cancelled, BatchTrigger::Unrunnable) => refused,

        (Validating | InProgress, BatchTrigger::CancelRequested) => {
            Ok(Transition { entered: &[Cancelling], ending: Some(Ending::Cancelled) })
        }
        (Cancelling | Cancelled, BatchTrigger::CancelRequested) => Ok(UNCHANGED),
        (Finalizing | Completed | Failed | Expired, BatchTrigger::CancelRequested) => refused,

        (Validating | InProgress, BatchTrigger::WindowClosed) => {
            Ok(Transition { entered: &[Finalizing], ending: Some(Ending::Expired) })
        }
        // It is ending already, so a closed window adds nothing.
        (Finalizing | Cancelling | Completed | Failed | Expired | Cancelled, BatchTrigger::WindowClosed) => {
            Ok(UNCHANGED)
        }

        (InProgress, BatchTrigger::AllLinesDone) => enter(&[Finalizing, Completed]),
        (Cancelling, BatchTrigger::AllLinesDone) => enter(&[Cancelled]),
        (Finalizing, BatchTrigger::AllLinesDone) => match ending {
            Some(Ending::Expired) => enter(&[Expired]),
            Some(Ending::Cancelled) => enter(&[Cancelled]),
            None => enter(&[Completed]),
        },
        (Validating | Completed | Failed | Expired | Cancelled, BatchTrigger::AllLinesDone) => refused,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const INPUTS: [BatchTrigger; 5] = [
        BatchTrigger::Validated,
        BatchTrigger::Unrunnable,
        BatchTrigger::CancelRequested,
        BatchTrigger::WindowClosed,
        BatchTrigger::AllLinesDone,
    ];

    /// Databases have them: a variant may be renamed, its name may not.
    #[test]
    fn stored_names_stay_as_they_are() {
        let names = BatchStatus::ALL.map(BatchStatus::as_str);
        assert_eq!(
            names,
            ["validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"]
        );
        assert_eq!(names.map(BatchStatus::from_text), BatchStatus::ALL.map(Some));
        assert_eq!(BatchStatus::from_text("Completed"), None);
    }

    fn run(inputs: &[BatchTrigger]) -> (Vec<BatchStatus>, Option<Ending>) {
        let (mut path, mut ending) = (vec![BatchStatus::Validating], None);
        for input in inputs {
            if let Ok(step) = apply(path[path.len() - 1], ending, *input) {
                path.extend(step.entered);
                ending = ending.or(step.ending);
            }
        }
        (path, ending)
    }

    #[test]
    fn the_good_way() {
        let (path, ending) = run(&[BatchTrigger::Validated, BatchTrigger::AllLinesDone]);
        assert_eq!(
            path,
            [BatchStatus::Validating, BatchStatus::InProgress, BatchStatus::Finalizing, BatchStatus::Completed]
        );
        assert_eq!(ending, None);
    }

    #[test]
    fn a_closed_window_ends_as_expired_through_finalizing() {
        let (path, ending) = run(&[BatchTrigger::Validated, BatchTrigger::WindowClosed, BatchTrigger::AllLinesDone]);
        assert_eq!(path[1..], [BatchStatus::InProgress, BatchStatus::Finalizing, BatchStatus::Expired]);
        assert_eq!(ending, Some(Ending::Expired));
    }

    #[test]
    fn cancelling_twice_is_cancelling_once() {
        let once = run(&[BatchTrigger::Validated, BatchTrigger::CancelRequested, BatchTrigger::AllLinesDone]);
        let twice = run(&[
            BatchTrigger::Validated,
            BatchTrigger::CancelRequested,
            BatchTrigger::CancelRequested,
            BatchTrigger::AllLinesDone,
            BatchTrigger::CancelRequested,
        ]);
        assert_eq!(once, twice);
        assert_eq!(once.0.last(), Some(&BatchStatus::Cancelled));
    }

    #[test]
    fn names_are_read_back() {
        for status in BatchStatus::ALL {
            assert_eq!(BatchStatus::from_text(status.as_str()), Some(status));
        }
    }

    proptest! {
        #[test]
        fn it_never_leaves_its_edges(picks in proptest::collection::vec(0usize..5, 0..12)) {
            let inputs: Vec<_> = picks.into_iter().map(|pick| INPUTS[pick]).collect();
            let (path, ending) = run(&inputs);
            use BatchStatus::{Cancelled, Cancelling, Completed, Expired, Failed, Finalizing, InProgress, Validating};
            for step in path.windows(2) {
                let allowed: &[BatchStatus] = match step[0] {
                    Validating => &[InProgress, Failed, Cancelling, Finalizing],
                    InProgress => &[Finalizing, Cancelling, Failed],
                    Finalizing => &[Completed, Expired, Failed],
                    Cancelling => &[Cancelled, Failed],
                    Completed | Failed | Expired | Cancelled => &[],
                };
                prop_assert!(allowed.contains(&step[1]), "{:?}", step);
            }
            // The first decision about the ending is kept.
            if path.last() == Some(&Expired) { prop_assert_eq!(ending, Some(Ending::Expired)); }
            if path.last() == Some(&Cancelled) { prop_assert_eq!(ending, Some(Ending::Cancelled)); }
        }
    }
}
