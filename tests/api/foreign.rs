//! One owner's ids in another owner's hands: every RPC, found in the protos, and every HTTP path says of them what it says of
//! ids that do not exist. A new RPC or field is covered by itself, or fails here until it is.

use std::time::Duration;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MethodDescriptor, Value};
use tidemill::{
    domain::{
        Owner, Scope,
        webhook::{AttemptError, AttemptResult, ErrorKind, target_of},
    },
    pb,
    store::{ClaimShare, DeadLetterFilter, DeliveryFilter, Settlement},
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::{
    raw::call,
    support::{Server, inline, lines, of_file, upload},
};

const URL: &str = "http://127.0.0.1:9/hook";

/// What ana has, by the names of the fields that name it. Each is the whole id.
struct Hers {
    ids: Vec<(&'static str, String)>,
    output_file: String,
    error_file: String,
}

impl Hers {
    fn of(&self, field: &str) -> Option<&str> {
        // Fields of one meaning that have a longer name elsewhere.
        let name = match field {
            "input_file_id" => "file_id",
            "webhook_endpoint_id" => "endpoint_id",
            name => name,
        };
        self.ids.iter().find(|(known, _)| *known == name).map(|(_, id)| id.as_str())
    }

    fn all(&self) -> impl Iterator<Item = &str> {
        let ids = self.ids.iter().map(|(_, id)| id.as_str());
        ids.chain([self.output_file.as_str(), self.error_file.as_str()])
    }
}

/// One of each: an ended batch with results and an error file, its delivery that is a dead letter, its endpoint, a retry job.
async fn hers(server: &Server) -> Hers {
    let mut ana = server.client_of(Some("ana")).await;
    let mut admin = server.webhooks(Some("ana")).await;
    let create = pb::CreateEndpointRequest { url: URL.into(), max_retries: 1, ..Default::default() };
    let endpoint = admin.create_endpoint(create).await.unwrap().into_inner().endpoint.unwrap().id;
    let file = upload(&mut ana, lines(2)).await;
    let request = pb::CreateBatchRequest { webhook_endpoint_id: endpoint.clone(), ..of_file(&file) };
    let batch = ana.create_batch(request).await.unwrap().into_inner().id;
    server.run_batch(&batch, 1).await;
    let batch = ana.get_batch(crate::support::get(&batch)).await.unwrap().into_inner();
    // What a deliverer does with a receiver that refuses.
    let store = &server.store;
    let claimed = store.claim_deliveries(&[ClaimShare::new("ana", target_of(URL), 10)]).await.unwrap();
    let settlements: Vec<Settlement> = claimed
        .iter()
        .map(|claim| Settlement {
            id: claim.id.clone(),
            lease: claim.lease.clone(),
            attempt: claim.attempt,
            result: Some(refused()),
            wait: Duration::ZERO,
        })
        .collect();
    store.settle_deliveries(&settlements).await.unwrap();
    let scope = Scope::Of(Owner::named("ana"));
    let delivery = store.deliveries(&DeliveryFilter::within(scope.clone()), None, 1).await.unwrap().remove(0).id;
    let dead = store.dead_letters(&DeadLetterFilter::within(scope), None, 1).await.unwrap().remove(0).id;
    let job = admin.retry_dead_letters(pb::RetryDeadLettersRequest::default()).await.unwrap().into_inner().job.unwrap();
    Hers {
        ids: vec![
            ("batch_id", batch.id),
            ("file_id", file.id),
            ("endpoint_id", endpoint),
            ("delivery_id", delivery.into_string()),
            ("dead_letter_id", dead.into_string()),
            ("retry_job_id", job.id),
        ],
        output_file: batch.output_file_id,
        error_file: batch.error_file_id,
    }
}

fn refused() -> AttemptResult {
    AttemptResult {
        error: Some(AttemptError { kind: ErrorKind::Status, message: "500".into() }),
        http_status: Some(500),
        response_excerpt: None,
    }
}

/// The methods of the services.
fn methods() -> Vec<MethodDescriptor> {
    let pool = DescriptorPool::decode(pb::FILE_DESCRIPTOR_SET).unwrap();
    let services = pool.services().filter(|service| service.package_name() == "tidemill.v1");
    services.flat_map(|service| service.methods().collect::<Vec<_>>()).collect()
}

/// The fields of a method's request that name something.
fn ids(method: &MethodDescriptor) -> Vec<FieldDescriptor> {
    let names = |field: &FieldDescriptor| field.name().ends_with("_id") && field.name() != "request_id";
    method.input().fields().filter(names).collect()
}

/// A request that is good but for what it names.
fn request(method: &MethodDescriptor, named: Option<(&FieldDescriptor, &str)>) -> Vec<u8> {
    let mut message = DynamicMessage::new(method.input());
    for field in method.input().fields() {
        match (field.name(), field.kind()) {
            ("older_than", Kind::Message(span)) => {
                message.set_field(&field, Value::Message(DynamicMessage::new(span)));
            }
            ("url", Kind::String) => message.set_field(&field, Value::String(URL.into())),
            _ => {}
        }
    }
    if method.name() == "CreateBatch" && named.is_none_or(|(field, _)| field.name() != "input_file_id") {
        message.transcode_from(&inline(1)).unwrap();
    }
    if let Some((field, id)) = named {
        message.set_field(field, Value::String(id.to_owned()));
    }
    message.encode_to_vec()
}

/// An error as its client sees it, without the id that it was asked for.
fn said(status: &Status, id: &str) -> (Code, String, String, Vec<String>) {
    let hide = |text: &str| text.replace(id, "ID");
    let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
    let fields = status.get_details_bad_request().map(|bad| bad.field_violations).unwrap_or_default();
    let fields = fields.iter().map(|one| hide(&format!("{}: {}", one.field, one.description))).collect();
    (status.code(), reason, hide(status.message()), fields)
}

/// Everything that ana sees of hers.
async fn seen_by_ana(server: &Server, hers: &Hers) -> Vec<String> {
    let mut seen = Vec::new();
    for method in methods() {
        let reads = method.name().starts_with("Get") || method.name().starts_with("List");
        // Of a worker nobody is the owner.
        if !reads || method.name() == "ListWorkers" {
            continue;
        }
        let field = ids(&method).into_iter().find(|_| method.name().starts_with("Get"));
        let named = field.as_ref().map(|field| (field, hers.of(field.name()).unwrap()));
        let answer = call(server.channel().await, &method, Some("ana"), vec![request(&method, named)]).await;
        seen.push(format!("{} {:?}", method.full_name(), answer.unwrap()));
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn another_owners_ids_are_as_good_as_none_in_every_rpc() {
    let server = Server::guarded().await;
    let hers = hers(&server).await;
    let before = seen_by_ana(&server, &hers).await;
    assert!(before.len() >= 10, "{before:?}");
    let (mut named, mut kinds) = (0, std::collections::BTreeSet::new());
    for method in methods() {
        let what = method.full_name().to_owned();
        for field in ids(&method) {
            if field.name() == "worker_id" {
                // Workers are nobody's. Only admins may change them.
                let answer = call(server.channel().await, &method, Some("bob"), vec![request(&method, None)]).await;
                assert_eq!(answer.unwrap_err().code(), Code::PermissionDenied, "{what}");
                continue;
            }
            let Some(id) = hers.of(field.name()) else { panic!("{what} names a {}: let ana have one", field.name()) };
            (named, _) = (named + 1, kinds.insert(field.name().to_owned()));
            let no_such = "no-such-id";
            let answers = [id, no_such].map(async |id| {
                let message = request(&method, Some((&field, id)));
                call(server.channel().await, &method, Some("bob"), vec![message]).await
            });
            let [foreign, unknown] = answers;
            match (foreign.await, unknown.await) {
                (Err(foreign), Err(unknown)) => {
                    assert_eq!(said(&foreign, id), said(&unknown, no_such), "{what} {}", field.name());
                    // A field of a new batch that names nothing is a bad field.
                    let wanted =
                        if field.name() == "webhook_endpoint_id" { Code::InvalidArgument } else { Code::NotFound };
                    assert_eq!(foreign.code(), wanted, "{what} {}: {foreign:?}", field.name());
                }
                // A filter that nothing passes.
                (Ok(foreign), Ok(unknown)) => {
                    let filters = method.name().starts_with("List") || method.name() == "RetryDeadLetters";
                    assert!(filters, "{what} takes {} of another owner", field.name());
                    if method.name().starts_with("List") {
                        assert_eq!(foreign, unknown, "{what} {}", field.name());
                    }
                    let found = hers.all().find(|one| tells(&foreign, one));
                    assert_eq!(found, None, "{what} {}", field.name());
                }
                (foreign, unknown) => panic!("{what} {}: {foreign:?} but {unknown:?}", field.name()),
            }
        }
    }
    assert!(named >= 20, "{named} fields");
    assert_eq!(kinds.len(), 8, "{kinds:?}");
    assert_eq!(seen_by_ana(&server, &hers).await, before, "nothing of hers has changed");
}

fn tells(answers: &[Vec<u8>], id: &str) -> bool {
    answers.iter().any(|answer| answer.windows(id.len()).any(|window| window == id.as_bytes()))
}

#[tokio::test(flavor = "multi_thread")]
async fn no_rpc_without_a_name_tells_or_takes_what_is_another_owners() {
    let server = Server::guarded().await;
    let hers = hers(&server).await;
    // So that a watch of all batches has something to tell.
    let own = server.client_of(Some("bob")).await.create_batch(inline(1)).await.unwrap().into_inner().id;
    let before = seen_by_ana(&server, &hers).await;
    for method in methods() {
        let answer = call(server.channel().await, &method, Some("bob"), vec![request(&method, None)]).await;
        let answers = answer.unwrap_or_default();
        let found = hers.all().find(|id| tells(&answers, id));
        assert_eq!(found, None, "{}", method.full_name());
        if matches!(method.name(), "ListBatches" | "WatchBatches") {
            assert!(tells(&answers, &own), "{} tells bob of his own", method.full_name());
        }
    }
    assert_eq!(seen_by_ana(&server, &hers).await, before, "nothing of hers has changed");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_owners_ids_are_as_good_as_none_on_every_http_path() {
    let server = Server::guarded().await;
    let hers = hers(&server).await;
    let (batch, file) = (hers.of("batch_id").unwrap(), hers.of("file_id").unwrap());
    let http = reqwest::Client::new();
    let before = seen_by_ana(&server, &hers).await;
    let call = async |method: reqwest::Method, path: &str, token: &str| {
        let answer = http.request(method, server.url(path)).bearer_auth(token).send().await.unwrap();
        let status = answer.status().as_u16();
        (status, answer.text().await.unwrap())
    };
    let (get, post, delete) = (reqwest::Method::GET, reqwest::Method::POST, reqwest::Method::DELETE);
    let paths = [
        (&get, "/v1/files/ID", file),
        (&get, "/v1/files/ID/content", file),
        (&get, "/v1/files/ID/content", &hers.output_file),
        (&get, "/v1/files/ID/content", &hers.error_file),
        (&get, "/v1/batches/ID", batch),
        (&get, "/v1/batches/ID/events", batch),
        (&get, "/v1/batches/ID/output", batch),
        (&get, "/v1/batches/ID/results", batch),
        (&get, "/v1/batches/ID/errors", batch),
        (&delete, "/v1/files/ID", file),
        (&delete, "/v1/files/ID", &hers.output_file),
        (&post, "/v1/batches/ID/cancel", batch),
        (&delete, "/v1/batches/ID", batch),
    ];
    for (method, path, id) in paths {
        if *method == get {
            assert_eq!(call(method.clone(), &path.replace("ID", id), "ana").await.0, 200, "{path}");
        }
        let (status, foreign) = call(method.clone(), &path.replace("ID", id), "bob").await;
        let (_, unknown) = call(method.clone(), &path.replace("ID", "no-such-id"), "bob").await;
        let what = format!("{method} {path}");
        assert_eq!((status, foreign.replace(id, "ID")), (404, unknown.replace("no-such-id", "ID")), "{what}");
    }
    // An upload in parts.
    let body = r#"{"bytes":2,"filename":"f","mime_type":"text/jsonl","purpose":"batch"}"#;
    let announced = http.post(server.url("/v1/uploads")).bearer_auth("ana").body(body).send().await.unwrap();
    let announced: serde_json::Value = serde_json::from_str(&announced.text().await.unwrap()).unwrap();
    let upload = announced["id"].as_str().unwrap();
    let form = "--b\r\ncontent-disposition: form-data; name=\"data\"\r\n\r\n{}\r\n--b--\r\n";
    let send = async |end: &str, id: &str, token: &str| {
        let request = http.post(server.url(&format!("/v1/uploads/{id}/{end}"))).bearer_auth(token);
        let request = match end {
            "parts" => request.header("content-type", "multipart/form-data; boundary=b").body(form),
            _ => request.body(r#"{"part_ids":["part_x"]}"#),
        };
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap().replace(id, "ID"))
    };
    assert_eq!(send("parts", upload, "ana").await.0, 200);
    for end in ["parts", "complete", "cancel"] {
        let foreign = send(end, upload, "bob").await;
        assert_eq!((foreign.0, &foreign), (404, &send(end, "no-such-id", "bob").await), "{end}");
    }
    assert_eq!(send("cancel", upload, "ana").await.0, 200, "it was still there");
    // A file in the body, and ids to go on after.
    let create = async |id: &str| {
        let body = format!(r#"{{"input_file_id":"{id}","endpoint":"/v1/chat/completions","completion_window":"24h"}}"#);
        let request = http.post(server.url("/v1/batches")).bearer_auth("bob").body(body);
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap().replace(id, "ID"))
    };
    assert_eq!(create(file).await, create("no-such-id").await);
    for list in [format!("/v1/files?after={file}"), format!("/v1/batches?after={batch}"), "/v1/files".into()] {
        let (status, text) = call(get.clone(), &list, "bob").await;
        assert_eq!(status, 200, "{list}: {text}");
        assert_eq!(hers.all().find(|id| text.contains(id)), None, "{list}");
    }
    assert_eq!(seen_by_ana(&server, &hers).await, before, "nothing of hers has changed");
}
