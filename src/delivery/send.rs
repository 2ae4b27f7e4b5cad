//! Makes one attempt: signs, sends, and reads the answer.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use tokio::time::timeout;
use tracing::warn;

use super::{
    egress::{Forbidden, Guard, ResolveError},
    schedule,
    secrets::Vault,
    signature::{self, BODY_SIGNATURE, STANDARD_ID, STANDARD_SIGNATURE, STANDARD_TIMESTAMP, TIMESTAMP},
};
use crate::{
    domain::{
        Timestamp,
        webhook::{AttemptError, AttemptResult, ErrorKind, Secret},
    },
    https,
    store::{ClaimedDelivery, Signing},
    words::{self, Peer},
};

const ID: HeaderName = HeaderName::from_static("x-webhook-id");
const EVENT: HeaderName = HeaderName::from_static("x-webhook-event");
const ATTEMPT: HeaderName = HeaderName::from_static("x-webhook-attempt");

/// The most bytes of an answer that are read.
const MAX_ANSWER: usize = 64 * 1_024;
/// The most characters of an answer that are stored.
const EXCERPT: usize = 200;
/// The most characters of an error, some of which quote the receiver's certificate.
const MESSAGE: usize = 500;
/// Time limit of connecting; the attempt's own timeout may be shorter.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an idle connection is kept: short, so that a changed name or policy takes effect soon.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Sends webhooks. There is one per process, which holds the connections.
pub(super) struct Sender {
    client: reqwest::Client,
    guard: Guard,
    vault: Arc<Vault>,
    /// The server's secrets, which sign if neither batch nor endpoint has one; the newest first.
    secrets: Vec<Secret>,
}

/// The outcome of an attempt, and the pause that the receiver asked for.
pub(super) struct Sent {
    pub(super) result: AttemptResult,
    pub(super) retry_after: Option<Duration>,
}

impl Sent {
    fn failed(kind: ErrorKind, message: impl AsRef<str>) -> Self {
        Self { result: AttemptResult::failed(kind, printable(message.as_ref().chars(), MESSAGE)), retry_after: None }
    }
}

impl Sender {
    pub(super) fn new(guard: Guard, vault: Arc<Vault>, secrets: Vec<Secret>) -> Result<Self, reqwest::Error> {
        // The first call installs it; it is the same everywhere in this process.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = https::client(|builder| {
            builder
                .user_agent(concat!("tidemill/", env!("CARGO_PKG_VERSION")))
                // A redirect would bypass the guard's check of addresses in URLs, and turn the POST into a GET.
                .redirect(reqwest::redirect::Policy::none())
                // A proxy would resolve names itself.
                .no_proxy()
                // Every request must be a counted attempt.
                .retry(reqwest::retry::never())
                .referer(false)
                .dns_resolver(Arc::new(guard.clone()))
                .connect_timeout(CONNECT_TIMEOUT)
                .pool_idle_timeout(IDLE_TIMEOUT)
        })?;
        Ok(Self { client, guard, vault, secrets })
    }

    /// Makes one attempt. Never takes longer than the delivery's timeout.
    pub(super) async fn send(&self, claim: &ClaimedDelivery) -> Sent {
        let url = match self.guard.check_url(&claim.url) {
            Ok(url) => url,
            Err(forbidden) => return refused(&forbidden),
        };
        let secrets = match self.open(claim) {
            Ok(secrets) => secrets,
            Err(sent) => return sent,
        };
        let Ok(headers) = headers(claim, &secrets, Timestamp::now().unix_seconds()) else {
            return Sent::failed(ErrorKind::InvalidUrl, "the delivery's id can't be sent as a header");
        };
        // Not with the builder, which would add each header again.
        let mut request = reqwest::Request::new(Method::POST, url);
        *request.headers_mut() = headers;
        *request.body_mut() = Some(claim.body.clone().into());
        // The status is stored outside: once it is 2xx the receiver has the event, even if its answer never ends.
        let mut answer: Option<(Head, Vec<u8>)> = None;
        let attempt = async {
            let mut response = self.client.execute(request).await?;
            let (_, body) = answer.insert((Head::of(&response), Vec::new()));
            while body.len() < MAX_ANSWER {
                let Some(chunk) = response.chunk().await? else { break };
                body.extend_from_slice(&chunk[..chunk.len().min(MAX_ANSWER - body.len())]);
            }
            Ok(())
        };
        let ended = timeout(claim.timeout, attempt).await;
        match (answer, ended) {
            (Some((head, body)), _) => answered(head, &body),
            (None, Ok(Err(error))) => failed(&error),
            (None, Err(_) | Ok(Ok(()))) => {
                Sent::failed(ErrorKind::Timeout, format!("no answer within {} s", claim.timeout.as_secs_f64()))
            }
        }
    }

    /// The secrets that sign a delivery, the newest first. Empty if it is not signed.
    fn open(&self, claim: &ClaimedDelivery) -> Result<Vec<Secret>, Sent> {
        let unopenable = |error| Sent::failed(ErrorKind::SecretUnopenable, format!("{error}"));
        match &claim.signing {
            Signing::Global => Ok(self.secrets.clone()),
            Signing::Batch(sealed) => {
                self.vault.open(sealed, &batch_context(&claim.url)).map(|secret| vec![secret]).map_err(unopenable)
            }
            Signing::Endpoint(id, sealed) => {
                let mut opened = Vec::with_capacity(sealed.len());
                for (at, one) in sealed.iter().enumerate() {
                    match self.vault.open(one, id.as_str()) {
                        Ok(secret) => opened.push(secret),
                        Err(error) if at == 0 => return Err(unopenable(error)),
                        // The new secret signs; receivers that still have the old one will reject it.
                        Err(error) => warn!(endpoint = %id, %error, "the previous secret can't be decrypted"),
                    }
                }
                Ok(opened)
            }
            Signing::EndpointDeleted => {
                Err(Sent::failed(ErrorKind::EndpointDeleted, "the webhook endpoint was deleted"))
            }
        }
    }
}

/// The encryption context of a batch's secret.
pub(super) fn batch_context(url: &str) -> String {
    format!("batch webhook {url}")
}

fn headers(
    claim: &ClaimedDelivery,
    secrets: &[Secret],
    timestamp: i64,
) -> Result<HeaderMap, header::InvalidHeaderValue> {
    let mut headers = HeaderMap::with_capacity(9);
    let id = HeaderValue::from_str(claim.id.as_str())?;
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(ID, id.clone());
    headers.insert(STANDARD_ID, id);
    headers.insert(EVENT, HeaderValue::from_static(claim.event.as_str()));
    headers.insert(ATTEMPT, claim.number.into());
    headers.insert(TIMESTAMP, timestamp.into());
    headers.insert(STANDARD_TIMESTAMP, timestamp.into());
    if let Some(newest) = secrets.first() {
        headers.insert(BODY_SIGNATURE, HeaderValue::from_str(&signature::sign_body(newest, &claim.body))?);
        let signatures = signature::sign_standard(secrets, claim.id.as_str(), timestamp, &claim.body);
        headers.insert(STANDARD_SIGNATURE, HeaderValue::from_str(&signatures)?);
    }
    Ok(headers)
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    schedule::retry_after(headers.get(header::RETRY_AFTER)?.to_str().ok()?, SystemTime::now())
}

/// The relevant parts of an answer's head.
struct Head {
    status: StatusCode,
    retry_after: Option<Duration>,
    location: Option<String>,
}

impl Head {
    fn of(response: &reqwest::Response) -> Self {
        let (status, headers) = (response.status(), response.headers());
        let location = headers.get(header::LOCATION).map(|value| excerpt(value.as_bytes()).unwrap_or_default());
        Self { status, retry_after: retry_after(headers), location }
    }
}

fn answered(head: Head, body: &[u8]) -> Sent {
    let Head { status, retry_after, location } = head;
    let error = match status {
        status if status.is_success() => None,
        StatusCode::GONE => {
            Some((ErrorKind::Gone, "the receiver answered 410 (Gone): it does not want this webhook".to_owned()))
        }
        status if status.is_redirection() && location.is_some() => {
            let (code, to) = (status.as_u16(), location.unwrap_or_default());
            Some((
                ErrorKind::Status,
                format!("the receiver answered {code}, a redirect to {to}; redirects are not followed"),
            ))
        }
        status => Some((ErrorKind::Status, format!("the receiver answered {}", status.as_u16()))),
    };
    let retry_after = retry_after.filter(|_| error.is_some());
    let error = error.map(|(kind, message)| AttemptError { kind, message });
    let response_excerpt = excerpt(body);
    Sent { result: AttemptResult { error, http_status: Some(status.as_u16()), response_excerpt }, retry_after }
}

/// The beginning of an answer, safe to store and show anywhere.
fn excerpt(body: &[u8]) -> Option<String> {
    // A character has at most 4 bytes.
    let start = &body[..body.len().min(EXCERPT * 4)];
    let text = printable(String::from_utf8_lossy(start).chars(), EXCERPT);
    (!text.is_empty()).then_some(text)
}

fn printable(text: impl Iterator<Item = char>, most: usize) -> String {
    text.map(|char| if char.is_control() { ' ' } else { char }).take(most).collect()
}

fn refused(forbidden: &Forbidden) -> Sent {
    let kind = match forbidden {
        Forbidden::Url | Forbidden::Insecure => ErrorKind::InvalidUrl,
        Forbidden::Address => ErrorKind::ForbiddenAddress,
    };
    Sent::failed(kind, forbidden.to_string())
}

fn failed(error: &reqwest::Error) -> Sent {
    match ResolveError::find(error) {
        Some(ResolveError::Forbidden(forbidden)) => return refused(forbidden),
        Some(lookup @ ResolveError::Lookup(_)) => return Sent::failed(ErrorKind::Dns, lookup.to_string()),
        None => {}
    }
    let kind = if error.is_timeout() {
        ErrorKind::Timeout
    } else if error.is_connect() {
        ErrorKind::Connect
    } else if error.is_builder() {
        ErrorKind::InvalidUrl
    } else {
        ErrorKind::Transport
    };
    // Without the URL, which may contain private data.
    Sent::failed(kind, words::cause(Peer::Receiver, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{DeliveryId, Owner, webhook::WebhookEvent};

    fn claim(signing: Signing) -> ClaimedDelivery {
        ClaimedDelivery {
            id: DeliveryId::from_text("msg_1"),
            batch_id: None,
            owner: Owner::nobody(),
            event: WebhookEvent::Completed,
            url: "https://example.com/".into(),
            target: "https://example.com/".into(),
            signing,
            body: "{}".into(),
            generation: 0,
            attempt: 2,
            number: 2,
            timeout: Duration::from_secs(5),
            lease: "lease".into(),
            created_at: Timestamp(0),
        }
    }

    #[test]
    fn both_families_on_every_attempt() {
        let secrets = [Secret::try_new("new").unwrap(), Secret::try_new("old").unwrap()];
        let headers = headers(&claim(Signing::Global), &secrets, 1_700_000_000).unwrap();
        let text = |name: &str| headers.get(name).unwrap().to_str().unwrap();
        assert_eq!(text("content-type"), "application/json");
        assert_eq!((text("x-webhook-id"), text("webhook-id")), ("msg_1", "msg_1"));
        assert_eq!((text("x-webhook-event"), text("x-webhook-attempt")), ("completed", "2"));
        assert_eq!((text("x-webhook-timestamp"), text("webhook-timestamp")), ("1700000000", "1700000000"));
        assert_eq!(text("x-webhook-signature"), signature::sign_body(&secrets[0], b"{}"));
        assert_eq!(text("webhook-signature").split(' ').count(), 2);
        for secret in secrets {
            assert!(signature::verify(&[secret], &headers, b"{}", 1_700_000_000).is_ok());
        }
    }

    #[test]
    fn without_a_secret_there_is_no_signature() {
        let headers = headers(&claim(Signing::Global), &[], 1).unwrap();
        assert!(!headers.contains_key("webhook-signature") && !headers.contains_key("x-webhook-signature"));
    }

    #[test]
    fn excerpts_are_short_and_printable() {
        assert_eq!(excerpt(b""), None);
        assert_eq!(excerpt(b"a\0b\nc\xff"), Some("a b c\u{fffd}".into()));
        assert_eq!(excerpt("é".repeat(70_000).as_bytes()).unwrap().chars().count(), 200);
        assert_eq!(excerpt("😀".repeat(300).as_bytes()).unwrap(), "😀".repeat(200));
    }

    #[test]
    fn what_an_answer_means() {
        for (status, kind) in [
            (200, None),
            (204, None),
            (299, None),
            (301, Some(ErrorKind::Status)),
            (304, Some(ErrorKind::Status)),
            (404, Some(ErrorKind::Status)),
            (410, Some(ErrorKind::Gone)),
            (503, Some(ErrorKind::Status)),
        ] {
            let status_code = StatusCode::from_u16(status).unwrap();
            let head = Head { status: status_code, retry_after: Some(Duration::from_secs(9)), location: None };
            let sent = answered(head, b"x");
            assert_eq!(sent.result.error.as_ref().map(|error| error.kind), kind, "{status}");
            assert_eq!(sent.retry_after.is_some(), kind.is_some());
        }
    }

    #[test]
    fn a_redirect_says_where_to() {
        let head = Head { status: StatusCode::FOUND, retry_after: None, location: Some("https://b.test/x".into()) };
        let message = answered(head, b"").result.error.unwrap().message;
        assert_eq!(message, "the receiver answered 302, a redirect to https://b.test/x; redirects are not followed");
    }

    #[test]
    fn errors_are_short_and_printable() {
        let message =
            Sent::failed(ErrorKind::Connect, format!("a\0b\n{}", "é".repeat(9_000))).result.error.unwrap().message;
        assert!(message.starts_with("a b é") && message.chars().count() == MESSAGE);
    }
}
