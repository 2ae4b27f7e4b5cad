//! Decides when a worker is healthy and when it is down, from the results of its probes. Pure.

/// The result of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// It is healthy, and serves these models.
    Well(Vec<String>),
    /// It refuses connections or reports that it is not healthy.
    Unwell(String),
    /// It did not answer in time, possibly because it is busy.
    Silent(String),
}

/// Silent probes in a row after which a worker counts as hung. With [`super::probe::TIMEOUT`] and a second in between: about
/// 18 s.
pub const SILENT_LIMIT: u32 = 3;

/// A worker's health.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// No probe has succeeded yet.
    #[default]
    Unknown,
    /// Takes requests.
    Well {
        /// Consecutive probes without an answer.
        silent: u32,
    },
    /// Takes none.
    Down,
}

/// The change that a probe causes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// It takes requests from now on.
    Up,
    /// It takes no requests from now on, and its requests are to be abandoned.
    Down,
}

impl Health {
    /// Applies the result of a probe.
    pub fn observe(&mut self, probe: &Probe) -> Change {
        let (next, change) = match (&*self, probe) {
            (Self::Well { .. }, Probe::Well(_)) => (Self::Well { silent: 0 }, Change::None),
            (Self::Unknown | Self::Down, Probe::Well(_)) => (Self::Well { silent: 0 }, Change::Up),
            (Self::Well { .. }, Probe::Unwell(_)) => (Self::Down, Change::Down),
            (Self::Well { silent }, Probe::Silent(_)) if silent + 1 >= SILENT_LIMIT => (Self::Down, Change::Down),
            (Self::Well { silent }, Probe::Silent(_)) => (Self::Well { silent: silent + 1 }, Change::None),
            (Self::Unknown, Probe::Unwell(_) | Probe::Silent(_)) => (Self::Unknown, Change::None),
            (Self::Down, Probe::Unwell(_) | Probe::Silent(_)) => (Self::Down, Change::None),
        };
        *self = next;
        change
    }

    /// Whether it takes requests.
    #[must_use]
    pub fn is_well(&self) -> bool {
        matches!(self, Self::Well { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(probes: &[Probe]) -> Vec<Change> {
        let mut health = Health::default();
        probes.iter().map(|probe| health.observe(probe)).collect()
    }

    #[test]
    fn a_refusal_is_believed_at_once_a_silence_only_after_a_while() {
        let (well, unwell, silent) =
            (Probe::Well(vec![]), Probe::Unwell("refused".into()), Probe::Silent("timeout".into()));
        assert_eq!(run(&[well.clone(), unwell.clone(), well.clone()]), [Change::Up, Change::Down, Change::Up]);
        let s = silent.clone();
        assert_eq!(
            run(&[well.clone(), s.clone(), s.clone(), well.clone(), s.clone(), s.clone(), s]),
            [Change::Up, Change::None, Change::None, Change::None, Change::None, Change::None, Change::Down]
        );
        assert_eq!(run(&[unwell, silent, well]), [Change::None, Change::None, Change::Up]);
    }
}
