//! The priority of batch requests inside their worker.

use std::str::FromStr;

/// How a batch request tells its worker that other requests go first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WorkerPriority {
    /// In a header that vLLM reads and others ignore.
    #[default]
    Auto,
    /// Not at all.
    Off,
    /// By this `priority` in their body. Lower numbers go first.
    Body(i32),
}

impl FromStr for WorkerPriority {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            number => number.parse().map(Self::Body).map_err(|_| "expected auto, off or a whole number such as 10"),
        }
    }
}
