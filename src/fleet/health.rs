//! When a worker is healthy and when it is down: a pure function of what its probes saw.

/// What one probe saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// It answers as it should, and serves these models.
    Well(Vec<String>),
    /// It refuses connections or says itself that it is unwell: there is no doubt.
    Unwell(String),
    /// It did not answer in time: it may only be busy.
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
        /// Probes in a row that went unanswered.
        silent: u32,
    },
    /// Takes none.
    Down,
}

/// What a probe changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// It takes requests from now on.
    Up,
    /// It takes none from now on, and what it has is to be abandoned.
    Down,
}

impl Health {
    /// Takes a probe into account.
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
