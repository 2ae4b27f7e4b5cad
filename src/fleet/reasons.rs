//! Learns whether a worker gives a reason for the end of its texts; some servers never do.

use std::{collections::HashMap, sync::Arc};

use strum::EnumCount as _;

use crate::domain::{Endpoint, answer::Ending};

/// After this many answers with a null reason and none with a reason, the server counts as one that gives none.
const DOUBTED: u8 = 3;
/// The most models remembered. A worker with more is a gateway; beyond that, all are forgotten.
const MODELS: usize = 256;

/// What a worker has said so far, by model and endpoint: behind a gateway there are several servers.
#[derive(Debug, Default)]
pub(super) struct Reasons {
    models: HashMap<Arc<str>, [Known; Endpoint::COUNT]>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Known {
    named: bool,
    nulls: u8,
}

/// The verdict about an answer without a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Worth {
    /// It is an answer.
    Fair,
    /// Nobody knows yet: it is better tried again, and taken if there are no more tries.
    Doubtful,
    /// The server names reasons, so this text has not ended.
    Unfinished,
}

impl Reasons {
    /// Notes an answer, and says what it is worth.
    pub(super) fn note(&mut self, model: &str, endpoint: Endpoint, ending: Ending) -> Worth {
        if ending == Ending::NotAsked {
            return Worth::Fair;
        }
        let at = Endpoint::ALL.iter().position(|other| *other == endpoint).unwrap_or_default();
        let known = match self.models.get_mut(model) {
            Some(known) => known,
            None => {
                if self.models.len() >= MODELS {
                    self.models.clear();
                }
                self.models.entry(model.into()).or_default()
            }
        };
        let known = &mut known[at];
        match ending {
            Ending::Named => {
                known.named = true;
                Worth::Fair
            }
            Ending::Null | Ending::Missing if known.named => Worth::Unfinished,
            Ending::Null if known.nulls < DOUBTED => {
                known.nulls += 1;
                Worth::Doubtful
            }
            Ending::Null | Ending::Missing | Ending::NotAsked => Worth::Fair,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_never_names_a_reason_is_left_in_peace() {
        let chat = Endpoint::ChatCompletions;
        let mut reasons = Reasons::default();
        let worth: Vec<Worth> = (0..5).map(|_| reasons.note("m", chat, Ending::Null)).collect();
        assert_eq!(worth, [Worth::Doubtful, Worth::Doubtful, Worth::Doubtful, Worth::Fair, Worth::Fair]);
        assert_eq!(reasons.note("other", chat, Ending::Missing), Worth::Fair);
        assert_eq!(reasons.note("m", Endpoint::Completions, Ending::Named), Worth::Fair);
        assert_eq!(reasons.note("m", chat, Ending::Null), Worth::Fair, "of another endpoint");
        assert_eq!(reasons.note("m", chat, Ending::Named), Worth::Fair);
        assert_eq!(reasons.note("m", chat, Ending::Null), Worth::Unfinished);
        assert_eq!(reasons.note("m", chat, Ending::Missing), Worth::Unfinished);
        assert_eq!(reasons.note("other", chat, Ending::Missing), Worth::Fair);
    }
}
