//! Named points at which a test can make this process die, as by `kill -9`: no unwinding, nothing flushed.
//!
//! `TIDEMILL_FAULT=part-object` aborts at the first visit of that point, `TIDEMILL_FAULT=part-object:3` at the third.
//! Only builds with debug assertions do that; in a release build a point is empty. So no test has to hope that a signal
//! hits the moment between two writes.
//!
//! `TIDEMILL_FAULT=panic-hub` makes that part of the server panic while it works.

#[cfg(any(debug_assertions, test))]
use crate::supervise::Part;

/// The points at which the process can be made to die. Each is a moment at which one write is durable and the next is
/// not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumString, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "kebab-case")]
pub enum Fault {
    /// An upload's object exists, its row does not.
    UploadObject,
    /// The object of a part of an upload exists, its row does not.
    UploadedPart,
    /// A part's object exists, its row does not.
    PartObject,
    /// A part's row exists; the scheduler does not know yet.
    PartRow,
    /// All lines of a segment have a result; its end is not written.
    SegmentFinish,
    /// A segment's merged object exists; its end is not written.
    MergedObject,
    /// A segment's end is committed (for the last segment, also the batch's end and its webhooks), and nobody has been
    /// notified.
    SegmentFinished,
    /// Within the transaction that claims deliveries: they are leased, their attempts are not written, nothing is
    /// committed.
    DeliveryClaimed,
    /// A delivery's claim and its attempt are written; nothing is sent.
    DeliveryAttempt,
    /// The receiver has answered; the answer is not recorded.
    DeliveryAnswered,
    /// The receiver's answer is recorded.
    DeliverySettled,
}

impl Fault {
    /// The point's name in `TIDEMILL_FAULT`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// The fault that the environment asks for.
#[cfg(any(debug_assertions, test))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Armed {
    Death(Fault),
    Panic(Part),
}

/// Aborts here if the environment asks for it.
#[cfg(debug_assertions)]
pub(crate) fn point(fault: Fault) {
    if is_armed(Armed::Death(fault)) {
        eprintln!("dying at {}", fault.name());
        std::process::abort();
    }
}

/// Panics here if the environment asks for it.
#[cfg(debug_assertions)]
pub(crate) fn panic_in(part: Part) {
    assert!(!is_armed(Armed::Panic(part)), "TIDEMILL_FAULT=panic-{part}");
}

/// Whether this is the visit at which to act.
#[cfg(debug_assertions)]
fn is_armed(here: Armed) -> bool {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    };
    static ARMED: LazyLock<Option<(Armed, u32)>> = LazyLock::new(|| {
        let text = std::env::var("TIDEMILL_FAULT").ok()?;
        Some(parse(&text).unwrap_or_else(|| panic!("TIDEMILL_FAULT={text}: no such point")))
    });
    static VISITS: AtomicU32 = AtomicU32::new(0);
    ARMED.is_some_and(|(armed, at)| armed == here && VISITS.fetch_add(1, Ordering::Relaxed) + 1 == at)
}

/// Release builds have no faults.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub(crate) fn point(_: Fault) {}

/// Release builds have no faults.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub(crate) fn panic_in(_: crate::supervise::Part) {}

/// Parses a point's name and, after a colon, the number of the visit; default 1.
#[cfg(any(debug_assertions, test))]
fn parse(text: &str) -> Option<(Armed, u32)> {
    let (name, at) = text.split_once(':').unwrap_or((text, "1"));
    let armed = match name.strip_prefix("panic-") {
        Some(name) => Armed::Panic(name.parse().ok()?),
        None => Armed::Death(name.parse().ok()?),
    };
    Some((armed, at.parse().ok().filter(|at| *at > 0)?))
}

#[cfg(test)]
mod tests {
    use strum::VariantArray;

    use super::*;

    #[test]
    fn points_are_named_and_counted() {
        assert_eq!((Fault::PartObject.name(), Part::HubRead.name()), ("part-object", "hub-read"));
        for fault in Fault::VARIANTS {
            assert_eq!(parse(fault.name()), Some((Armed::Death(*fault), 1)));
            assert_eq!(parse(&format!("{}:7", fault.name())), Some((Armed::Death(*fault), 7)));
        }
        for part in Part::VARIANTS {
            assert_eq!(parse(&format!("panic-{part}:2")), Some((Armed::Panic(*part), 2)));
        }
        for bad in ["", "part", "panic-", "panic-part", "part-row:", "part-row:0", "part-row:x", ":1"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
