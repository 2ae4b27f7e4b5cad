use std::collections::BTreeSet;

use super::*;

const SPAN: prost_types::Duration = prost_types::Duration { seconds: 1, nanos: 500_000_000 };
const TIME: prost_types::Timestamp = prost_types::Timestamp { seconds: 1_700_000_000, nanos: 5_000 };
const AT: &str = "2023-11-14T22:13:20.000005Z";

/// A message with every field set, and of each `oneof` the field with this index.
fn full(descriptor: &MessageDescriptor, choice: usize) -> DynamicMessage {
    use prost_reflect::Value as Of;
    let mut message = DynamicMessage::new(descriptor.clone());
    match descriptor.full_name() {
        "google.protobuf.Timestamp" => message.transcode_from(&TIME).unwrap(),
        "google.protobuf.Duration" => message.transcode_from(&SPAN).unwrap(),
        _ => {}
    }
    if descriptor.full_name().starts_with("google.") {
        return message;
    }
    for field in descriptor.fields() {
        let others = field.containing_oneof().filter(|choice| !choice.is_synthetic());
        if others.is_some_and(|all| all.fields().nth(choice % all.fields().count()) != Some(field.clone())) {
            continue;
        }
        let of = |kind: &Kind| match kind {
            Kind::Bool => Of::Bool(true),
            Kind::Int32 => Of::I32(7),
            Kind::Int64 => Of::I64(9_007_199_254_740_993),
            Kind::Double => Of::F64(0.5),
            Kind::String => Of::String("text".into()),
            Kind::Bytes => Of::Bytes(r#"{"a":[1]}"#.into()),
            Kind::Enum(_) => Of::EnumNumber(2),
            Kind::Message(kind) => Of::Message(full(kind, choice)),
            other => panic!("{other:?} is new: what is it in JSON?"),
        };
        let value = if field.is_map() {
            Of::Map([(MapKey::String("key".into()), of(&map_value(&field.kind())))].into())
        } else if field.is_list() {
            Of::List(vec![of(&field.kind())])
        } else {
            of(&field.kind())
        };
        message.set_field(&field, value);
    }
    message
}

/// Every field of the message, and of the messages in it, is there, as what it is.
fn check(message: &DynamicMessage, shown: &Value) {
    let of = message.descriptor();
    let fields: Vec<FieldDescriptor> =
        of.fields().filter(|field| message.has_field(field) && field.full_name() != SECRET).collect();
    let names: BTreeSet<&str> = fields.iter().map(FieldDescriptor::name).collect();
    let keys: BTreeSet<&str> = shown.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, names, "{}", of.full_name());
    for field in fields {
        let (set, shown) = (message.get_field(&field).into_owned(), &shown[field.name()]);
        let (set, shown) = match (&set, shown) {
            (prost_reflect::Value::List(sets), Value::Array(shown)) => {
                assert_eq!((sets.len(), shown.len()), (1, 1), "{}", field.full_name());
                (sets[0].clone(), &shown[0])
            }
            (prost_reflect::Value::Map(sets), Value::Object(shown)) => {
                (sets[&MapKey::String("key".into())].clone(), &shown["key"])
            }
            _ => (set, shown),
        };
        match set {
            prost_reflect::Value::Bool(set) => assert_eq!(*shown, json!(set)),
            prost_reflect::Value::I32(set) => assert_eq!(*shown, json!(set)),
            prost_reflect::Value::I64(set) => assert_eq!(*shown, json!(set), "numbers stay numbers"),
            prost_reflect::Value::F64(set) => assert_eq!(*shown, json!(set)),
            prost_reflect::Value::String(set) => assert_eq!(*shown, json!(set)),
            prost_reflect::Value::Bytes(_) => assert_eq!(*shown, json!({"a": [1]})),
            prost_reflect::Value::EnumNumber(_) => {
                let name = shown.as_str().unwrap();
                assert!(!name.contains("STATE") && !name.contains("STATUS"), "{name}");
            }
            prost_reflect::Value::Message(set) => match set.descriptor().full_name() {
                "google.protobuf.Timestamp" => assert_eq!(shown, AT),
                "google.protobuf.Duration" => assert_eq!(shown, "1.5s"),
                _ => check(&set, shown),
            },
            other => panic!("{}: {other:?}", field.full_name()),
        }
    }
}

/// Whatever a proto gets in the future is in here without a change to this test.
#[test]
fn every_field_of_every_message_that_commands_print_is_written() {
    for (name, all) in SHOWN {
        let descriptor = POOL.get_message_by_name(name).unwrap();
        for choice in 0..3 {
            let message = full(&descriptor, choice);
            check(&message, &object(&message, *all));
        }
    }
}

#[test]
fn what_is_not_set_is_left_out_of_files_batches_and_workers() {
    let counts = json!({"total": 0, "completed": 0, "failed": 0});
    let usage = json!({"input_tokens": 0, "cached_input_tokens": 0, "output_tokens": 0, "reasoning_tokens": 0,
        "total_tokens": 0});
    let batch = json!({"status": "UNSPECIFIED", "models": [], "request_counts": counts, "usage": usage, "errors": [],
        "metadata": {}, "priority": 0, "revision": 0});
    let progress = json!({"request_counts": counts, "usage": usage, "requests_per_second": 0.0,
        "output_tokens_per_second": 0.0, "queue_position": 0});
    assert_eq!(of(&pb::Batch::default()), batch);
    assert_eq!(of(&pb::File::default()), json!({"bytes": 0, "line_count": 0, "models": []}));
    assert_eq!(
        of(&pb::Worker::default()),
        json!({"models": [], "state": "UNSPECIFIED", "in_flight": 0, "limit": 0, "running": 0.0, "waiting": 0.0,
            "kv_cache_usage": 0.0, "output_tokens_per_second": 0.0, "requests_per_second": 0.0,
            "reports_metrics": false})
    );
    assert_eq!(of(&pb::RequestStages { queue: Some(SPAN), ..Default::default() }), json!({"queue": "1.5s"}));
    let event = |event| of(&pb::BatchEvent { batch_id: "b".into(), revision: 3, event, ..Default::default() });
    use pb::batch_event::Event;
    let shown = |name: &str, what: &Value| json!({"batch_id": "b", "revision": 3, "sequence": 0, name: what});
    assert_eq!(event(Some(Event::StateChanged(Default::default()))), shown("state_changed", &batch));
    assert_eq!(event(Some(Event::Progress(Default::default()))), shown("progress", &progress));
    assert_eq!(event(Some(Event::Heartbeat(Default::default()))), shown("heartbeat", &json!({})));
    assert_eq!(event(None), shown("unknown", &json!({})));
}

#[test]
fn what_is_not_set_is_empty_or_null_in_results_and_webhooks() {
    assert_eq!(
        of(&pb::BatchResult { line: "{\"a\":[1]}".into(), ..Default::default() }),
        json!({"custom_id": "", "cursor": "", "line_number": 0, "succeeded": false, "line": {"a": [1]}})
    );
    assert_eq!(
        of(&pb::InferResponse { body: "<h1>".into(), ..Default::default() }),
        json!({"status_code": 0, "body": "<h1>", "worker_id": ""})
    );
    let attempt = json!({"generation": 0, "attempt": 0, "outcome": "", "error_kind": "", "error_message": "",
        "http_status": 0, "response_excerpt": "", "start_time": null, "end_time": null, "forced": false});
    assert_eq!(
        of(&pb::DeadLetter { attempt_log: vec![Default::default()], ..Default::default() }),
        json!({"id": "", "batch_id": "", "delivery_id": "", "webhook_url": "", "event": "", "payload": "",
            "error_kind": "", "error_message": "", "attempts": 0, "last_attempt_time": null, "create_time": null,
            "retried_time": null, "retry_success": false, "retry_count": 0, "attempt_log": [attempt]})
    );
    assert_eq!(
        of(&pb::Delivery { state: 3, ..Default::default() }),
        json!({"id": "", "batch_id": "", "endpoint_id": "", "event": "", "webhook_url": "", "state": "DELIVERED",
            "attempts": 0, "max_attempts": 0, "next_attempt_time": null, "error_message": "", "create_time": null,
            "settle_time": null, "payload": "", "attempt_log": []})
    );
    let endpoint = json!({"id": "", "url": "", "events": [], "max_retries": 0, "timeout": null, "disabled": false,
        "disabled_reason": "", "previous_secret_expire_time": null, "create_time": null, "update_time": null,
        "retry_schedule": [], "retry_horizon": null});
    assert_eq!(of(&pb::WebhookEndpoint::default()), endpoint);
    assert_eq!(
        of(&pb::CreateEndpointResponse { endpoint: Some(Default::default()), secret: "whsec_x".into() }),
        json!({"endpoint": endpoint, "secret": "whsec_x"}),
        "the one moment at which a secret is shown"
    );
    assert_eq!(of(&pb::RetryDeadLettersResponse { matched: 3, job: None }), json!({"matched": 3, "job": null}));
    assert_eq!(
        of(&pb::RetryJob { state: 2, ..Default::default() }),
        json!({"id": "", "state": "DONE", "matched": 0, "succeeded": 0, "failed": 0, "skipped": 0,
            "create_time": null, "end_time": null})
    );
    assert_eq!(of(&pb::PurgeDeadLettersResponse { purged: 2 }), json!({"purged": 2}));
}

#[test]
fn a_batchs_secret_is_never_shown_and_an_error_without_a_line_has_none() {
    let webhook = pb::WebhookConfig { url: "http://h".into(), secret: "s3cret".into(), ..Default::default() };
    let errors = [0, 3].map(|line| pb::BatchError { code: "c".into(), line, ..Default::default() }).to_vec();
    let shown = of(&pb::Batch { webhook: Some(webhook), errors, ..Default::default() });
    assert_eq!(shown["errors"], json!([{"code": "c"}, {"code": "c", "line": 3}]));
    assert_eq!(shown["webhook"]["url"], "http://h");
    assert!(!shown.to_string().contains("secret") && !shown.to_string().contains("s3cret"), "{shown}");
}

#[test]
fn odd_times_are_left_out_and_unknown_values_are_unspecified() {
    assert_eq!(time(Some(&prost_types::Timestamp { seconds: -5, nanos: 0 })), None);
    assert_eq!(duration(Some(&prost_types::Duration { seconds: -5, nanos: 0 })), None);
    assert_eq!(worker_state(99), "UNSPECIFIED");
    let odd = Some(prost_types::Timestamp { seconds: 300_000_000_000, nanos: 0 });
    let shown = of(&pb::Batch { status: 99, create_time: odd, ..Default::default() });
    assert!(shown["status"] == "UNSPECIFIED" && shown.get("create_time").is_none(), "{shown}");
}
