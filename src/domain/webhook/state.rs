//! The lifecycle of a delivery as one pure function: `(delivery, input) -> (delivery, effect)`, or a refusal.

use super::AttemptResult;

/// The states of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeliveryState {
    /// It waits for its next attempt.
    Pending,
    /// A node is sending it.
    Leased,
    /// The receiver accepted it.
    Delivered,
    /// It is a dead letter and will not be sent again automatically.
    Dead,
    /// It is not needed any more.
    Cancelled,
}

impl DeliveryState {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Pending, Self::Leased, Self::Delivered, Self::Dead, Self::Cancelled];

    /// Its name, as stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Leased => "leased",
            Self::Delivered => "delivered",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing happens to it any more.
    #[must_use]
    pub fn is_settled(self) -> bool {
        match self {
            Self::Delivered | Self::Dead | Self::Cancelled => true,
            Self::Pending | Self::Leased => false,
        }
    }

    /// The state of that name.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == text)
    }
}

/// The state machine's view of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Its state.
    pub state: DeliveryState,
    /// The number of attempts begun.
    pub attempts: i32,
    /// The most attempts that may be made.
    pub max_attempts: i32,
    /// Whether it never becomes a dead letter ([`super::WebhookEvent::is_disposable`]).
    pub disposable: bool,
}

/// What can happen to a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// A node claims it in order to send it.
    Claimed,
    /// The node that claimed it has sent nothing and releases it.
    Released,
    /// The receiver answered 2xx.
    Succeeded,
    /// The attempt failed in a way that may pass.
    Failed,
    /// The attempt failed for good: 410, a forbidden address, an invalid URL, a secret that can't be decrypted.
    FailedForGood,
    /// The node that claimed it is gone, and it is not known whether the receiver has it.
    LeaseExpired,
    /// A newer event makes it pointless, or it is too old.
    Superseded,
}

impl Input {
    /// What the result of an attempt means for its delivery. `None`: nothing was sent.
    #[must_use]
    pub fn of(result: Option<&AttemptResult>) -> Self {
        match result.map(|result| result.error.as_ref()) {
            None => Self::Released,
            Some(None) => Self::Succeeded,
            Some(Some(error)) if error.kind.is_for_good() => Self::FailedForGood,
            Some(Some(_)) => Self::Failed,
        }
    }
}

/// What must be done after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Wait until it is due again.
    Retry,
    /// Write a dead letter.
    DeadLetter,
}

/// The result of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The new state.
    pub state: DeliveryState,
    /// The new number of attempts begun.
    pub attempts: i32,
    /// What has to be done.
    pub effect: Effect,
}

/// An input that the state does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a delivery that is {} can't take the input {input:?}", from.as_str())]
pub struct Refused {
    /// The state.
    pub from: DeliveryState,
    /// The input.
    pub input: Input,
}

/// The state machine of a delivery.
///
/// # Errors
/// [`Refused`] where the input makes no sense in the state: the caller must write nothing.
#[allow(clippy::match_same_arms)] // read as a table: one block an input
pub fn apply(of: Delivery, input: Input) -> Result<Step, Refused> {
    use DeliveryState::{Cancelled, Dead, Delivered, Leased, Pending};
    let refused = Err(Refused { from: of.state, input });
    let attempts = of.attempts;
    let to = |state, effect| Ok(Step { state, attempts, effect });
    let end = if of.disposable { to(Cancelled, Effect::None) } else { to(Dead, Effect::DeadLetter) };
    let try_again = if attempts < of.max_attempts { to(Pending, Effect::Retry) } else { end };
    match (of.state, input) {
        // Counted before it is sent, so that a body that crashes its sender can't do so for ever.
        (Pending, Input::Claimed) if attempts < of.max_attempts => {
            Ok(Step { state: Leased, attempts: attempts + 1, effect: Effect::None })
        }
        (Pending | Leased | Delivered | Dead | Cancelled, Input::Claimed) => refused,

        (Leased, Input::Released) => Ok(Step { state: Pending, attempts: attempts - 1, effect: Effect::None }),
        (Pending | Delivered | Dead | Cancelled, Input::Released) => refused,

        (Leased, Input::Succeeded) => to(Delivered, Effect::None),
        (Pending | Delivered | Dead | Cancelled, Input::Succeeded) => refused,

        (Leased, Input::Failed | Input::LeaseExpired) => try_again,
        (Pending | Delivered | Dead | Cancelled, Input::Failed | Input::LeaseExpired) => refused,

        (Leased, Input::FailedForGood) => end,
        (Pending | Delivered | Dead | Cancelled, Input::FailedForGood) => refused,

        // Only disposable events can be superseded. A delivery being sent finishes.
        (Pending, Input::Superseded) if of.disposable => to(Cancelled, Effect::None),
        (Pending | Leased | Delivered | Dead | Cancelled, Input::Superseded) => refused,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const INPUTS: [Input; 7] = [
        Input::Claimed,
        Input::Released,
        Input::Succeeded,
        Input::Failed,
        Input::FailedForGood,
        Input::LeaseExpired,
        Input::Superseded,
    ];

    fn new(max_attempts: i32, disposable: bool) -> Delivery {
        Delivery { state: DeliveryState::Pending, attempts: 0, max_attempts, disposable }
    }

    fn run(mut delivery: Delivery, inputs: &[Input]) -> Delivery {
        for input in inputs {
            let step = apply(delivery, *input).unwrap();
            delivery = Delivery { state: step.state, attempts: step.attempts, ..delivery };
        }
        delivery
    }

    #[test]
    fn three_failures_are_a_dead_letter() {
        use Input::{Claimed, Failed, LeaseExpired};
        let last = run(new(3, false), &[Claimed, Failed, Claimed, LeaseExpired, Claimed]);
        assert_eq!((last.state, last.attempts), (DeliveryState::Leased, 3));
        let step = apply(last, Failed).unwrap();
        assert_eq!((step.state, step.effect), (DeliveryState::Dead, Effect::DeadLetter));
    }

    #[test]
    fn a_release_costs_nothing() {
        use Input::{Claimed, Released};
        let after = run(new(1, false), &[Claimed, Released, Claimed, Released, Claimed]);
        assert_eq!((after.state, after.attempts), (DeliveryState::Leased, 1));
    }

    #[test]
    fn disposable_ones_end_without_a_dead_letter() {
        use Input::{Claimed, Failed, FailedForGood};
        for end in [Failed, FailedForGood] {
            assert_eq!(run(new(1, true), &[Claimed, end]).state, DeliveryState::Cancelled);
        }
        assert_eq!(run(new(1, true), &[Input::Superseded]).state, DeliveryState::Cancelled);
        assert!(apply(new(1, false), Input::Superseded).is_err());
        let sending = run(new(1, true), &[Claimed]);
        assert!(apply(sending, Input::Superseded).is_err());
    }

    #[test]
    fn names_are_read_back() {
        for state in DeliveryState::ALL {
            assert_eq!(DeliveryState::from_text(state.as_str()), Some(state));
        }
    }

    proptest! {
        #[test]
        fn it_never_leaves_its_edges(
            max_attempts in 1i32..=10,
            disposable: bool,
            picks in proptest::collection::vec(0usize..INPUTS.len(), 0..80),
        ) {
            use DeliveryState::{Cancelled, Dead, Delivered, Leased, Pending};
            let mut delivery = new(max_attempts, disposable);
            let (mut dead_letters, mut sent) = (0, 0);
            for pick in picks {
                let Ok(step) = apply(delivery, INPUTS[pick]) else { continue };
                let allowed: &[DeliveryState] = match delivery.state {
                    Pending => &[Leased, Cancelled],
                    Leased => &[Delivered, Pending, Dead, Cancelled],
                    Delivered | Dead | Cancelled => &[],
                };
                prop_assert!(allowed.contains(&step.state), "{delivery:?} {step:?}");
                prop_assert!((0..=max_attempts).contains(&step.attempts));
                prop_assert_eq!(step.effect == Effect::DeadLetter, step.state == Dead);
                prop_assert!(!(step.effect == Effect::Retry && step.attempts >= max_attempts), "no attempt is left");
                dead_letters += i32::from(step.effect == Effect::DeadLetter);
                sent += i32::from(INPUTS[pick] == Input::Claimed) - i32::from(INPUTS[pick] == Input::Released);
                delivery = Delivery { state: step.state, attempts: step.attempts, ..delivery };
            }
            prop_assert!(sent <= max_attempts);
            prop_assert!(dead_letters <= 1 && !(disposable && dead_letters > 0));
            // What is told as a real event is never dropped.
            prop_assert!(disposable || delivery.state != Cancelled);
        }
    }
}
