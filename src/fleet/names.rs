//! Names of models, and patterns: a gateway may list `*` or `openai/*` for all models that it passes on.

/// Whether a listed name is a pattern.
#[must_use]
pub fn is_pattern(listed: &str) -> bool {
    listed.contains('*')
}

/// Whether a listed name or pattern matches the model: `*` is any text, including "/".
#[must_use]
pub fn stands_for(listed: &str, model: &str) -> bool {
    let mut parts = listed.split('*');
    let Some(mut rest) = parts.next().and_then(|first| model.strip_prefix(first)) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        // The earliest place leaves the most for the others.
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_star_is_any_text() {
        for (listed, model) in [
            ("m", "m"),
            ("*", "anything/at all"),
            ("openai/*", "openai/gpt"),
            ("openai/*", "openai/"),
            ("*-mini", "gpt-mini"),
            ("a*b*c", "a1bb2c"),
            ("a**b", "ab"),
        ] {
            assert!(stands_for(listed, model), "{listed} {model}");
        }
        for (listed, model) in
            [("m", "mm"), ("openai/*", "open/x"), ("*-mini", "mini"), ("a*b*c", "abb"), ("ab*ba", "aba")]
        {
            assert!(!stands_for(listed, model), "{listed} {model}");
        }
    }

    proptest! {
        #[test]
        fn what_is_cut_out_of_a_name_is_a_pattern_of_it(name in "[ab/é]{0,12}", cuts in prop::collection::vec((0usize..12, 0usize..4), 0..4)) {
            let mut chars: Vec<char> = name.chars().collect();
            for (at, length) in cuts {
                let (from, to) = (at.min(chars.len()), (at + length).min(chars.len()));
                chars.splice(from..to, ['*']);
            }
            let pattern: String = chars.into_iter().collect();
            prop_assert!(stands_for(&pattern, &name), "{} {}", pattern, name);
            prop_assert!(is_pattern(&pattern) || pattern == name);
        }
    }
}
