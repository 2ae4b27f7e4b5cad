//! Why a model with work is not served, as users read it.

use std::{fmt, time::Duration};

use super::ModelName;
use crate::engines::place::Memory;

/// Why a model with work is not served.
#[derive(Clone, Debug, PartialEq)]
pub enum Reason {
    /// An engine loads it.
    Loads {
        /// The model.
        model: ModelName,
        /// Where.
        gpus: Vec<u32>,
        /// For how long already.
        for_seconds: f64,
        /// How long it takes as a rule.
        of_seconds: f64,
    },
    /// Another model is served first.
    Turn {
        /// The model.
        model: ModelName,
        /// The other one.
        behind: ModelName,
        /// The lines that the other one has left.
        lines: u64,
        /// How long these take.
        seconds: f64,
    },
    /// It is next: another engine makes room.
    Next {
        /// The model.
        model: ModelName,
        /// The model that leaves.
        after: ModelName,
        /// The requests that it still has.
        in_flight: u64,
    },
    /// It has failed.
    Failed {
        /// The model.
        model: ModelName,
        /// Seconds until it is tried again. `None`: once its configuration changes.
        again_in: Option<f64>,
    },
    /// These GPUs can never hold it.
    NeverFits {
        /// The model.
        model: ModelName,
        /// The GPUs that it needs.
        gpus: usize,
        /// The memory that it needs of each.
        memory: Memory,
        /// The GPUs that there are.
        found: usize,
    },
    /// Memory that our engines don't hold is missing.
    Memory {
        /// The model.
        model: ModelName,
        /// A GPU.
        gpu: u32,
        /// What processes of others hold there.
        foreign: u64,
        /// Its memory.
        total: u64,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loads { model, gpus, for_seconds, of_seconds } => {
                write!(f, "{model} is loading")?;
                if !gpus.is_empty() {
                    let gpus: Vec<_> = gpus.iter().map(ToString::to_string).collect();
                    write!(f, " on gpu {}", gpus.join(","))?;
                }
                write!(f, " ({} of about {})", span(*for_seconds), span(*of_seconds))
            }
            Self::Turn { model, behind, lines, seconds } => {
                let (lines, span) = (grouped(*lines), span(*seconds));
                write!(f, "{model} waits for its turn: {behind} has {lines} lines left, about {span}")
            }
            Self::Next { model, after, in_flight: 0 } => write!(f, "{model} is next: {after} makes room"),
            Self::Next { model, after, in_flight } => {
                write!(f, "{model} is next: {after} finishes {} requests and makes room", grouped(*in_flight))
            }
            Self::Failed { model, again_in: Some(seconds) } => {
                write!(f, "{model} failed; next try in {}", span(*seconds))
            }
            Self::Failed { model, again_in: None } => {
                write!(f, "{model} failed, and is tried again when its configuration changes")
            }
            Self::NeverFits { model, gpus, memory: Memory::Whole, found } => {
                write!(f, "{model} needs {gpus} GPUs, and this machine may use {found}")
            }
            Self::NeverFits { model, gpus, memory: Memory::Bytes(bytes), found } => {
                let need = gib(*bytes);
                write!(
                    f,
                    "{model} needs {need} on {gpus} GPUs, and none of the {found} that may be used are that large"
                )
            }
            Self::Memory { model, foreign: 0, .. } => write!(f, "{model} waits until its GPUs' memory is free"),
            Self::Memory { model, gpu, foreign, total } => {
                let (foreign, total) = (gib(*foreign), gib(*total));
                write!(f, "{model} waits for memory: other programs hold {foreign} of the {total} of gpu {gpu}")
            }
        }
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

/// A span in the unit that a person would use.
fn span(seconds: f64) -> String {
    let seconds = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX).as_secs();
    match seconds {
        0..100 => format!("{seconds} s"),
        100..6_000 => format!("{} min", (seconds + 30) / 60),
        _ => format!("{:.1} h", seconds as f64 / 3_600.0),
    }
}

fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_read_as_sentences() {
        let turn = Reason::Turn { model: "qwen".into(), behind: "llama".into(), lines: 41_200, seconds: 2_100.0 };
        assert_eq!(turn.to_string(), "qwen waits for its turn: llama has 41,200 lines left, about 35 min");
        let loads = Reason::Loads { model: "llama".into(), gpus: vec![2, 3], for_seconds: 40.4, of_seconds: 180.0 };
        assert_eq!(loads.to_string(), "llama is loading on gpu 2,3 (40 s of about 3 min)");
        let next = Reason::Next { model: "a".into(), after: "b".into(), in_flight: 12 };
        assert_eq!(next.to_string(), "a is next: b finishes 12 requests and makes room");
        let held = Reason::Memory { model: "a".into(), gpu: 0, foreign: 77 << 30, total: 80 << 30 };
        assert_eq!(held.to_string(), "a waits for memory: other programs hold 77.0 GiB of the 80.0 GiB of gpu 0");
        assert_eq!(
            (grouped(999), grouped(1_000), grouped(1_234_567)),
            ("999".into(), "1,000".into(), "1,234,567".into())
        );
        assert_eq!((span(f64::INFINITY).len() > 3, span(99.9), span(7_200.0)), (true, "99 s".into(), "2.0 h".into()));
    }
}
