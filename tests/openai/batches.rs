//! Batches: one rule, two dialects.

use futures::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use tidemill::pb;

use crate::{
    client::{Said, ask, create, get, of_file, post, upload},
    support::{Server, lines, lines_of},
};

#[tokio::test]
async fn a_batch_is_made_shown_listed_and_cancelled() {
    let server = Server::start().await;
    let file = upload(&server, &lines(10)).await;
    let body = json!({
        "input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h",
        "metadata": {"team": "search"}, "output_expires_after": {"anchor": "created_at", "seconds": 3_600},
        "priority": 1, "unheard_of": [1],
    });
    let made = post(&server, "/v1/batches", &body).await;
    let batch = &made.json;
    for key in [
        "id",
        "object",
        "endpoint",
        "model",
        "errors",
        "input_file_id",
        "completion_window",
        "status",
        "output_file_id",
        "error_file_id",
        "created_at",
        "in_progress_at",
        "expires_at",
        "finalizing_at",
        "completed_at",
        "failed_at",
        "expired_at",
        "cancelling_at",
        "cancelled_at",
        "request_counts",
        "usage",
        "metadata",
        "tidemill",
    ] {
        assert!(batch.as_object().unwrap().contains_key(key), "{key}");
    }
    assert_eq!((made.status, &batch["object"], &batch["model"]), (200, &json!("batch"), &json!("m")));
    assert_eq!((&batch["completion_window"], &batch["input_file_id"]), (&json!("24h"), &json!(file)));
    assert_eq!(batch["request_counts"], json!({"total": 10, "completed": 0, "failed": 0}));
    assert_eq!((&batch["metadata"], &batch["tidemill"]["priority"]), (&json!({"team": "search"}), &json!(1)));
    assert_eq!((&batch["errors"], &batch["output_file_id"]), (&Value::Null, &Value::Null));
    let created = batch["created_at"].as_i64().unwrap();
    assert_eq!(batch["expires_at"].as_i64().unwrap(), created + 86_400);

    let path = format!("/v1/batches/{}", made.id());
    server.run_batch(&made.id(), 7).await;
    let ended = get(&server, &path).await.json;
    assert_eq!(
        (&ended["status"], &ended["request_counts"]),
        (&json!("completed"), &json!({"total": 10, "completed": 7, "failed": 3}))
    );
    let output = get(&server, &format!("/v1/files/{}", ended["output_file_id"].as_str().unwrap())).await.json;
    assert_eq!(output["purpose"], "batch_output");
    assert_eq!(output["expires_at"].as_i64().unwrap(), output["created_at"].as_i64().unwrap() + 3_600);
    assert!(ended["error_file_id"].is_string() && ended["completed_at"].is_i64());
    let late = ask(&server, Method::POST, &format!("{path}/cancel")).await;
    assert_eq!(late.error(), (409, None, None));
    assert_eq!(late.json["error"]["message"], "Cannot cancel a batch with status 'completed'.");
    assert_eq!(late.headers["x-should-retry"], "false");

    let other = create(&server, &file).await;
    let path = format!("/v1/batches/{other}/cancel");
    let cancelled = post(&server, &path, &json!({})).await;
    assert_eq!((cancelled.status, &cancelled.json["status"]), (200, &json!("cancelling")));
    assert!(cancelled.json["cancelling_at"].is_i64());
    let again = ask(&server, Method::POST, &path).await;
    assert_eq!((again.status, &again.json["id"]), (200, &json!(other)), "as at OpenAI");
    let list = get(&server, "/v1/batches?limit=1").await;
    assert_eq!((list.ids(), &list.json["has_more"]), (vec![other.clone()], &json!(true)));
    let rest = get(&server, &format!("/v1/batches?after={other}")).await;
    assert_eq!((rest.ids(), &rest.json["has_more"]), (vec![made.id()], &json!(false)));
}

#[tokio::test]
async fn what_one_dialect_makes_the_other_sees_and_cancels() {
    let server = Server::start().await;
    let mut grpc = server.client().await;
    let file = upload(&server, &lines(3)).await;
    let over_http = create(&server, &file).await;
    let seen = grpc.get_batch(pb::GetBatchRequest { batch_id: over_http.clone() }).await.unwrap().into_inner();
    assert_eq!((seen.input_file_id.as_str(), seen.request_counts.unwrap().total), (file.as_str(), 3));
    grpc.cancel_batch(pb::CancelBatchRequest { batch_id: over_http.clone() }).await.unwrap();
    assert_eq!(get(&server, &format!("/v1/batches/{over_http}")).await.json["status"], "cancelling");

    let request = pb::CreateBatchRequest {
        input: Some(pb::create_batch_request::Input::InputFileId(file)),
        output_expires_after: Some(prost_types::Duration { seconds: 7_200, nanos: 0 }),
        ..Default::default()
    };
    let over_grpc = grpc.create_batch(request).await.unwrap().into_inner().id;
    assert_eq!(get(&server, "/v1/batches").await.ids(), [over_grpc.clone(), over_http]);
    let cancelled = ask(&server, Method::POST, &format!("/v1/batches/{over_grpc}/cancel")).await;
    assert_eq!(cancelled.json["status"], "cancelling");
    let path = format!("/v1/batches/{over_grpc}");
    let early = ask(&server, Method::DELETE, &path).await;
    assert_eq!(early.error(), (409, Some("batch_not_ended"), None));
    server.run_batch(&over_grpc, 3).await;
    assert_eq!(ask(&server, Method::DELETE, &path).await.json["deleted"], true);
    let gone = grpc.get_batch(pb::GetBatchRequest { batch_id: over_grpc.clone() }).await;
    assert_eq!(gone.unwrap_err().code(), tonic::Code::NotFound);
    let unknown = get(&server, &path).await;
    assert_eq!(unknown.error(), (404, None, None));
    assert_eq!(unknown.json["error"]["message"], format!("No batch found with id '{over_grpc}'."));
}

#[tokio::test]
async fn a_batch_that_can_not_be_is_refused_at_the_first_thing_that_is_wrong() {
    let server = Server::start().await;
    let file = upload(&server, &lines(1)).await;
    let send = async |change: &dyn Fn(&mut Value)| {
        let mut body = of_file(&file);
        change(&mut body);
        post(&server, "/v1/batches", &body).await
    };
    let unknown = send(&|body| body["input_file_id"] = json!("file-unheard-of")).await;
    assert_eq!(unknown.error(), (400, Some("invalid_request"), Some("input_file_id")));
    assert!(unknown.json["error"]["message"].as_str().unwrap().starts_with("Cannot find file file-unheard-of"));
    let other = send(&|body| body["endpoint"] = json!("/v1/embeddings")).await;
    assert_eq!(other.error(), (400, Some("invalid_value"), Some("endpoint")));
    let nowhere = send(&|body| body["endpoint"] = json!("/v1/nowhere")).await;
    let said = nowhere.json["error"]["message"].as_str().unwrap();
    assert!(said.starts_with("Invalid value: '/v1/nowhere'. Supported values are: '/v1/chat/completions', "), "{said}");
    let long = send(&|body| body["metadata"] = json!({"k": "x".repeat(513)})).await;
    assert_eq!(long.error(), (400, Some("invalid_value"), Some("metadata[\"k\"]")));
    let soon = send(&|body| body["output_expires_after"] = json!({"anchor": "created_at", "seconds": 60})).await;
    assert_eq!(soon.error(), (400, Some("invalid_value"), Some("output_expires_after.seconds")));
    let urgent = send(&|body| body["priority"] = json!(7)).await;
    assert_eq!(urgent.error(), (400, Some("invalid_value"), Some("priority")));
    let hook = send(&|body| body["webhook"] = json!({"url": "ftp://x"})).await;
    assert_eq!((hook.status, hook.error().2), (400, Some("webhook.url")), "{hook:?}");
    let batch = create(&server, &file).await;
    server.run_batch(&batch, 1).await;
    let output = get(&server, &format!("/v1/batches/{batch}")).await.json["output_file_id"].clone();
    let result = send(&|body| body["input_file_id"] = output.clone()).await;
    assert_eq!(result.error(), (400, Some("invalid_value"), Some("input_file_id")));
    assert_eq!(get(&server, "/v1/batches").await.ids(), [batch]);
}

#[tokio::test]
async fn a_repeated_creation_with_a_key_is_the_same_batch() {
    let server = Server::start().await;
    let file = upload(&server, &lines(1)).await;
    let send = async || {
        let request = reqwest::Client::new().post(server.url("/v1/batches")).header("idempotency-key", "k");
        Said::of(request.body(of_file(&file).to_string()).send().await.unwrap()).await
    };
    assert_eq!(send().await.id(), send().await.id());
    let mut in_body = of_file(&file);
    in_body["idempotency_key"] = json!("k");
    assert_eq!(post(&server, "/v1/batches", &in_body).await.id(), send().await.id());
    assert_ne!(create(&server, &file).await, send().await.id());
}

#[tokio::test]
async fn several_models_are_listed_and_none_is_the_only_one() {
    let server = Server::start().await;
    let file = upload(&server, &[lines_of(1, "a"), lines(1)].concat().replace_ids()).await;
    let batch = create(&server, &file).await;
    let shown = get(&server, &format!("/v1/batches/{batch}")).await.json;
    assert_eq!((&shown["model"], &shown["tidemill"]["models"]), (&Value::Null, &json!(["a", "m"])));
}

trait ReplaceIds {
    /// Makes the ids of the lines differ.
    fn replace_ids(self) -> Vec<u8>;
}

impl ReplaceIds for Vec<u8> {
    fn replace_ids(self) -> Vec<u8> {
        let text = String::from_utf8(self).unwrap();
        let lines = text.lines().enumerate();
        lines.map(|(at, line)| line.replace("\"c0\"", &format!("\"id-{at}\"")) + "\n").collect::<String>().into_bytes()
    }
}

/// The events of a stream of server-sent events until it ends: their names, ids and data.
async fn events(answer: reqwest::Response) -> Vec<(String, i64, Value)> {
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let mut pieces = answer.bytes_stream();
    let mut text = String::new();
    while let Some(piece) = pieces.next().await {
        text.push_str(std::str::from_utf8(&piece.unwrap()).unwrap());
    }
    let field = |block: &str, name: &str| block.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
    let event = |block: &str| {
        let (name, id, data) = (field(block, "event: ")?, field(block, "id: ")?, field(block, "data: ")?);
        Some((name, id.parse().unwrap(), serde_json::from_str(&data).unwrap()))
    };
    text.split("\n\n").filter_map(event).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_watched_to_its_end_and_resumed_after_any_event() {
    let server = Server::start().await;
    let file = upload(&server, &lines(10)).await;
    let batch = create(&server, &file).await;
    let path = format!("/v1/batches/{batch}/events");
    let watching = reqwest::get(server.url(&path)).await.unwrap();
    server.run_batch(&batch, 10).await;
    let seen = events(watching).await;
    let states = |seen: &[(String, i64, Value)]| -> Vec<String> {
        let states = seen.iter().filter(|(name, ..)| name == "batch");
        states.map(|(_, _, data)| data["status"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(states(&seen), ["in_progress", "finalizing", "completed"]);
    let ids: Vec<i64> = seen.iter().map(|(_, id, _)| *id).collect();
    assert!(ids.is_sorted(), "{ids:?}");
    let (_, last, end) = seen.last().unwrap();
    assert_eq!((&end["id"], end["output_file_id"].is_string()), (&json!(batch), true));
    // From every event on, nothing is missing and nothing comes twice.
    for (at, (_, id, _)) in seen.iter().enumerate().filter(|(_, (_, id, _))| id != last) {
        let request = reqwest::Client::new().get(server.url(&path)).header("last-event-id", id.to_string());
        let rest = events(request.send().await.unwrap()).await;
        assert!(rest.iter().all(|(_, later, _)| later > id), "{id}: {rest:?}");
        assert_eq!(states(&rest), states(&seen[at + 1..]), "after {id}");
    }
    let request = reqwest::Client::new().get(server.url(&path)).header("last-event-id", last.to_string());
    assert_eq!(request.send().await.unwrap().status().as_u16(), 204, "a browser need not come back");
    for bad in ["x", "-1", "999999"] {
        let request = reqwest::Client::new().get(server.url(&path)).header("last-event-id", bad);
        let said = Said::of(request.send().await.unwrap()).await;
        assert_eq!(said.error(), (400, Some("invalid_value"), Some("Last-Event-ID")), "{bad}");
    }
    assert_eq!(get(&server, "/v1/batches/batch_x/events").await.error().0, 404);
}
