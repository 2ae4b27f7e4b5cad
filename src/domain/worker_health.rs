//! How a worker is asked whether it is well.

use std::{str::FromStr, time::Duration};

/// What workers are asked for to see whether they are well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthPath(Option<String>);

/// The longest path, in bytes.
const MAX_PATH: usize = 1_024;
/// The word for no path.
const NONE: &str = "none";

impl HealthPath {
    /// The path; none: only their list of models.
    #[must_use]
    pub fn path(&self) -> Option<&str> {
        self.0.as_deref()
    }

    /// The setting's text: the path, or "none".
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.path().unwrap_or(NONE)
    }
}

impl FromStr for HealthPath {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'?' | b'#' | b'\\');
        match text {
            NONE => Ok(Self(None)),
            path if path.starts_with('/') && path.len() <= MAX_PATH && path.bytes().all(plain) => {
                Ok(Self(Some(path.into())))
            }
            _ => Err("expected a path that begins with \"/\", such as /health/liveliness, or none"),
        }
    }
}

/// The time between two health checks: 100 ms to 1 h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthInterval(Duration);

impl HealthInterval {
    /// The shortest.
    pub const LEAST: Duration = Duration::from_millis(100);
    /// The longest.
    pub const MOST: Duration = Duration::from_secs(3_600);

    /// An interval of this length, if it is in range. Rounded down to microseconds.
    #[must_use]
    pub fn new(span: Duration) -> Option<Self> {
        let good = (Self::LEAST..=Self::MOST).contains(&span);
        good.then(|| Self(Duration::from_micros(u64::try_from(span.as_micros()).unwrap_or(u64::MAX))))
    }

    /// The stored form, in microseconds.
    #[must_use]
    pub fn from_micros(micros: i64) -> Option<Self> {
        Self::new(Duration::from_micros(u64::try_from(micros).ok()?))
    }

    /// In microseconds.
    #[must_use]
    pub fn micros(self) -> i64 {
        i64::try_from(self.0.as_micros()).unwrap_or(i64::MAX)
    }

    /// The time.
    #[must_use]
    pub fn span(self) -> Duration {
        self.0
    }
}

/// A worker's own settings. None: the server's are used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnHealth {
    /// The path of the check. `None`: the server's setting.
    pub path: Option<HealthPath>,
    /// How often.
    pub interval: Option<HealthInterval>,
}

/// A change of a worker's own settings. None: the setting stays as it is. `Some(None)`: the server's is used from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealthChange {
    /// The new path. `Some(None)`: the server's setting again.
    pub path: Option<Option<HealthPath>>,
    /// The new interval. `Some(None)`: the server's setting again.
    pub interval: Option<Option<HealthInterval>>,
}

impl OwnHealth {
    /// These settings after a change.
    #[must_use]
    pub fn changed(self, change: &HealthChange) -> Self {
        Self { path: change.path.clone().unwrap_or(self.path), interval: change.interval.unwrap_or(self.interval) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_as_they_are_shown() {
        for text in ["none", "/health", "/health/liveliness"] {
            assert_eq!(text.parse::<HealthPath>().unwrap().as_str(), text);
        }
        assert_eq!("none".parse::<HealthPath>().unwrap().path(), None);
        for bad in ["", "health", "/a?b", "/a#b", "/a b", "/a\\b", "/a\0", "/ä", &format!("/{}", "x".repeat(1_024))] {
            assert!(bad.parse::<HealthPath>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn intervals_have_a_range() {
        let of = |micros: u64| HealthInterval::new(Duration::from_micros(micros)).map(HealthInterval::micros);
        assert_eq!((of(100_000), of(3_600_000_000)), (Some(100_000), Some(3_600_000_000)));
        assert_eq!((of(99_999), of(3_600_000_001)), (None, None));
        assert_eq!((HealthInterval::from_micros(-1), HealthInterval::from_micros(i64::MAX)), (None, None));
        let fine = HealthInterval::new(Duration::from_nanos(100_000_999)).unwrap();
        assert_eq!(HealthInterval::from_micros(fine.micros()), Some(fine), "it is stored as it is");
    }

    #[test]
    fn a_change_leaves_what_it_does_not_name() {
        let path = Some("/ok".parse().unwrap());
        let interval = HealthInterval::new(Duration::from_secs(5));
        let own = OwnHealth { path, interval };
        assert_eq!(own.clone().changed(&HealthChange::default()), own);
        let change = HealthChange { path: Some(None), interval: None };
        assert_eq!(own.changed(&change), OwnHealth { path: None, interval });
    }
}
