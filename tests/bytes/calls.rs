//! Calls with one odd text each.

use std::time::Duration;

use futures::StreamExt;
use http::HeaderValue;
use prost::Message;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, MethodDescriptor, Value,
};
use rand::{RngExt, rngs::StdRng, seq::IndexedRandom};
use tidemill::pb;
use tokio::time::timeout;
use tonic::{Code, Request, Status, metadata::MetadataMap, transport::Channel};
use tonic_types::StatusExt;

use crate::{
    Known,
    raw::{Raw, call, path_of},
};

/// No call takes so long.
const ANSWER: Duration = Duration::from_secs(300);
/// Odd texts for each field, besides NUL.
const EACH: usize = 5;
/// Calls at a time.
const AT_ONCE: usize = 8;
/// In a message this stands for bytes that are no UTF-8.
const NO_UTF8: &str = "QQQQ";
/// How deep messages in messages are looked at.
const DEEP: usize = 4;

/// Texts that somebody has tripped over before, and some by chance.
pub fn odd_texts(random: &mut StdRng) -> Vec<String> {
    let known = [
        "\0",
        "a\0b",
        "\u{1}\u{1f}\u{7f}\u{85}",
        "\r\n\t",
        "\u{1b}[31m",
        "\\ud800",
        "\\u0000",
        "{\"model\":\"\\ud800\"}",
        "\u{ffff}\u{fffe}",
        "\u{10ffff}",
        "\u{202e}txt\u{2066}",
        "\u{feff}bom",
        "é\u{301}\u{200d}",
        "' OR 1=1 --",
        "%00%",
        "../../etc/passwd",
        "http://127.0.0.1:1/\0",
        "http:127.0.0.1:1",
        "http:\\\\127.0.0.1:1/",
        " http://127.0.0.1:1/",
        "http://127.0.0.1:1/\u{202e}",
        "http://user:secret@127.0.0.1:1/",
        "-1",
        "",
    ];
    let mut all: Vec<String> = known.map(str::to_owned).into();
    all.push("x".repeat(64 * 1024));
    all.push("é".repeat(700));
    all.push("\u{0}".repeat(64));
    for _ in 0..4 {
        all.push((0..random.random_range(1..40)).map(|_| random.random::<char>()).collect());
    }
    all
}

/// Calls every RPC with odd text in every field that holds any. Returns the batches that were made.
pub async fn all_fields(channel: &Channel, known: &Known, random: &mut StdRng) -> Vec<String> {
    let pool = DescriptorPool::decode(pb::FILE_DESCRIPTOR_SET).unwrap();
    let texts = odd_texts(random);
    let mut calls = Vec::new();
    let mut methods = 0;
    for service in pool.services().filter(|service| service.package_name() == "tidemill.v1") {
        for method in service.methods() {
            methods += 1;
            let paths = paths(&method.input(), DEEP);
            for path in &paths {
                let chosen = texts.sample(random, EACH).cloned().chain(["\0".to_owned(), NO_UTF8.to_owned()]);
                calls.extend(chosen.map(|text| (method.clone(), path.clone(), text)));
            }
        }
    }
    assert!(methods > 20 && calls.len() > 300, "{methods} methods, {} calls", calls.len());
    let answers = futures::stream::iter(calls).map(|(method, path, text)| async move {
        let what = format!("{} with {text:.80?} in {}", method.full_name(), names(&path));
        let messages = messages(&method, &path, &text, known);
        let answers = timeout(ANSWER, call(channel.clone(), &method, None, messages)).await;
        let answers = answers.unwrap_or_else(|_| panic!("no answer to {what}"));
        match answers {
            Ok(answers) => answers,
            Err(status) => {
                assert!(is_fair(&status), "{what}: {status:?}");
                Vec::new()
            }
        }
        .into_iter()
        .filter(|_| method.output().full_name() == "tidemill.v1.Batch")
        .map(|bytes| pb::Batch::decode(&bytes[..]).unwrap().id)
        .collect::<Vec<_>>()
    });
    answers.buffer_unordered(AT_ONCE).concat().await
}

/// Headers that calls carry, with odd bytes.
pub async fn headers(channel: &Channel, known: &Known, random: &mut StdRng) {
    let names = ["authorization", "grpc-timeout", "traceparent", "tracestate", "x-request-id", "accept", "x-odd-bin"];
    let mut values: Vec<Vec<u8>> = vec![
        b"\xff\xfe\x80".to_vec(),
        b"\t".to_vec(),
        b"Bearer \xff".to_vec(),
        b"Bearer".to_vec(),
        b"00-ff-\x80-01".to_vec(),
        b"99999999999999999999S".to_vec(),
        b"0n".to_vec(),
        vec![b'x'; 4_000],
        Vec::new(),
    ];
    values.extend((0..8).map(|_| (0..random.random_range(1..60)).map(|_| random.random_range(0x20..=0xfe)).collect()));
    let pool = DescriptorPool::decode(pb::FILE_DESCRIPTOR_SET).unwrap();
    let service = pool.get_service_by_name("tidemill.v1.BatchService").unwrap();
    let method = service.methods().find(|method| method.name() == "GetBatch").unwrap();
    for name in names {
        for value in &values {
            let Ok(header) = HeaderValue::from_bytes(value) else { continue };
            let mut request = Request::new(pb::GetBatchRequest { batch_id: known.batch.clone() }.encode_to_vec());
            let mut headers = http::HeaderMap::new();
            headers.insert(name, header);
            *request.metadata_mut() = MetadataMap::from_headers(headers);
            let mut grpc = tonic::client::Grpc::new(channel.clone());
            grpc.ready().await.unwrap();
            let answer = timeout(ANSWER, grpc.unary(request, path_of(&method), Raw)).await.expect("it answers");
            if let Err(status) = answer {
                assert!(is_fair(&status), "{name}: {value:?}: {status:?}");
            }
        }
    }
}

/// Not the server's fault, and nothing that a client would try again for ever.
fn is_fair(status: &Status) -> bool {
    match status.code() {
        Code::Internal | Code::Unknown | Code::DataLoss => false,
        // Workers have no model of that name, or have answered nonsense.
        Code::Unavailable => status
            .get_details_error_info()
            .is_some_and(|info| matches!(info.reason.as_str(), "NO_WORKER" | "WORKER_FAILED")),
        _ => true,
    }
}

/// The way to a field that holds text, from its message down.
type Path = Vec<FieldDescriptor>;

fn names(path: &Path) -> String {
    path.iter().map(FieldDescriptor::name).collect::<Vec<_>>().join(".")
}

fn paths(message: &MessageDescriptor, deep: usize) -> Vec<Path> {
    let mut found = Vec::new();
    for field in message.fields() {
        match field.kind() {
            Kind::String | Kind::Bytes => found.push(vec![field]),
            Kind::Message(_) if field.is_map() => found.push(vec![field]),
            Kind::Message(inner) if deep > 0 && inner.package_name() == "tidemill.v1" => {
                found.extend(paths(&inner, deep - 1).into_iter().map(|path| [vec![field.clone()], path].concat()));
            }
            _ => {}
        }
    }
    found
}

/// What to send: all of it good but for one field.
fn messages(method: &MethodDescriptor, path: &Path, text: &str, known: &Known) -> Vec<Vec<u8>> {
    let mut message = good(&method.input(), known);
    put(&mut message, path, text, known);
    let odd = spoilt(message.encode_to_vec());
    if !method.is_client_streaming() {
        return vec![odd];
    }
    let spec = pb::FileSpec { filename: "in.jsonl".into(), purpose: "batch".into(), ..Default::default() };
    let payload = |payload| pb::UploadFileRequest { payload: Some(payload) }.encode_to_vec();
    let spec = payload(pb::upload_file_request::Payload::Spec(spec));
    let chunk = payload(pb::upload_file_request::Payload::Chunk(crate::line("\"a\"", "\"m\"").into()));
    match path[0].name() {
        "spec" => vec![odd, chunk],
        _ => vec![spec, odd],
    }
}

/// A message whose texts are all good, as far as any is needed.
fn good(of: &MessageDescriptor, known: &Known) -> DynamicMessage {
    let mut message = DynamicMessage::new(of.clone());
    for field in of.fields().filter(|field| !field.is_list() && !field.is_map()) {
        let text = match field.name() {
            "batch_id" => &known.batch,
            "file_id" | "input_file_id" => &known.file,
            "endpoint_id" => &known.endpoint,
            "url" => &known.hook,
            "endpoint" => "/v1/chat/completions",
            "purpose" => "batch",
            "custom_id" => "a",
            "body" => r#"{"model":"m","messages":[]}"#,
            _ => continue,
        };
        match field.kind() {
            Kind::String => message.set_field(&field, Value::String(text.to_owned())),
            Kind::Bytes => message.set_field(&field, Value::Bytes(text.to_owned().into())),
            _ => {}
        }
    }
    message
}

fn put(message: &mut DynamicMessage, path: &[FieldDescriptor], text: &str, known: &Known) {
    let (field, rest) = path.split_first().unwrap();
    let value = |kind: &Kind| match kind {
        Kind::Bytes => Value::Bytes(text.to_owned().into()),
        _ => Value::String(text.to_owned()),
    };
    if let Some(inner) = field.kind().as_message().filter(|_| field.is_map()).cloned() {
        let kind = inner.map_entry_value_field().kind();
        let pairs =
            [(MapKey::String(text.to_owned()), Value::String("v".into())), (MapKey::String("k".into()), value(&kind))];
        message.set_field(field, Value::Map(pairs.into_iter().collect()));
    } else if rest.is_empty() {
        let value = value(&field.kind());
        message.set_field(field, if field.is_list() { Value::List(vec![value]) } else { value });
    } else {
        let mut inner = good(field.kind().as_message().unwrap(), known);
        put(&mut inner, rest, text, known);
        let inner = Value::Message(inner);
        message.set_field(field, if field.is_list() { Value::List(vec![inner]) } else { inner });
    }
}

fn spoilt(mut message: Vec<u8>) -> Vec<u8> {
    let mark = NO_UTF8.as_bytes();
    for at in 0..message.len().saturating_sub(mark.len() - 1) {
        if message[at..].starts_with(mark) {
            message[at..at + mark.len()].copy_from_slice(b"\xff\xc0\x80\xfe");
        }
    }
    message
}
