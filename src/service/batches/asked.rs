//! What a call asked for, as a hash: a repeated call under the same idempotency key asks for the same.

use sha2::{Digest, Sha256};

use super::{
    super::{Span, webhooks::NewWebhook},
    BatchInput, CreateBatch,
};

/// Identifies a list of texts.
pub(in crate::service) fn hash<T: AsRef<[u8]>>(parts: &[T]) -> String {
    let mut hasher = Hasher::default();
    parts.iter().for_each(|part| hasher.add(part));
    hasher.finish()
}

/// Identifies what a client asks for with a batch: everything that the batch would do differently. Of a webhook's secret
/// only whether there is one: a hash must not help to find it. `endpoint` of a file's batch is not counted, as it can only
/// be the file's.
pub(super) fn for_batch(of: &CreateBatch) -> String {
    let mut hasher = Hasher::default();
    match &of.input {
        None => hasher.add("none"),
        Some(BatchInput::File(id)) => {
            hasher.add("file");
            hasher.add(id);
        }
        Some(BatchInput::Inline(requests)) => {
            hasher.add("inline");
            hasher.add(&of.endpoint);
            hasher.add(&requests.len().to_string());
            for request in requests {
                hasher.add(&request.custom_id);
                hasher.add(&request.body);
            }
        }
    }
    hasher.span(of.completion_window.or(Some(Ok(crate::domain::batch::DEFAULT_WINDOW))));
    hasher.span(of.output_expires_after);
    hasher.add(&of.priority.to_string());
    hasher.add(&of.metadata.len().to_string());
    for (name, value) in &of.metadata {
        hasher.add(name);
        hasher.add(value);
    }
    hasher.add(&of.webhook_endpoint_id);
    if let Some(NewWebhook { url, secret, max_retries, timeout, events }) = &of.webhook {
        hasher.add(url);
        hasher.add(if secret.is_empty() { "the server's secret" } else { "a secret" });
        hasher.add(&max_retries.to_string());
        hasher.span(*timeout);
        events.iter().for_each(|event| hasher.add(event));
    }
    hasher.finish()
}

#[derive(Default)]
struct Hasher(Sha256);

impl Hasher {
    /// With its length, so that no two lists of parts look the same.
    fn add<T: AsRef<[u8]> + ?Sized>(&mut self, part: &T) {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    fn span(&mut self, span: Option<Span>) {
        let text = match span {
            None => "none".to_owned(),
            Some(Ok(span)) => span.as_nanos().to_string(),
            Some(Err(_)) => "wrong".to_owned(),
        };
        self.add(&text);
    }

    fn finish(self) -> String {
        hex::encode(self.0.finalize())
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, time::Duration};

    use super::*;
    use crate::ingest::InlineRequest;

    fn inline(requests: &[(&str, &'static str)]) -> Option<BatchInput> {
        let request = |(id, body): &(&str, &'static str)| InlineRequest {
            custom_id: (*id).to_owned(),
            body: body.as_bytes().into(),
        };
        Some(BatchInput::Inline(requests.iter().map(request).collect()))
    }

    #[test]
    fn whatever_makes_another_batch_makes_another_hash() {
        let file = || CreateBatch { input: Some(BatchInput::File("f".into())), ..CreateBatch::default() };
        let webhook = |url: &str, events: &[&str]| {
            let events = events.iter().map(|event| (*event).to_owned()).collect();
            Some(NewWebhook { url: url.to_owned(), events, ..NewWebhook::default() })
        };
        let hour = Some(Ok(Duration::from_secs(3_600)));
        let all = [
            file(),
            CreateBatch::default(),
            CreateBatch { input: Some(BatchInput::File("g".into())), ..CreateBatch::default() },
            CreateBatch { completion_window: hour, ..file() },
            CreateBatch { output_expires_after: hour, ..file() },
            CreateBatch { priority: 1, ..file() },
            CreateBatch { metadata: [("a".into(), "b".into())].into(), ..file() },
            CreateBatch { metadata: [("ab".into(), String::new())].into(), ..file() },
            CreateBatch { webhook_endpoint_id: "we_1".into(), ..file() },
            CreateBatch { webhook: webhook("u", &[]), ..file() },
            CreateBatch { webhook: webhook("u", &["e"]), ..file() },
            CreateBatch { input: inline(&[]), ..CreateBatch::default() },
            CreateBatch { input: inline(&[("a", "{}")]), ..CreateBatch::default() },
            CreateBatch { input: inline(&[("a", "{ }")]), ..CreateBatch::default() },
            CreateBatch { input: inline(&[("a", "{}")]), endpoint: "e".into(), ..CreateBatch::default() },
        ];
        let hashes: HashSet<String> = all.iter().map(for_batch).collect();
        assert_eq!(hashes.len(), all.len());
        // Said or left out, it is the same batch.
        let day = Some(Ok(Duration::from_secs(86_400)));
        let said = CreateBatch { completion_window: day, endpoint: "/v1/score".into(), ..file() };
        assert_eq!(for_batch(&said), for_batch(&file()));
        assert_ne!(hash(&["a", "b"]), hash(&["ab"]));
    }
}
