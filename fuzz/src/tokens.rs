use tidemill::{results::Cursor, service::Page};

/// A page token is refused or means one item, and a token that is given out is taken back, for the same list only.
pub fn page_token(data: &[u8]) {
    let Some((size, text)) = data.split_first_chunk::<4>() else { return };
    let text = String::from_utf8_lossy(text);
    let (filter, token) = text.split_once('\n').unwrap_or(("files", &text));
    let size = i32::from_le_bytes(*size);
    let filters = ["list", filter];
    if let Ok(page) = Page::parse(size, token, &filters) {
        assert!((1..=1_000).contains(&page.size));
        assert_eq!(page.after.is_some(), !token.is_empty());
        if let Some(after) = page.after {
            again(&filters, &after);
        }
    }
    // The text as an id: any that has no NUL, which no database text has.
    if !token.is_empty() && !token.contains('\0') {
        again(&filters, token);
    }
}

fn again(filters: &[&str], id: &str) {
    let first = Page::parse(1, "", filters).unwrap();
    let (items, token) = first.finish(vec![id, "next"], |id| id.len(), |id| id);
    assert_eq!(items.len(), 1);
    assert_eq!(Page::parse(1, &token, filters).unwrap().after.as_deref(), Some(id));
    assert!(Page::parse(1, &token, &["list", filters[1], "more"]).is_err(), "good for another list");
}

/// A cursor is refused or reads back as itself.
pub fn resume_cursor(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    match text.parse::<Cursor>() {
        Ok(cursor) => assert_eq!(cursor.to_string().parse::<Cursor>(), Ok(cursor)),
        Err(error) => assert!(error.to_string().len() < 1_200, "an error as long as the text"),
    }
}
