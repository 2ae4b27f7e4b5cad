//! Reads a worker's list of models.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::domain::{request_line::MAX_MODEL_BYTES, text::is_plain};

/// The most models of one worker that are used, because a claim queries the database for all models of all workers.
const MAX_MODELS: usize = 1_000;
/// Characters of a name that is left out in the log.
const SHOWN: usize = 60;

/// The names in a model list. Of what can't be one, because it is no text, or no line could ask for it, or there are too
/// many of them, nothing is taken but the others are. None: it is no model list, or there is no name in it that can be used.
pub(super) fn models_of(page: &[u8]) -> Option<Listed> {
    #[derive(Deserialize)]
    struct List<'a> {
        #[serde(borrow)]
        data: Vec<&'a RawValue>,
    }
    #[derive(Deserialize)]
    struct Model {
        id: String,
    }
    let list: List<'_> = serde_json::from_slice(page).ok()?;
    let mut listed = Listed::default();
    for one in list.data {
        match serde_json::from_str::<Model>(one.get()) {
            Ok(Model { id }) if is_usable(&id) && listed.models.len() < MAX_MODELS => listed.models.push(id),
            Ok(Model { id }) => listed.drop(&id),
            Err(_) => listed.drop(one.get()),
        }
    }
    (!listed.models.is_empty() || listed.dropped.is_none()).then_some(listed)
}

/// Whether a line can name it.
fn is_usable(model: &str) -> bool {
    (1..=MAX_MODEL_BYTES).contains(&model.len()) && is_plain(model)
}

/// The models of a list.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) models: Vec<String>,
    /// How many were left out, and the first of them, in part.
    pub(super) dropped: Option<(usize, String)>,
}

impl Listed {
    fn drop(&mut self, what: &str) {
        let count = self.dropped.as_ref().map_or(0, |(count, _)| *count) + 1;
        let first = self.dropped.take().map(|(_, first)| first);
        // Escaped, for the log.
        let first = first.unwrap_or_else(|| what.chars().take(SHOWN).collect::<String>().escape_debug().to_string());
        self.dropped = Some((count, first));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_can_not_be_used_costs_that_name() {
        let list = |items: &str| models_of(format!(r#"{{"object":"list","data":[{items}]}}"#).as_bytes());
        let long = format!(r#"{{"id":"{}"}}"#, "x".repeat(1_025));
        for bad in [
            r#"{"id":"a\u0000b"}"#,
            r#"{"id":"\u001b[31m"}"#,
            r#"{"id":""}"#,
            r#"{"id":"\ud800"}"#,
            r#"{"id":7}"#,
            "{}",
            "7",
            &long,
        ] {
            let listed = list(&format!(r#"{{"id":"good"}},{bad},{{"id":"also"}}"#)).unwrap();
            assert_eq!(listed.models, ["good", "also"], "{bad}");
            let (count, first) = listed.dropped.unwrap();
            assert!(count == 1 && is_plain(&first), "{bad}: {first:?}");
            assert_eq!(list(bad), None, "a worker of which nothing can be used is not well");
        }
        assert_eq!(list("").unwrap(), Listed::default());
        let many: Vec<String> = (0..1_500).map(|number| format!(r#"{{"id":"m{number}"}}"#)).collect();
        let listed = list(&many.join(",")).unwrap();
        assert_eq!((listed.models.len(), listed.dropped), (1_000, Some((500, "m1000".into()))));
        assert_eq!(models_of(b"[]"), None);
    }
}
