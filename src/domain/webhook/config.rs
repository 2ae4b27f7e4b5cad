//! The target of a batch's webhooks: as requested, and as stored.

use std::{borrow::Cow, collections::BTreeMap, time::Duration};

use url::Url;
use validator::{Validate, ValidationError, ValidationErrors, ValidationErrorsKind};
use zeroize::Zeroizing;

use super::{EventFilter, SealedSecret, Secret};
use crate::domain::text::{BadUrl, http_url};

/// The longest URL, in bytes.
pub const MAX_URL_BYTES: usize = 2_048;
/// The most attempts that can be requested. By default the last one is about 16 hours after the first.
pub const MAX_ATTEMPTS: i64 = 10;
/// The shortest and the longest time limit of one attempt.
pub const TIMEOUT_RANGE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
/// The default number of attempts: the most, because fewer lose events during an outage.
pub const DEFAULT_MAX_ATTEMPTS: i32 = 10;
/// The default time limit of one attempt.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// The metadata key in which older clients give a webhook's URL.
pub const OLD_URL_KEY: &str = "webhook_url";

/// A secret as a client gave it, not validated yet.
#[derive(Clone)]
struct GivenSecret(Zeroizing<String>);

impl std::fmt::Debug for GivenSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GivenSecret(..)")
    }
}

/// `validator` copies values that it refuses into its errors; for a secret, it gets nothing to copy.
impl serde::Serialize for GivenSecret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_unit()
    }
}

/// A webhook as a client requests it, with one set of rules for every way in.
#[derive(Clone, Debug, Default, Validate)]
pub struct WebhookConfig {
    #[validate(custom(function = "check_url"))]
    url: String,
    #[validate(custom(function = "check_secret"))]
    secret: Option<GivenSecret>,
    #[validate(custom(function = "check_max_retries"))]
    max_retries: Option<i64>,
    #[validate(custom(function = "check_timeout"))]
    timeout: Option<Duration>,
    #[validate(custom(function = "check_events"))]
    events: Vec<String>,
}

/// The server's defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// The number of attempts in all, 1 to 10.
    pub max_attempts: i32,
    /// The time limit of one attempt, 5 s to 300 s.
    pub timeout: Duration,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { max_attempts: DEFAULT_MAX_ATTEMPTS, timeout: DEFAULT_TIMEOUT }
    }
}

/// A field that breaks its rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct Invalid {
    /// The field's name, such as `url`.
    pub field: String,
    /// What is wrong and what is expected. Never quotes a secret.
    pub message: String,
}

/// The target of a batch's webhooks with all defaults filled in, as stored with the batch.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WebhookTarget {
    /// The complete URL in its canonical form.
    pub url: String,
    /// The secret. `None`: the server's own, if it has one when the webhook is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<SealedSecret>,
    /// The number of attempts in all, 1 to 10.
    pub max_attempts: i32,
    /// The time limit of one attempt, including its answer.
    #[serde(with = "milliseconds")]
    pub timeout: Duration,
    /// The events to send.
    pub events: EventFilter,
}

impl WebhookConfig {
    /// A webhook to this URL, with the server's defaults.
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), ..Self::default() }
    }

    /// The old form: a URL in the batch's metadata.
    #[must_use]
    pub fn from_metadata(metadata: &BTreeMap<String, String>) -> Option<Self> {
        metadata.get(OLD_URL_KEY).map(Self::new)
    }

    /// Sets the secret.
    #[must_use]
    pub fn secret(mut self, secret: Option<String>) -> Self {
        self.secret = secret.map(|secret| GivenSecret(Zeroizing::new(secret)));
        self
    }

    /// Sets the number of attempts in all.
    #[must_use]
    pub fn max_retries(mut self, max_retries: Option<i64>) -> Self {
        self.max_retries = max_retries;
        self
    }

    /// Sets the time limit of one attempt.
    #[must_use]
    pub fn timeout(mut self, timeout: Option<Duration>) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets the events.
    #[must_use]
    pub fn events(mut self, events: Vec<String>) -> Self {
        self.events = events;
        self
    }

    /// Validates every field and fills in the defaults. The secret is returned separately, for the caller to encrypt.
    ///
    /// # Errors
    /// Every [`Invalid`] field, by name.
    pub fn resolve(self, defaults: Defaults) -> Result<(WebhookTarget, Option<Secret>), Vec<Invalid>> {
        self.validate().map_err(|errors| invalid(&errors))?;
        let refused = |field: &str, message: String| vec![Invalid { field: field.to_owned(), message }];
        let secret = self.secret.map(|secret| Secret::try_new(secret.0.as_str())).transpose();
        let target = WebhookTarget {
            secret: None,
            events: EventFilter::parse(&self.events).map_err(|error| refused("events", error.to_string()))?,
            max_attempts: self.max_retries.and_then(|number| number.try_into().ok()).unwrap_or(defaults.max_attempts),
            timeout: self.timeout.unwrap_or(defaults.timeout),
            url: canonical(&self.url).map_err(|error| refused("url", message(&error)))?,
        };
        Ok((target, secret.map_err(|error| refused("secret", error.to_string()))?))
    }
}

/// The key by which deliveries are shared out fairly: equal keys mean the same receiver. It is the URL without query
/// and fragment, so that a job's id in the query does not make a dead receiver a new one each time.
#[must_use]
pub fn target_of(url: &str) -> String {
    match Url::parse(url) {
        Ok(mut url) => {
            url.set_query(None);
            url.set_fragment(None);
            url.into()
        }
        Err(_) => url.to_owned(),
    }
}

fn error(code: &'static str, message: impl Into<Cow<'static, str>>) -> ValidationError {
    ValidationError::new(code).with_message(message.into())
}

fn check_url(text: &str) -> Result<(), ValidationError> {
    if text.is_empty() {
        return Err(error("required", "a webhook has a url"));
    }
    canonical(text).map(|_| ())
}

/// The canonical form in which a URL is stored, shown and called. Percent-encoding may make it longer than the given
/// text.
fn canonical(text: &str) -> Result<String, ValidationError> {
    if text.len() > MAX_URL_BYTES {
        return Err(error("length", format!("a url has at most {MAX_URL_BYTES} bytes, not {}", text.len())));
    }
    let url = String::from(http_url(text).map_err(|bad| match bad {
        BadUrl::Credentials => error("user_info", format!("{bad}; use the secret instead")),
        _ => error("url", bad.to_string()),
    })?);
    if url.len() > MAX_URL_BYTES {
        let message = format!("a url has at most {MAX_URL_BYTES} bytes, not {} when it is percent-encoded", url.len());
        return Err(error("length", message));
    }
    Ok(url)
}

fn check_secret(secret: &GivenSecret) -> Result<(), ValidationError> {
    Secret::try_new(secret.0.as_str()).map(|_| ()).map_err(|reason| error("secret", reason.to_string()))
}

// By value and by reference as `validator` passes them.
fn check_max_retries(max_retries: i64) -> Result<(), ValidationError> {
    if (1..=MAX_ATTEMPTS).contains(&max_retries) {
        return Ok(());
    }
    Err(error("range", format!("the total number of attempts is 1 to {MAX_ATTEMPTS}, not {max_retries}")))
}

fn check_timeout(timeout: &Duration) -> Result<(), ValidationError> {
    let (least, most) = TIMEOUT_RANGE;
    if (least..=most).contains(timeout) {
        return Ok(());
    }
    Err(error("range", format!("a timeout is {} s to {} s", least.as_secs(), most.as_secs())))
}

fn check_events(events: &[String]) -> Result<(), ValidationError> {
    EventFilter::parse(events).map(|_| ()).map_err(|unknown| error("unknown_events", unknown.to_string()))
}

fn invalid(errors: &ValidationErrors) -> Vec<Invalid> {
    let mut all: Vec<Invalid> = errors
        .0
        .iter()
        .flat_map(|(field, kind)| match kind {
            ValidationErrorsKind::Field(errors) => errors
                .iter()
                .map(|error| Invalid { field: field.clone().into_owned(), message: message(error) })
                .collect(),
            ValidationErrorsKind::Struct(errors) => invalid(errors),
            ValidationErrorsKind::List(errors) => errors.values().flat_map(|errors| invalid(errors)).collect(),
        })
        .collect();
    all.sort_by(|a, b| a.field.cmp(&b.field));
    all
}

fn message(of: &ValidationError) -> String {
    of.message.clone().unwrap_or_else(|| of.code.clone()).into_owned()
}

mod milliseconds {
    use std::time::Duration;

    pub(super) fn serialize<S: serde::Serializer>(span: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        serde::Deserialize::deserialize(deserializer).map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(config: WebhookConfig) -> Result<(WebhookTarget, Option<Secret>), Vec<Invalid>> {
        config.resolve(Defaults::default())
    }

    fn refused(config: WebhookConfig) -> (String, String) {
        let mut all = resolve(config).unwrap_err();
        assert_eq!(all.len(), 1, "{all:?}");
        let Invalid { field, message } = all.remove(0);
        (field, message)
    }

    #[test]
    fn each_unset_field_has_its_default() {
        let (target, secret) = resolve(WebhookConfig::new("https://example.com/hook")).unwrap();
        assert_eq!((&target.secret, secret), (&None, None));
        assert_eq!(target.max_attempts, 10);
        assert_eq!(target.timeout, Duration::from_secs(30));
        assert_eq!(target.events, EventFilter::default());
    }

    #[test]
    fn what_is_given_is_kept() {
        let config = WebhookConfig::new("http://example.com:8080/a?b=c")
            .secret(Some("abc".into()))
            .max_retries(Some(10))
            .timeout(Some(Duration::from_secs(300)))
            .events(vec!["progress".into()]);
        let (mut target, secret) = resolve(config).unwrap();
        assert_eq!(secret, Some(Secret::try_new("abc").unwrap()));
        target.secret = Some(SealedSecret::from_bytes(vec![1, 2, 3]));
        assert_eq!((target.max_attempts, target.timeout), (10, Duration::from_secs(300)));
        assert_eq!(target.events.names(), ["progress"]);
        let stored = serde_json::to_string(&target).unwrap();
        assert_eq!(serde_json::from_str::<WebhookTarget>(&stored).unwrap(), target);
    }

    #[test]
    fn bad_urls() {
        let long = format!("https://example.com/{}", "a".repeat(2_048));
        for url in [
            "",
            "example.com",
            "/hook",
            "ftp://example.com",
            "file:///etc/passwd",
            "http://",
            "https:///",
            "http://user@example.com",
            "http://user:password@example.com",
            "http://example.com:0/",
            "http://example.com:70000/",
            "javascript:alert(1)",
            "http:example.com/hook",
            "http://example.com\\hook",
            "http://example.com/ho\tok",
            "http://example.com/hook\0",
            " http://example.com/hook",
            &long,
            // Two bytes become six.
            &format!("https://example.com/{}", "é".repeat(700)),
        ] {
            assert_eq!(refused(WebhookConfig::new(url)).0, "url", "{url}");
        }
        let longest = format!("https://example.com/{}", "a".repeat(2_048 - 20));
        assert!(resolve(WebhookConfig::new(longest)).is_ok());
    }

    #[test]
    fn a_url_is_kept_in_its_canonical_form() {
        let (target, _) = resolve(WebhookConfig::new("HTTPS://Example.com:443/a/../h%6fok?x=é")).unwrap();
        assert_eq!(target.url, "https://example.com/h%6fok?x=%C3%A9");
    }

    #[test]
    fn limits_are_inclusive() {
        let config = || WebhookConfig::new("https://example.com/");
        for good in [1, 10] {
            assert!(resolve(config().max_retries(Some(good))).is_ok());
        }
        for bad in [-1, 0, 11, i64::MAX, i64::MIN] {
            assert_eq!(refused(config().max_retries(Some(bad))).0, "max_retries");
        }
        for good in [5_000, 300_000] {
            assert!(resolve(config().timeout(Some(Duration::from_millis(good)))).is_ok());
        }
        for bad in [0, 4_999, 300_001] {
            assert_eq!(refused(config().timeout(Some(Duration::from_millis(bad)))).0, "timeout");
        }
    }

    #[test]
    fn unknown_events_are_listed() {
        let (field, message) =
            refused(WebhookConfig::new("https://example.com/").events(vec!["done".into(), "failed".into()]));
        assert_eq!(field, "events");
        assert_eq!(message, "unknown event \"done\"; valid are completed, failed, progress, cancelled, expired");
    }

    #[test]
    fn every_bad_field_is_named_at_once_and_no_secret_is_quoted() {
        let config = WebhookConfig::new("nowhere")
            .secret(Some("whsec_canary!".into()))
            .max_retries(Some(0))
            .timeout(Some(Duration::ZERO))
            .events(vec!["x".into()]);
        assert!(!format!("{config:?}").contains("canary"));
        let raw = config.validate().unwrap_err();
        assert!(!format!("{raw:?} {raw}").contains("canary"));
        let all = resolve(config).unwrap_err();
        assert_eq!(
            all.iter().map(|one| one.field.as_str()).collect::<Vec<_>>(),
            ["events", "max_retries", "secret", "timeout", "url"]
        );
        assert!(!format!("{all:?}").contains("canary"));
    }

    #[test]
    fn the_old_form() {
        let metadata = BTreeMap::from([("webhook_url".to_owned(), "https://example.com/old".to_owned())]);
        let (target, _) = resolve(WebhookConfig::from_metadata(&metadata).unwrap()).unwrap();
        assert_eq!(target.url, "https://example.com/old");
        assert!(WebhookConfig::from_metadata(&BTreeMap::new()).is_none());
    }

    #[test]
    fn a_target_is_a_url_without_query() {
        assert_eq!(target_of("https://Example.com:443/a?b=c#d"), "https://example.com/a");
        assert_ne!(target_of("https://example.com/a"), target_of("https://example.com/b"));
    }
}
