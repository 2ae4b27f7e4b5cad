//! Calls of those who wait for an answer: passed on to a worker at once, ahead of all batches, body and answer untouched.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Code, Service, ServiceError, Violation, not_json};
use crate::{
    access::{Account, Admitted, Caller},
    domain::{Endpoint, text::is_plain},
    fleet::{Broken, Extras, InferError, LiveCall, Tenant, WorkerState},
};

/// How long a worker may take to begin its answer, to send the whole of it where it is not streamed, and to pause in a
/// stream. OpenAI's clients wait as long.
const PATIENCE: Duration = Duration::from_secs(600);

/// A call, as a client makes it.
pub struct NewCall {
    /// What [`Service::expect_call`] has given for it.
    pub admitted: Admitted,
    /// The endpoint that it calls.
    pub endpoint: Endpoint,
    /// The rest of the path below the endpoint; empty: the endpoint itself.
    pub below: &'static str,
    /// What the worker gets.
    pub body: Bytes,
    /// Headers that are passed on to the worker.
    pub headers: Extras,
}

/// A worker's answer.
pub struct Answered {
    /// Its HTTP status.
    pub status: u16,
    /// What of its headers the client needs.
    pub headers: Extras,
    /// Its body.
    pub body: AnswerBody,
    /// The call's part of its caller's limits, until the body has reached the client: a client that reads slowly holds what
    /// is the caller's, and no memory of the batches.
    pub admitted: Admitted,
}

/// The body of an answer.
pub enum AnswerBody {
    /// All of it.
    Whole(Bytes),
    /// As it comes. An error is its end.
    Passing(BoxStream<'static, Result<Bytes, ServiceError>>),
}

impl Service {
    /// Lets a call begin whose body has not come. It counts as one of the caller's calls from now on.
    ///
    /// # Errors
    /// [`ServiceError`]: the caller has too many under way.
    pub fn expect_call(&self, account: &Account) -> Result<Admitted, ServiceError> {
        Ok(self.limits.expect(account)?)
    }

    /// Passes a call on to a worker. An answer that is not streamed is there as a whole, or another worker is asked; a stream
    /// begins at one worker and ends there.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn call(&self, caller: &Caller, account: &Account, of: NewCall) -> Result<Answered, ServiceError> {
        let (model, streams) = read(&of.body)?;
        self.limits.bytes(&caller.owner, of.body.len() as u64)?;
        let tenant = Tenant::named(account.as_str()).weighing(self.weights.of(&caller.owner));
        let fleet = &self.parts.fleet;
        let NewCall { admitted, endpoint, below, body, headers } = of;
        let call = LiveCall { endpoint, below, model: &model, body, headers, timeout: PATIENCE };
        if !streams && below.is_empty() {
            let answer = fleet.infer(tenant, call).await.map_err(|error| self.unanswered(error))?;
            let body = AnswerBody::Whole(answer.body);
            return Ok(Answered { status: answer.status, headers: answer.extras, body, admitted });
        }
        let passing = fleet.pass(tenant, call).await.map_err(|error| self.unanswered(error))?;
        let broken = |broken| match broken {
            Broken::Worker(why) => ServiceError::new(Code::Unavailable, "WORKER_LOST", why),
            Broken::Client(why) => ServiceError::new(Code::Aborted, "CLIENT_TOO_SLOW", why),
        };
        let body = AnswerBody::Passing(passing.body.map(move |piece| piece.map_err(broken)).boxed());
        Ok(Answered { status: passing.status, headers: passing.headers, body, admitted })
    }

    /// Why nobody has answered. A model that no worker has ever listed is the client's mistake.
    fn unanswered(&self, error: InferError) -> ServiceError {
        let InferError::NoWorker(model) = &error else { return error.into() };
        let workers = self.parts.fleet.workers();
        let may_come = workers.iter().any(|worker| worker.state == WorkerState::Starting || worker.serves(model));
        if workers.is_empty() || may_come {
            return error.into();
        }
        let message = format!("The model {:?} does not exist: no worker serves it", super::short(model));
        ServiceError::new(Code::NotFound, "MODEL_NOT_FOUND", message)
    }
}

/// The model that a body names, and whether it asks for a stream.
fn read(body: &[u8]) -> Result<(String, bool), ServiceError> {
    #[derive(Deserialize)]
    struct Body<'a> {
        #[serde(borrow, default)]
        model: Option<&'a RawValue>,
        #[serde(borrow, default)]
        stream: Option<&'a RawValue>,
    }
    let unreadable = |why: String| ServiceError::new(Code::InvalidArgument, "BODY_UNREADABLE", why);
    if body.is_empty() {
        return Err(unreadable("We could not parse the JSON body of your request: it is empty".into()));
    }
    // A list of the same values would be read as well.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(unreadable("the request body is not a JSON object".into()));
    }
    let read: Body<'_> = serde_json::from_slice(body).map_err(|error| {
        let why = not_json(body, &error);
        unreadable(format!("We could not parse the JSON body of your request: {why}"))
    })?;
    let streams = match read.stream.map(RawValue::get) {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => return Err(wrong_type("stream", "a boolean", other)),
    };
    let Some(model) = read.model else { return Err(no_model()) };
    if !model.get().starts_with('"') {
        return Err(wrong_type("model", "a string", model.get()));
    }
    match serde_json::from_str::<String>(model.get()) {
        Ok(model) if model.is_empty() => Err(no_model()),
        Ok(model) if is_plain(&model) => Ok((model, streams)),
        Ok(_) => Err(ServiceError::field("model", "has a control character")),
        // All else that a string can have wrong is no JSON.
        Err(_) => Err(ServiceError::field("model", "has half of a surrogate pair")),
    }
}

fn no_model() -> ServiceError {
    ServiceError::new(Code::InvalidArgument, "MODEL_MISSING", "Missing required parameter: 'model'.")
}

/// A field of another type than it must have, in OpenAI's words.
fn wrong_type(field: &str, expected: &str, found: &str) -> ServiceError {
    let found = match found.as_bytes().first() {
        Some(b'{') => "an object",
        Some(b'[') => "an array",
        Some(b'"') => "a string",
        Some(b't' | b'f') => "a boolean",
        _ if found.contains(['.', 'e', 'E']) => "a decimal number",
        _ => "an integer",
    };
    let message = format!("Invalid type for '{field}': expected {expected}, but got {found} instead.");
    let violation = Violation { field: field.to_owned(), description: message.clone() };
    ServiceError::invalid("INVALID_TYPE", message, vec![violation])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_names_its_model_and_may_ask_for_a_stream() {
        let of = |body: &str| read(body.as_bytes()).map_err(|error| error.reason);
        assert_eq!(of(r#"{"model":"m","x":[1.0e5]}"#), Ok(("m".into(), false)));
        assert_eq!(of(r#"{"stream":true,"model":"\u006d"}"#), Ok(("m".into(), true)));
        assert_eq!(of(r#"{"stream":null,"model":"m"}"#), Ok(("m".into(), false)));
        for none in ["{}", r#"{"model":""}"#, r#"{"model":null}"#] {
            assert_eq!(of(none), Err("MODEL_MISSING"), "{none}");
        }
        for bad in ["", "[]", "{", r#"{"model":"m","model":"m"}"#, r#"{"model":"m","\ud800":1}"#, "7"] {
            assert_eq!(of(bad), Err("BODY_UNREADABLE"), "{bad}");
        }
        for bad in [r#"{"model":1}"#, r#"{"model":["m"]}"#, r#"{"model":"m","stream":"yes"}"#] {
            assert_eq!(of(bad), Err("INVALID_TYPE"), "{bad}");
        }
        for bad in [r#"{"model":"a\u0000"}"#, r#"{"model":"a\ud800"}"#] {
            assert_eq!(of(bad), Err("INVALID_REQUEST"), "{bad}");
        }
        let said = |body: &str| read(body.as_bytes()).map(drop).unwrap_err().message;
        assert_eq!(
            said(r#"{"model":1e5}"#),
            "Invalid type for 'model': expected a string, but got a decimal number instead."
        );
        assert!(said(r#"{"model":"m","\ud800":1}"#).contains("surrogate pair"));
        assert!(said(r#"{"model":"m","model":"m"}"#).ends_with("the field \"model\" is there twice"));
    }
}
