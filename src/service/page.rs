//! Page tokens: opaque, and valid only for the list and the filters that they came from.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};

use super::ServiceError;
use crate::domain::text::is_storable;

/// The first byte of a token: its format.
const VERSION: u8 = 1;
/// The number of bytes of the filters' hash in a token.
const HASH: usize = 8;
/// The default page size, and the largest.
const DEFAULT_SIZE: i32 = 50;
const MAX_SIZE: i32 = 1_000;
/// The most bytes of items in a page, as the protocol encodes them: a gRPC message has at most 4 MiB. A page that is
/// cut short by this has a next page.
const BYTES: usize = 3 * 1024 * 1024;

/// The items found for a page, and one more if there is a next page.
#[derive(Debug)]
pub struct Found<T> {
    /// The items.
    pub items: Vec<T>,
    /// Cuts the items to the page, once their sizes are known.
    pub page: Page,
}

/// A page of a list.
#[derive(Debug)]
pub struct Page {
    /// The most items.
    pub size: u64,
    /// The id of the previous page's last item.
    pub after: Option<String>,
    filters: [u8; HASH],
}

impl Page {
    /// Reads a request's page fields. `filters`: its other fields that select the items, and the caller.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub fn parse(size: i32, token: &str, filters: &[&str]) -> Result<Self, ServiceError> {
        let size = match size {
            0 => DEFAULT_SIZE,
            1..=MAX_SIZE => size,
            _ => {
                return Err(ServiceError::field(
                    "page_size",
                    format!("must be 1 to {MAX_SIZE}, or 0 for {DEFAULT_SIZE}"),
                ));
            }
        };
        let filters = hash(filters);
        let after = if token.is_empty() { None } else { Some(read(token, filters)?) };
        Ok(Self { size: u64::try_from(size).unwrap_or(0), after, filters })
    }

    /// Cuts the items to the page, and creates the token of the next page if there is one. `bytes`: the size of an item
    /// as the protocol encodes it.
    pub fn finish<T>(&self, items: Vec<T>, bytes: impl Fn(&T) -> usize, id: impl Fn(&T) -> &str) -> (Vec<T>, String) {
        let found = items.len();
        let mut room = BYTES;
        let mut page: Vec<T> = Vec::with_capacity(found);
        for item in items {
            let bytes = bytes(&item);
            if page.len() as u64 == self.size || (bytes > room && !page.is_empty()) {
                break;
            }
            room = room.saturating_sub(bytes);
            page.push(item);
        }
        let token = match page.last() {
            Some(last) if page.len() < found => self.token(id(last)),
            _ => String::new(),
        };
        (page, token)
    }

    fn token(&self, last: &str) -> String {
        let mut bytes = vec![VERSION];
        bytes.extend(self.filters);
        bytes.extend(last.as_bytes());
        URL_SAFE_NO_PAD.encode(bytes)
    }
}

fn read(token: &str, filters: [u8; HASH]) -> Result<String, ServiceError> {
    let bad = |what: &str| ServiceError::field("page_token", what);
    let none = || bad("is not a next_page_token of this server");
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| none())?;
    let (version, rest) = bytes.split_first().ok_or_else(none)?;
    let (theirs, last) = rest.split_at_checked(HASH).ok_or_else(none)?;
    if *version != VERSION {
        return Err(none());
    }
    if theirs != filters {
        return Err(bad("comes from a list with other filters: keep them the same from page to page"));
    }
    String::from_utf8(last.to_vec()).ok().filter(|last| !last.is_empty() && is_storable(last)).ok_or_else(none)
}

fn hash(filters: &[&str]) -> [u8; HASH] {
    let mut hasher = Sha256::new();
    for filter in filters {
        hasher.update((filter.len() as u64).to_le_bytes());
        hasher.update(filter.as_bytes());
    }
    let digest = hasher.finalize();
    std::array::from_fn(|at| digest[at])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(id: &str, filler: usize) -> (String, usize) {
        (id.to_owned(), filler)
    }

    fn finish(page: &Page, items: Vec<(String, usize)>) -> (Vec<(String, usize)>, String) {
        page.finish(items, |(_, bytes)| *bytes, |(id, _)| id)
    }

    #[test]
    fn a_token_goes_on_with_the_same_filters_only() {
        let page = Page::parse(1, "", &["files", "me"]).unwrap();
        let (items, token) = finish(&page, vec![file("a", 0), file("b", 0)]);
        assert_eq!(items.len(), 1);
        assert_eq!(Page::parse(1, &token, &["files", "me"]).unwrap().after.as_deref(), Some("a"));
        for other in [&["files", "you"][..], &["file", "sme"], &["files"]] {
            assert!(Page::parse(1, &token, other).is_err());
        }
    }

    #[test]
    fn the_last_page_has_no_token() {
        let page = Page::parse(2, "", &[]).unwrap();
        assert_eq!(finish(&page, vec![file("a", 0), file("b", 0)]).1, "");
        assert_eq!(finish(&page, Vec::new()).1, "");
        assert!(Page::parse(-1, "", &[]).is_err() && Page::parse(1_001, "", &[]).is_err());
        assert_eq!(Page::parse(0, "", &[]).unwrap().size, 50);
    }

    #[test]
    fn a_page_stays_under_the_message_limit() {
        let page = Page::parse(1_000, "", &[]).unwrap();
        let items: Vec<_> = (0..100).map(|_| file("a", 100_000)).collect();
        let (items, token) = finish(&page, items);
        assert!(items.len() > 20 && items.len() < 40 && !token.is_empty());
        // One that is too large alone is for the message limit to refuse, not to be skipped for ever.
        assert_eq!(finish(&page, vec![file("a", 5_000_000), file("b", 1)]).0.len(), 1);
    }

    proptest! {
        #[test]
        fn nonsense_is_refused(token in "[A-Za-z0-9_=-]{1,40}|\\PC{1,20}") {
            prop_assert!(Page::parse(0, &token, &["files"]).is_err());
        }
    }
}
