//! A list's filters as text, for its page tokens. The text is part of the tokens' format: a server of the next release
//! must write it the same way, or clients can't continue a list while servers are replaced.

use serde_json::json;

use crate::{
    domain::{
        BatchId, WebhookEndpointId,
        webhook::{DeliveryState, WebhookEvent},
    },
    store::{BatchFilter, DeadLetterFilter, DeliveryFilter, FileFilter},
};

pub(super) fn of_batches(filter: &BatchFilter) -> String {
    // No list with page tokens is of one endpoint.
    let BatchFilter { scope, statuses, endpoint: _, model, metadata } = filter;
    let statuses: Vec<_> = statuses.iter().map(|status| status.as_str()).collect();
    json!(["batches", scope, statuses, model, metadata]).to_string()
}

pub(super) fn of_files(filter: &FileFilter) -> String {
    let FileFilter { scope, purpose } = filter;
    json!(["files", scope, purpose]).to_string()
}

pub(super) fn of_deliveries(filter: &DeliveryFilter) -> String {
    let DeliveryFilter { scope, batch_id, endpoint_id, event, state } = filter;
    let batch_id = batch_id.as_ref().map(BatchId::as_str);
    let endpoint_id = endpoint_id.as_ref().map(WebhookEndpointId::as_str);
    let (event, state) = (event.map(WebhookEvent::as_str), state.map(DeliveryState::as_str));
    json!(["deliveries", scope, batch_id, endpoint_id, event, state]).to_string()
}

pub(super) fn of_dead_letters(filter: &DeadLetterFilter) -> String {
    let DeadLetterFilter { scope, batch_id, event, host, delivered, created_from, created_before } = filter;
    json!(["dead_letters", scope, batch_id, event, host, delivered, created_from, created_before]).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        BatchId, BatchStatus, Scope,
        webhook::{DeliveryState, WebhookEvent},
    };

    /// Not to be adapted when it fails: it fails for clients too.
    #[test]
    fn the_texts_stay_as_they_are() {
        let mut batches = BatchFilter::within(Scope::Of("ana".into()));
        assert_eq!(of_batches(&batches), r#"["batches","ana",[],null,{}]"#);
        batches.statuses = vec![BatchStatus::Completed, BatchStatus::Failed];
        batches.model = Some("a \"b\"".into());
        batches.metadata = [("b", "1"), ("a", "2")].map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let text = r#"["batches","ana",["completed","failed"],"a \"b\"",{"a":"2","b":"1"}]"#;
        assert_eq!(of_batches(&batches), text);
        assert_eq!(of_files(&FileFilter::within(Scope::All)), r#"["files",null,null]"#);
        let deliveries = DeliveryFilter {
            batch_id: Some(BatchId::from_text("batch_1")),
            event: Some(WebhookEvent::Completed),
            state: Some(DeliveryState::Dead),
            ..DeliveryFilter::within(Scope::All)
        };
        assert_eq!(of_deliveries(&deliveries), r#"["deliveries",null,"batch_1",null,"completed","dead"]"#);
        let letters = DeadLetterFilter {
            scope: Scope::Of("ana".into()),
            batch_id: None,
            event: None,
            host: Some("example.com".into()),
            delivered: Some(false),
            created_from: Some(1),
            created_before: None,
        };
        assert_eq!(of_dead_letters(&letters), r#"["dead_letters","ana",null,null,"example.com",false,1,null]"#);
    }
}
