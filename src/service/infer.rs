//! Runs single requests.

use std::time::Duration;

use bytes::Bytes;

use super::{Service, ServiceError, error::Violations, rules};
use crate::{
    access::{Account, Caller, Work},
    domain::{Endpoint, request_line, text::is_plain},
    fleet::{Extras, Inferred, LiveCall, Tenant},
};

/// How long a request may run if the client sets no deadline.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(600);

impl Service {
    /// Sends one request to a worker and waits for its answer. It is not stored: if the server stops, it is lost.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn infer(
        &self,
        caller: &Caller,
        account: &Account,
        endpoint: &str,
        body: Bytes,
        deadline: Option<Duration>,
    ) -> Result<Inferred, ServiceError> {
        let (endpoint, model) = request(endpoint, &body)?;
        let timeout = deadline.unwrap_or(DEFAULT_DEADLINE);
        let _admitted = self.admit(caller, account, 0, Work::Now(body.len() as u64)).await?;
        let tenant = Tenant::named(account.as_str()).weighing(self.weights.of(&caller.owner));
        let call = LiveCall { endpoint, below: "", model: &model, body, headers: Extras::default(), timeout };
        Ok(self.parts.fleet.infer(tenant, call).await?)
    }
}

/// The endpoint and the model of a request.
fn request(endpoint: &str, body: &[u8]) -> Result<(Endpoint, String), ServiceError> {
    #[derive(serde::Deserialize)]
    struct Body<'a> {
        #[serde(borrow)]
        model: std::borrow::Cow<'a, str>,
        #[serde(default)]
        stream: Option<bool>,
    }
    let mut wrong = Violations::default();
    let endpoint = rules::endpoint(endpoint, &mut wrong);
    let model = match serde_json::from_slice::<Body<'_>>(body) {
        Ok(body) if body.model.is_empty() => {
            wrong.add("body", "\"model\" is empty");
            String::new()
        }
        Ok(body) if !is_plain(&body.model) => {
            wrong.add("body", "\"model\" has a control character");
            String::new()
        }
        Ok(body) => {
            wrong.check(
                body.stream != Some(true),
                "body",
                "\"stream\" must not be true: this call returns the whole answer",
            );
            body.model.into_owned()
        }
        Err(error) => {
            // As a line's body is refused; what only this reader minds (a model twice) in the reader's words.
            let why = request_line::model_of(body).err().map_or_else(|| error.to_string(), |why| why.to_string());
            wrong.add("body", format!("must be a JSON object with a string \"model\": {why}"));
            String::new()
        }
    };
    wrong.finish()?;
    let endpoint = endpoint.ok_or_else(|| ServiceError::field("endpoint", "is unknown"))?;
    Ok((endpoint, model))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_to_run_now_names_its_model_and_wants_no_stream() {
        let of = |body: &str| request("/v1/completions", body.as_bytes());
        let (_, model) = of(r#"{"a":[1.0e5], "model":"\u006d"}"#).unwrap();
        assert_eq!(model, "m");
        assert!(of(r#"{"model":"m","stream":false}"#).is_ok());
        for bad in [
            "",
            "[]",
            "{}",
            r#"{"model":1}"#,
            r#"{"model":""}"#,
            r#"{"model":"m\u0000"}"#,
            r#"{"model":"m","stream":true}"#,
            "{\"model\":\"m\"} x",
        ] {
            let fields: Vec<String> = of(bad).unwrap_err().violations.into_iter().map(|one| one.field).collect();
            assert_eq!(fields, ["body"], "{bad}");
        }
    }
}
