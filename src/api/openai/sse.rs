//! A worker's stream of events on its way to a client: whole events pass untouched, and one that is torn is held back, so
//! that an error can be told where the worker breaks off. Pure.
//!
//! Clients take a stream that ends without its last event for a whole answer, so such an end must not look like one.

use bytes::{Bytes, BytesMut};
use memchr::memmem;
use serde_json::{Value, json};

use crate::domain::Endpoint;

/// A longer event passes in pieces.
const LONGEST: usize = 16 * 1024 * 1024;

/// How a stream ends that is whole, and how an error is told in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// `data: [DONE]`
    Done,
    /// An event of the Responses API.
    Responses,
    /// `event: message_stop`
    Messages,
    /// Its last event is not known.
    Unknown,
}

/// The events of one stream.
pub struct Events {
    form: Form,
    /// The beginning of an event whose end has not come.
    torn: BytesMut,
    is_done: bool,
    /// The number of the last event, where events have one.
    sequence: Option<u64>,
}

impl Events {
    /// The events of an endpoint's stream.
    pub fn of(endpoint: Endpoint) -> Self {
        let form = match endpoint {
            Endpoint::ChatCompletions | Endpoint::Completions => Form::Done,
            Endpoint::Responses => Form::Responses,
            Endpoint::Messages => Form::Messages,
            Endpoint::Embeddings | Endpoint::Score | Endpoint::Rerank => Form::Unknown,
        };
        Self { form, torn: BytesMut::new(), is_done: false, sequence: None }
    }

    /// Takes the next bytes. Returns the whole events in them, which may be none.
    pub fn push(&mut self, piece: &Bytes) -> Bytes {
        let whole = if self.torn.is_empty() {
            let end = last_end(piece).unwrap_or(0);
            self.torn.extend_from_slice(&piece[end..]);
            piece.slice(..end)
        } else {
            // An end may lie across the two.
            let from = self.torn.len().saturating_sub(3);
            self.torn.extend_from_slice(piece);
            match last_end(&self.torn[from..]) {
                Some(end) => self.torn.split_to(from + end).freeze(),
                None if self.torn.len() > LONGEST => self.torn.split().freeze(),
                None => Bytes::new(),
            }
        };
        self.look(&whole);
        whole
    }

    /// Whether the last event of a whole stream has passed.
    pub fn is_done(&self) -> bool {
        self.is_done
    }

    /// The end of a stream that broke off, or that ended before its last event: the error as an event. `None`: the stream is
    /// whole, or nobody knows.
    pub fn end(&self, broke: bool, error: &Value) -> Option<Bytes> {
        let message = &error["message"];
        let (name, data) = match self.form {
            _ if self.is_done => return None,
            Form::Unknown if !broke => return None,
            Form::Done | Form::Unknown => (None, json!({"error": error})),
            Form::Responses => {
                let number = self.sequence.map_or(0, |last| last.saturating_add(1));
                let data = json!({"type": "error", "code": error["code"], "message": message, "param": null,
                    "sequence_number": number});
                (Some("error"), data)
            }
            Form::Messages => {
                let error = json!({"type": "api_error", "message": message});
                (Some("error"), json!({"type": "error", "error": error}))
            }
        };
        let name = name.map(|name| format!("event: {name}\n")).unwrap_or_default();
        Some(format!("{name}data: {data}\n\n").into())
    }

    /// Looks for the last event. What it looks for can't stand in a JSON string, where quotes and line ends are escaped.
    fn look(&mut self, whole: &[u8]) {
        let has = |text: &str| memmem::find(whole, text.as_bytes()).is_some();
        self.is_done |= match self.form {
            Form::Done => lines(whole).any(|line| matches!(line, b"data: [DONE]" | b"data:[DONE]")),
            Form::Responses => {
                if let Some(number) = sequence(whole) {
                    self.sequence = Some(number);
                }
                ["completed", "failed", "incomplete"]
                    .iter()
                    .any(|end| has(&format!("\"type\":\"response.{end}\"")) || has(&format!("event: response.{end}")))
            }
            Form::Messages => lines(whole).any(|line| matches!(line, b"event: message_stop" | b"event:message_stop")),
            Form::Unknown => false,
        };
    }
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| matches!(byte, b'\r' | b'\n')).map(<[u8]>::trim_ascii_end)
}

/// The end of the last whole event: behind its blank line.
fn last_end(text: &[u8]) -> Option<usize> {
    // The second is the end of a blank line after a line of any end.
    let ends = ["\n\n", "\n\r\n", "\r\r"];
    ends.iter().filter_map(|end| memmem::rfind(text, end.as_bytes()).map(|at| at + end.len())).max()
}

/// The number of the last event that has one.
fn sequence(text: &[u8]) -> Option<u64> {
    const NAME: &[u8] = b"\"sequence_number\":";
    memmem::rfind_iter(text, NAME).find_map(|at| {
        let rest = &text[at + NAME.len()..];
        // The line ends where the event does.
        let blanks = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        let digits = rest[blanks..].split(|byte| !byte.is_ascii_digit()).next()?;
        std::str::from_utf8(digits).ok()?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHAT: &str = "data: {\"a\":1}\n\n: keep-alive\n\ndata: {\"b\":\"[DONE]\"}\n\ndata: [DONE]\n\n";

    fn pass(endpoint: Endpoint, text: &[u8], size: usize) -> (Vec<u8>, Events) {
        let mut events = Events::of(endpoint);
        let mut passed = Vec::new();
        for piece in text.chunks(size.max(1)) {
            let whole = events.push(&Bytes::copy_from_slice(piece));
            assert!(whole.is_empty() || last_end(&whole) == Some(whole.len()), "only whole events");
            passed.extend_from_slice(&whole);
        }
        (passed, events)
    }

    fn error() -> Value {
        json!({"message": "gone", "type": "server_error", "param": null, "code": "worker_lost"})
    }

    #[test]
    fn a_whole_stream_passes_untouched_at_every_cut() {
        for size in 1..=CHAT.len() {
            let (passed, events) = pass(Endpoint::ChatCompletions, CHAT.as_bytes(), size);
            assert_eq!(passed, CHAT.as_bytes(), "{size}");
            assert!(events.is_done() && events.end(false, &error()).is_none());
        }
    }

    #[test]
    fn a_stream_that_ends_too_early_says_so_at_every_cut() {
        let last = CHAT.len() - "\n\n".len();
        for cut in 0..last {
            let (passed, events) = pass(Endpoint::ChatCompletions, &CHAT.as_bytes()[..cut], 7);
            assert!(CHAT.as_bytes().starts_with(&passed) && !events.is_done(), "{cut}");
            let end = events.end(false, &error()).unwrap();
            let expected = "data: {\"error\":{\"code\":\"worker_lost\",\"message\":\"gone\",\"param\":null,\"type\":\"server_error\"}}\n\n";
            assert_eq!(end, expected);
        }
    }

    #[test]
    fn each_api_is_told_in_its_own_words() {
        let responses = "event: response.created\ndata: {\"type\":\"response.created\",\"sequence_number\":7}\n\n";
        let (_, events) = pass(Endpoint::Responses, responses.as_bytes(), 9);
        let end = String::from_utf8(events.end(true, &error()).unwrap().to_vec()).unwrap();
        assert!(end.starts_with("event: error\ndata: {") && end.contains("\"sequence_number\":8"), "{end}");
        let done = format!("{responses}event: response.completed\ndata: {{\"type\":\"response.completed\"}}\n\n");
        assert!(pass(Endpoint::Responses, done.as_bytes(), 9).1.is_done());
        let messages = "event: message_start\ndata: {\"type\":\"message_start\"}\n\n";
        let (_, events) = pass(Endpoint::Messages, messages.as_bytes(), 9);
        let end = String::from_utf8(events.end(true, &error()).unwrap().to_vec()).unwrap();
        assert!(end.contains("\"type\":\"api_error\"") && end.starts_with("event: error\n"), "{end}");
        let done = format!("{messages}event: message_stop\r\ndata: {{}}\r\n\r\n");
        assert!(pass(Endpoint::Messages, done.as_bytes(), 9).1.is_done());
        let (_, events) = pass(Endpoint::Embeddings, b"data: 1\n\n", 9);
        assert!(events.end(false, &error()).is_none() && events.end(true, &error()).is_some());
    }

    proptest! {
        #[test]
        fn nothing_is_lost_but_what_is_torn(
            text in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b'd'), any::<u8>()], 0..200),
            size in 1usize..20,
        ) {
            let (passed, events) = pass(Endpoint::ChatCompletions, &text, size);
            let whole = [&passed[..], &events.torn[..]].concat();
            prop_assert_eq!(whole, text);
        }
    }
}
