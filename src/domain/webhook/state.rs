//! The lifecycle of a delivery as one pure function: `(delivery, input) -> (delivery, effect)`, or a refusal.

use strum::{EnumCount, EnumString, IntoStaticStr, VariantArray};

use super::AttemptResult;
use crate::domain::variants;

/// The states of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EnumCount, VariantArray, EnumString, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
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
    pub const ALL: [Self; Self::COUNT] = variants();

    /// Its name, as stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
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
        text.parse().ok()
    }
}

/// The state machine's view of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    pub state: DeliveryState,
    /// The number of attempts begun.
    pub attempts: i32,
    /// The most attempts that may be made.
    pub max_attempts: i32,
    /// Whether it never becomes a dead letter ([`super::WebhookEvent::is_disposable`]).
    pub disposable: bool,
}

/// What can happen to a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, VariantArray)]
pub enum DeliveryTrigger {
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
    /// There is no receiver: the endpoint that it is for was deleted.
    Unaddressed,
}

impl DeliveryTrigger {
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
pub struct DeliveryStep {
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
pub struct DeliveryRefusal {
    pub from: DeliveryState,
    pub input: DeliveryTrigger,
}

/// The state machine of a delivery.
///
/// # Errors
/// [`DeliveryRefusal`] where the input makes no sense in the state: the caller must write nothing.
#[allow(clippy::match_same_arms)] // read as a table: one block an input
pub fn apply(of: Delivery, input: DeliveryTrigger) -> Result<DeliveryStep, DeliveryRefusal> {
    use DeliveryState::{Cancelled, Dead, Delivered, Leased, Pending};
    let refused = Err(DeliveryRefusal { from: of.state, input });
    let attempts = of.attempts;
    let to = |state, effect| Ok(DeliveryStep { state, attempts, effect });
    let end = if of.disposable { to(Cancelled, Effect::None) } else { to(Dead, Effect::DeadLetter) };
    let try_again = if attempts < of.max_attempts { to(Pending, Effect::Retry) } else { end };
    match (of.state, input) {
        // Counted before it is sent, so that a body that crashes its sender can't do so for ever.
        (Pending, DeliveryTrigger::Claimed) if attempts < of.max_attempts => {
            Ok(DeliveryStep { state: Leased, attempts: attempts + 1, effect: Effect::None })
        }
        (Pending | Leased | Delivered | Dead | Cancelled, DeliveryTrigger::Claimed) => refused,

        (Leased, DeliveryTrigger::Released) => {
            Ok(DeliveryStep { state: Pending, attempts: attempts - 1, effect: Effect::None })
        }
        (Pending | Delivered | Dead | Cancelled, DeliveryTrigger::Released) => refused,

        (Leased, DeliveryTrigger::Succeeded) => to(Delivered, Effect::None),
        (Pending | Delivered | Dead | Cancelled, DeliveryTrigger::Succeeded) => refused,

        (Leased, DeliveryTrigger::Failed | DeliveryTrigger::LeaseExpired) => try_again,
        (Pending | Delivered | Dead | Cancelled, DeliveryTrigger::Failed | DeliveryTrigger::LeaseExpired) => refused,

        (Leased, DeliveryTrigger::FailedForGood) => end,
        (Pending | Delivered | Dead | Cancelled, DeliveryTrigger::FailedForGood) => refused,

        // Only disposable events can be superseded. A delivery being sent finishes.
        (Pending, DeliveryTrigger::Superseded) if of.disposable => to(Cancelled, Effect::None),
        (Pending | Leased | Delivered | Dead | Cancelled, DeliveryTrigger::Superseded) => refused,

        (Pending, DeliveryTrigger::Unaddressed) => end,
        (Leased | Delivered | Dead | Cancelled, DeliveryTrigger::Unaddressed) => refused,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const INPUTS: &[DeliveryTrigger] = DeliveryTrigger::VARIANTS;

    fn new(max_attempts: i32, disposable: bool) -> Delivery {
        Delivery { state: DeliveryState::Pending, attempts: 0, max_attempts, disposable }
    }

    fn run(mut delivery: Delivery, inputs: &[DeliveryTrigger]) -> Delivery {
        for input in inputs {
            let step = apply(delivery, *input).unwrap();
            delivery = Delivery { state: step.state, attempts: step.attempts, ..delivery };
        }
        delivery
    }

    #[test]
    fn three_failures_are_a_dead_letter() {
        use DeliveryTrigger::{Claimed, Failed, LeaseExpired};
        let last = run(new(3, false), &[Claimed, Failed, Claimed, LeaseExpired, Claimed]);
        assert_eq!((last.state, last.attempts), (DeliveryState::Leased, 3));
        let step = apply(last, Failed).unwrap();
        assert_eq!((step.state, step.effect), (DeliveryState::Dead, Effect::DeadLetter));
    }

    #[test]
    fn a_release_costs_nothing() {
        use DeliveryTrigger::{Claimed, Released};
        let after = run(new(1, false), &[Claimed, Released, Claimed, Released, Claimed]);
        assert_eq!((after.state, after.attempts), (DeliveryState::Leased, 1));
    }

    #[test]
    fn disposable_ones_end_without_a_dead_letter() {
        use DeliveryTrigger::{Claimed, Failed, FailedForGood};
        for end in [Failed, FailedForGood] {
            assert_eq!(run(new(1, true), &[Claimed, end]).state, DeliveryState::Cancelled);
        }
        assert_eq!(run(new(1, true), &[DeliveryTrigger::Superseded]).state, DeliveryState::Cancelled);
        assert!(apply(new(1, false), DeliveryTrigger::Superseded).is_err());
        let sending = run(new(1, true), &[Claimed]);
        assert!(apply(sending, DeliveryTrigger::Superseded).is_err());
    }

    #[test]
    fn without_a_receiver_it_is_a_dead_letter_unless_it_may_be_lost() {
        let end =
            |disposable| apply(new(3, disposable), DeliveryTrigger::Unaddressed).map(|step| (step.state, step.effect));
        assert_eq!(end(false), Ok((DeliveryState::Dead, Effect::DeadLetter)));
        assert_eq!(end(true), Ok((DeliveryState::Cancelled, Effect::None)));
    }

    /// Databases have them: a variant may be renamed, its name may not.
    #[test]
    fn stored_names_stay_as_they_are() {
        let names = ["pending", "leased", "delivered", "dead", "cancelled"];
        assert_eq!(DeliveryState::ALL.map(DeliveryState::as_str), names);
        assert_eq!(names.map(DeliveryState::from_text), DeliveryState::ALL.map(Some));
        assert_eq!(DeliveryState::from_text("nothing"), None);
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
                    Pending => &[Leased, Cancelled, Dead],
                    Leased => &[Delivered, Pending, Dead, Cancelled],
                    Delivered | Dead | Cancelled => &[],
                };
                prop_assert!(allowed.contains(&step.state), "{delivery:?} {step:?}");
                prop_assert!((0..=max_attempts).contains(&step.attempts));
                prop_assert_eq!(step.effect == Effect::DeadLetter, step.state == Dead);
                prop_assert!(!(step.effect == Effect::Retry && step.attempts >= max_attempts), "no attempt is left");
                dead_letters += i32::from(step.effect == Effect::DeadLetter);
                let is = |trigger| i32::from(INPUTS[pick] == trigger);
                sent += is(DeliveryTrigger::Claimed) - is(DeliveryTrigger::Released);
                delivery = Delivery { state: step.state, attempts: step.attempts, ..delivery };
            }
            prop_assert!(sent <= max_attempts);
            prop_assert!(dead_letters <= 1 && !(disposable && dead_letters > 0));
            // What is told as a real event is never dropped.
            prop_assert!(disposable || delivery.state != Cancelled);
        }
    }
}
