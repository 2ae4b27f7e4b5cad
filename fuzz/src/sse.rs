use bytes::Bytes;
use serde_json::json;
use tidemill::{api::sse::Events, domain::Endpoint};

/// However a stream of events is cut into chunks, the same events pass, and they are whole: what is held back is the
/// beginning of one. What a client would be told at the end is the same, too. The first byte says which API, the next four
/// where it is cut.
pub fn sse(data: &[u8]) {
    let Some((head, text)) = data.split_first_chunk::<5>() else { return };
    let endpoint = Endpoint::ALL[usize::from(head[0]) % Endpoint::ALL.len()];
    let (whole, at_once) = pass(endpoint, &mut std::iter::once(text));
    let mut left = text;
    let (cut, in_pieces) = pass(
        endpoint,
        &mut std::iter::from_fn(|| {
            let wanted = usize::from(head[1 + left.len() % 4]) % 29;
            let (chunk, after) = left.split_at_checked(wanted.clamp(1, left.len().max(1)))?;
            left = after;
            Some(chunk)
        }),
    );
    for passed in [&whole, &cut] {
        assert!(text.starts_with(passed), "bytes change");
        let (events, torn) = events(passed);
        assert!(torn.is_empty(), "a torn event passes");
        assert!(self::events(text).0.starts_with(&events));
    }
    // A line that ends with a carriage return alone, which nobody writes, may end an event a byte late.
    if text.iter().enumerate().any(|(at, byte)| *byte == b'\r' && text.get(at + 1) != Some(&b'\n')) {
        return;
    }
    for passed in [&whole, &cut] {
        assert_eq!(events(passed).0, events(text).0, "a whole event is held back");
    }
    let error = json!({"message": "gone", "code": "worker_lost"});
    assert_eq!(at_once.is_done(), in_pieces.is_done());
    for broke in [false, true] {
        assert_eq!(at_once.end(broke, &error), in_pieces.end(broke, &error), "chunks matter");
    }
}

fn pass(endpoint: Endpoint, chunks: &mut dyn Iterator<Item = &[u8]>) -> (Vec<u8>, Events) {
    let mut events = Events::of(endpoint);
    let passed = chunks.flat_map(|chunk| events.push(&Bytes::copy_from_slice(chunk))).collect();
    (passed, events)
}

/// The whole events of a text, as the HTML standard has them: lines, and a blank line ends each. And the lines of the last one
/// that has no end. A line's end may be missing only there.
fn events(text: &[u8]) -> (Vec<Vec<&[u8]>>, Vec<&[u8]>) {
    let (mut events, mut open, mut rest) = (Vec::new(), Vec::new(), text);
    while !rest.is_empty() {
        let length = rest.iter().position(|byte| b"\r\n".contains(byte));
        let (line, end) = rest.split_at(length.unwrap_or(rest.len()));
        let end = end.strip_prefix(b"\r\n").or_else(|| end.get(1..)).unwrap_or_default();
        if !line.is_empty() || length.is_none() {
            open.push(line);
        } else if !open.is_empty() {
            events.push(std::mem::take(&mut open));
        }
        rest = end;
    }
    (events, open)
}
