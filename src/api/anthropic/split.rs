//! Splits the body of a new batch, `{"requests": [{…}, {…}]}`, while it comes: each request is handed on when its last byte
//! is there, so that memory holds one request, and not the batch.

use serde::de::IgnoredAny;

/// The most bytes of a key, and of a field that is not `requests`.
const SMALL: usize = 64 * 1024;
/// The most capacity that the buffer keeps for the next value.
const KEPT_CAPACITY: usize = 256 * 1024;

/// Why a body is no list of requests.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("the request body is not valid JSON: expected {expected} at byte {}", at + 1)]
    NotJson { expected: &'static str, at: u64 },
    #[error("the request body is not valid JSON: it ends before its end, after {0} bytes")]
    Torn(u64),
    #[error("the request body is not a JSON object")]
    NotAnObject,
    #[error("a key of the request body is not valid JSON: {0}")]
    Key(String),
    #[error("{0}: not valid JSON")]
    Field(String),
    #[error("{0}: longer than {SMALL} bytes")]
    FieldTooLong(String),
    #[error("requests: Field required")]
    NoRequests,
    #[error("requests: the field is there more than once")]
    RequestsTwice,
    #[error("requests: expected a list of requests")]
    NotAList,
    #[error("requests: expected at least one request")]
    Empty,
    #[error("requests: expected at most {0} requests")]
    TooMany(usize),
    #[error("requests[{0}]: expected an object with custom_id and params")]
    NotARequest(usize),
    #[error("requests[{index}]: longer than {most} bytes")]
    TooLong { index: usize, most: usize },
}

/// The place in the document.
#[derive(Clone, Debug, PartialEq, Eq)]
enum At {
    /// Before the object.
    Start,
    /// After the object's brace.
    FirstKey,
    /// After a comma of the object.
    NextKey,
    /// In a key.
    Key(Value),
    /// After this key.
    Colon(String),
    /// Before this key's value.
    Field(String),
    /// In the value of a field that is not `requests`.
    Other(String, Value),
    /// Before the list.
    List,
    /// After the list's bracket.
    FirstRequest,
    /// After a comma of the list.
    NextRequest,
    /// In a request.
    Request(Value),
    /// After a request.
    AfterRequest,
    /// After a field.
    AfterField,
    /// After the object.
    End,
}

/// How far a value has come. Only its end is found here: whether it is JSON is for a parser to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    /// An object or a list, or a string of its own (depth 0).
    Nested { depth: usize, in_string: bool, escaped: bool },
    /// A number or a word. It ends before what can't be a part of it.
    Word,
}

impl Value {
    /// The value that begins with this byte, which is still to be scanned.
    fn beginning(first: u8) -> Self {
        match first {
            b'{' | b'[' | b'"' => Self::Nested { depth: 0, in_string: false, escaped: false },
            _ => Self::Word,
        }
    }

    /// Goes on; how many bytes belong to the value, and whether it ends after them.
    fn scan(&mut self, bytes: &[u8]) -> (usize, bool) {
        let Self::Nested { depth, in_string, escaped } = self else {
            let end = bytes.iter().position(|byte| matches!(byte, b',' | b'}' | b']' | b' ' | b'\t' | b'\r' | b'\n'));
            return end.map_or((bytes.len(), false), |end| (end, true));
        };
        let mut at = 0;
        while at < bytes.len() {
            if *in_string {
                if std::mem::take(escaped) {
                    at += 1;
                    continue;
                }
                let Some(next) = memchr::memchr2(b'"', b'\\', &bytes[at..]) else { return (bytes.len(), false) };
                at += next + 1;
                if bytes[at - 1] == b'\\' {
                    *escaped = true;
                    continue;
                }
                *in_string = false;
                if *depth == 0 {
                    return (at, true);
                }
                continue;
            }
            at += 1;
            match bytes[at - 1] {
                b'"' => *in_string = true,
                b'{' | b'[' => *depth += 1,
                b'}' | b']' => {
                    *depth = depth.saturating_sub(1);
                    if *depth == 0 {
                        return (at, true);
                    }
                }
                _ => {}
            }
        }
        (at, false)
    }
}

/// The split of one body.
pub(super) struct Splitter {
    at: At,
    /// The bytes of the value in which the document is.
    value: Vec<u8>,
    requests: usize,
    has_list: bool,
    position: u64,
    /// The most requests, and the most bytes of one.
    most: (usize, usize),
}

impl Splitter {
    pub(super) fn new(most_requests: usize, most_bytes: usize) -> Self {
        Self {
            at: At::Start,
            value: Vec::new(),
            requests: 0,
            has_list: false,
            position: 0,
            most: (most_requests, most_bytes),
        }
    }

    /// Takes the next bytes, and hands on each request that ends in them, with its index.
    ///
    /// # Errors
    /// [`Malformed`], or what `request` says: then the rest of the body does not matter.
    pub(super) fn push<E: From<Malformed>>(
        &mut self,
        mut bytes: &[u8],
        mut request: impl FnMut(usize, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(first) = bytes.first() {
            let used = match &mut self.at {
                At::Key(value) | At::Other(_, value) | At::Request(value) => {
                    let (used, ended) = value.scan(bytes);
                    self.value.extend_from_slice(&bytes[..used]);
                    self.check_length()?;
                    if ended {
                        self.ended(&mut request)?;
                    }
                    used
                }
                _ if matches!(first, b' ' | b'\t' | b'\r' | b'\n') => 1,
                _ => self.between(*first)?,
            };
            self.position += used as u64;
            bytes = &bytes[used..];
        }
        Ok(())
    }

    /// Ends the body.
    ///
    /// # Errors
    /// [`Malformed`].
    pub(super) fn finish(self) -> Result<(), Malformed> {
        match self.at {
            At::End if !self.has_list => Err(Malformed::NoRequests),
            At::End if self.requests == 0 => Err(Malformed::Empty),
            At::End => Ok(()),
            _ => Err(Malformed::Torn(self.position)),
        }
    }

    /// The next byte between values, which is no space. Says how many bytes are done with.
    fn between(&mut self, byte: u8) -> Result<usize, Malformed> {
        let expected = |expected| Malformed::NotJson { expected, at: self.position };
        let (next, used) = match (&mut self.at, byte) {
            (At::Start, b'{') => (At::FirstKey, 1),
            (At::Start, b'[' | b'"' | b'0'..=b'9' | b't' | b'f' | b'n' | b'-') => return Err(Malformed::NotAnObject),
            (At::Start, _) => return Err(expected("`{`")),
            (At::FirstKey | At::NextKey, b'"') => (At::Key(Value::beginning(byte)), 0),
            (At::FirstKey, b'}') | (At::AfterField, b'}') => (At::End, 1),
            (At::FirstKey | At::NextKey, _) => return Err(expected("a key in quotes")),
            (At::Colon(key), b':') => (At::Field(std::mem::take(key)), 1),
            (At::Colon(_), _) => return Err(expected("`:`")),
            (At::Field(key), _) if key == "requests" => {
                if std::mem::replace(&mut self.has_list, true) {
                    return Err(Malformed::RequestsTwice);
                }
                (At::List, 0)
            }
            (At::Field(_), b',' | b'}' | b']' | b':') => return Err(expected("a value")),
            (At::Field(key), _) => (At::Other(std::mem::take(key), Value::beginning(byte)), 0),
            (At::List, b'[') => (At::FirstRequest, 1),
            (At::List, _) => return Err(Malformed::NotAList),
            (At::FirstRequest, b']') | (At::AfterRequest, b']') => (At::AfterField, 1),
            (At::FirstRequest | At::NextRequest, b'{') => {
                if self.requests == self.most.0 {
                    return Err(Malformed::TooMany(self.most.0));
                }
                (At::Request(Value::beginning(byte)), 0)
            }
            (At::NextRequest, b']') => return Err(expected("a request after the comma")),
            (At::FirstRequest | At::NextRequest, _) => return Err(Malformed::NotARequest(self.requests)),
            (At::AfterRequest, b',') => (At::NextRequest, 1),
            (At::AfterRequest, _) => return Err(expected("`,` or `]`")),
            (At::AfterField, b',') => (At::NextKey, 1),
            (At::AfterField, _) => return Err(expected("`,` or `}`")),
            (At::End, _) => return Err(expected("nothing after the object")),
            // These read on by themselves.
            (At::Key(_) | At::Other(..) | At::Request(_), _) => return Ok(0),
        };
        self.at = next;
        Ok(used)
    }

    fn check_length(&self) -> Result<(), Malformed> {
        let length = self.value.len();
        match &self.at {
            At::Request(_) if length > self.most.1 => {
                Err(Malformed::TooLong { index: self.requests, most: self.most.1 })
            }
            At::Key(_) if length > SMALL => Err(Malformed::Key(format!("it is longer than {SMALL} bytes"))),
            At::Other(key, _) if length > SMALL => Err(Malformed::FieldTooLong(shown(key))),
            _ => Ok(()),
        }
    }

    /// The value has ended.
    fn ended<E: From<Malformed>>(&mut self, request: &mut impl FnMut(usize, &[u8]) -> Result<(), E>) -> Result<(), E> {
        let next = match &self.at {
            At::Key(_) => {
                let key = serde_json::from_slice(&self.value);
                At::Colon(key.map_err(|error| Malformed::Key(error.to_string()))?)
            }
            At::Other(key, _) => {
                serde_json::from_slice::<IgnoredAny>(&self.value).map_err(|_| Malformed::Field(shown(key)))?;
                At::AfterField
            }
            _ => {
                request(self.requests, &self.value)?;
                self.requests += 1;
                At::AfterRequest
            }
        };
        self.at = next;
        if self.value.capacity() > KEPT_CAPACITY {
            self.value = Vec::new();
        }
        self.value.clear();
        Ok(())
    }
}

fn shown(key: &str) -> String {
    crate::service::short(key)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value as Json, json};

    use super::*;

    /// The requests of a body that comes in pieces of this size.
    fn split(body: &[u8], size: usize) -> Result<Vec<Vec<u8>>, Malformed> {
        let mut splitter = Splitter::new(3, 1_000);
        let mut found = Vec::new();
        for piece in body.chunks(size) {
            splitter.push(piece, |index, request| {
                assert_eq!(index, found.len());
                found.push(request.to_vec());
                Ok::<_, Malformed>(())
            })?;
        }
        splitter.finish().map(|()| found)
    }

    /// The same in pieces of every size, which all say the same.
    fn of(body: &str) -> Result<Vec<String>, Malformed> {
        let whole = split(body.as_bytes(), body.len().max(1));
        for size in 1..body.len().min(40) {
            assert_eq!(split(body.as_bytes(), size), whole, "{body} by {size}");
        }
        whole.map(|all| all.into_iter().map(|one| String::from_utf8(one).unwrap()).collect())
    }

    #[test]
    fn requests_come_out_byte_for_byte() {
        let (one, two) = (r#"{ "a":"]}\"\\" ,"b":[{"c":[1.0e2]}]}"#, "{\n}");
        let found = of(&format!(" {{ \"x\" : null, \"requests\":[ {one},\n{two} ] , \"y\":{{\"z\":[]}}}} \n"));
        assert_eq!(found.unwrap(), [one, two]);
        assert_eq!(of(r#"{"\u0072equests":[{}],"n":-1.5e3,"s":"[{"}"#).unwrap(), ["{}"], "a key may be escaped");
    }

    #[test]
    fn what_is_no_list_of_requests_is_refused_with_what_and_where() {
        let not_json = |expected, at| Malformed::NotJson { expected, at };
        for (body, wrong) in [
            ("", Malformed::Torn(0)),
            ("  ", Malformed::Torn(2)),
            ("[]", Malformed::NotAnObject),
            ("7", Malformed::NotAnObject),
            ("<", not_json("`{`", 0)),
            ("{}", Malformed::NoRequests),
            ("{\"a\":1}", Malformed::NoRequests),
            ("{a:1}", not_json("a key in quotes", 1)),
            ("{\"a\" 1}", not_json("`:`", 5)),
            ("{\"a\":}", not_json("a value", 5)),
            ("{\"a\":nul}", Malformed::Field("a".into())),
            ("{\"a\":[}}", Malformed::Field("a".into())),
            ("{\"a\":1 2}", not_json("`,` or `}`", 7)),
            ("{\"a\":1,}", not_json("a key in quotes", 7)),
            ("{\"requests\":{}}", Malformed::NotAList),
            ("{\"requests\":null}", Malformed::NotAList),
            ("{\"requests\":[]}", Malformed::Empty),
            ("{\"requests\":[],\"requests\":[{}]}", Malformed::RequestsTwice),
            ("{\"requests\":[7]}", Malformed::NotARequest(0)),
            ("{\"requests\":[{},[]]}", Malformed::NotARequest(1)),
            ("{\"requests\":[{},]}", not_json("a request after the comma", 16)),
            ("{\"requests\":[{}{}]}", not_json("`,` or `]`", 15)),
            ("{\"requests\":[{}", Malformed::Torn(15)),
            ("{\"requests\":[{\"a\":\"", Malformed::Torn(19)),
            ("{\"requests\":[{}]", Malformed::Torn(16)),
            ("{\"requests\":[{}]} x", not_json("nothing after the object", 18)),
            ("{\"requests\":[{},{},{},{}]}", Malformed::TooMany(3)),
        ] {
            assert_eq!(of(body), Err(wrong), "{body}");
        }
        let long = format!("{{\"requests\":[{{}},{{\"a\":\"{}\"}}]}}", "x".repeat(2_000));
        assert_eq!(split(long.as_bytes(), 7), Err(Malformed::TooLong { index: 1, most: 1_000 }));
        let long = format!("{{\"a\":\"{}\"}}", "x".repeat(SMALL));
        assert_eq!(split(long.as_bytes(), 999), Err(Malformed::FieldTooLong("a".into())));
        let long = format!("{{\"{}\":1}}", "x".repeat(SMALL));
        assert!(matches!(split(long.as_bytes(), 999), Err(Malformed::Key(_))));
    }

    fn any_json() -> impl Strategy<Value = Json> {
        let leaf = prop_oneof![
            Just(Json::Null),
            any::<bool>().prop_map(Json::from),
            any::<i32>().prop_map(Json::from),
            "[\\PC\\\\\"{}\\[\\],:]{0,8}".prop_map(Json::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
                proptest::collection::btree_map("[\\PC\"]{0,4}", inner, 0..4)
                    .prop_map(|map| Json::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Whatever the requests and the other fields, and however the body is cut and written.
        #[test]
        fn any_body_is_split_as_a_parser_reads_it(
            requests in proptest::collection::vec(any_json().prop_map(|of| json!({"params": of})), 1..4),
            other in any_json(),
            pretty in any::<bool>(),
            size in 1usize..50,
        ) {
            let body = json!({"a": other, "requests": requests, "z": other});
            let text = if pretty { serde_json::to_vec_pretty(&body) } else { serde_json::to_vec(&body) }.unwrap();
            match split(&text, size) {
                Ok(found) => {
                    let found: Vec<Json> = found.iter().map(|one| serde_json::from_slice(one).unwrap()).collect();
                    prop_assert_eq!(found, requests);
                }
                Err(wrong) => prop_assert!(matches!(wrong, Malformed::TooLong { .. }), "{wrong:?}"),
            }
        }

        #[test]
        fn no_bytes_are_too_odd(bytes in proptest::collection::vec(any::<u8>(), 0..60), size in 1usize..9) {
            let all = split(&bytes, size);
            prop_assert_eq!(&all, &split(&bytes, 60));
        }
    }
}
