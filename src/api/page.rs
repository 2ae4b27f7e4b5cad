//! Page tokens: opaque to clients, bound to the filters of the list that they continue (AIP-158).

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};

/// Items on a page where the client does not say.
pub const DEFAULT_PAGE: u64 = 50;
/// The most items on a page.
pub const MAX_PAGE: u64 = 1_000;
/// Names the form of the token, so that a later one can be told apart.
const VERSION: u8 = 1;
/// Of a hash that only has to notice a mistake, not an attack: the token holds nothing that its reader may not see.
const HASH_BYTES: usize = 8;

/// Why a page can't be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// Not a number of items.
    #[error("page_size is {0}; expected 1 to {MAX_PAGE}, or 0 for {DEFAULT_PAGE}")]
    Size(i32),
    /// Not one of our tokens.
    #[error("page_token is not one that this server gave out; leave it empty for the first page")]
    Token,
    /// Another list's token.
    #[error("page_token belongs to a list with other filters; keep the filters from page to page")]
    Filters,
}

/// How many items a page has.
///
/// # Errors
/// [`PageError::Size`]. A size over the most is taken as the most (AIP-158).
pub fn size(asked: i32) -> Result<u64, PageError> {
    match u64::try_from(asked) {
        Ok(0) => Ok(DEFAULT_PAGE),
        Ok(size) => Ok(size.min(MAX_PAGE)),
        Err(_) => Err(PageError::Size(asked)),
    }
}

/// The token of the page after the item `last`, in a list with these filters (any text that tells them apart).
#[must_use]
pub fn token(last: &str, filters: &str) -> String {
    let mut bytes = vec![VERSION];
    bytes.extend_from_slice(&hash(filters));
    bytes.extend_from_slice(last.as_bytes());
    URL_SAFE_NO_PAD.encode(bytes)
}

/// The item behind which a page begins. None: the first page.
///
/// # Errors
/// [`PageError::Token`], [`PageError::Filters`].
pub fn after(token: &str, filters: &str) -> Result<Option<String>, PageError> {
    if token.is_empty() {
        return Ok(None);
    }
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| PageError::Token)?;
    let [VERSION, rest @ ..] = bytes.as_slice() else { return Err(PageError::Token) };
    let (found, last) = rest.split_at_checked(HASH_BYTES).ok_or(PageError::Token)?;
    if found != hash(filters) {
        return Err(PageError::Filters);
    }
    String::from_utf8(last.to_vec()).map(Some).map_err(|_| PageError::Token)
}

fn hash(filters: &str) -> [u8; HASH_BYTES] {
    let digest = Sha256::digest(filters);
    std::array::from_fn(|at| digest[at])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_have_a_default_and_a_cap() {
        assert_eq!((size(0), size(7), size(5_000)), (Ok(DEFAULT_PAGE), Ok(7), Ok(MAX_PAGE)));
        assert_eq!(size(-1), Err(PageError::Size(-1)));
    }

    proptest! {
        #[test]
        fn a_token_leads_on_with_its_own_filters_only(last in "\\PC{0,40}", filters in "\\PC{0,40}", other in "\\PC{0,40}") {
            let token = token(&last, &filters);
            prop_assert_eq!(after(&token, &filters), Ok(Some(last)));
            if other != filters {
                prop_assert_eq!(after(&token, &other), Err(PageError::Filters));
            }
        }

        #[test]
        fn no_text_is_too_odd(text in "\\PC{1,60}") {
            let _ = after(&text, "");
        }
    }
}
