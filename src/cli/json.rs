//! Messages as JSON, similar to protobuf's own mapping: field names as in the proto, enum values without their prefix,
//! times in RFC 3339, durations in seconds ("30s"). Unlike in that mapping, 64-bit numbers stay numbers, bytes are the
//! JSON or text that they hold, and a field that is not set is left out or written as `null` or `""`.
//!
//! The fields are those of the compiled protos, so a new one is printed without a change here.

use std::{
    sync::LazyLock,
    time::{Duration, SystemTime},
};

use prost_reflect::{
    DescriptorPool, DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage,
};
use serde_json::{Map, Value, json};

use crate::pb;

/// The start of the year 10000, which RFC 3339 can't express.
const YEAR_10000: Duration = Duration::from_secs(253_402_300_800);
/// Never shown, even if a server sent it. (A secret that was just made is another field, and is shown.)
const SECRET: &str = "tidemill.v1.WebhookConfig.secret";
/// Written as zeros if they are not set.
const ZEROS: [&str; 2] = ["tidemill.v1.RequestCounts", "tidemill.v1.TokenUsage"];
/// Zero means that it is not set.
const NO_LINE: &str = "tidemill.v1.BatchError.line";

static POOL: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(pb::FILE_DESCRIPTOR_SET).expect("the build script has compiled them"));

/// A message that commands print.
pub trait Shown: prost::Message {
    /// The message's full name in the protos.
    const NAME: &'static str;
    /// Whether fields that are not set are written.
    const ALL: bool;
}

macro_rules! shown {
    ($($all:literal: $($message:ident),+;)+) => {
        $($(impl Shown for pb::$message {
            const NAME: &'static str = concat!("tidemill.v1.", stringify!($message));
            const ALL: bool = $all;
        })+)+
        #[cfg(test)]
        const SHOWN: &[(&str, bool)] = &[$($((<pb::$message as Shown>::NAME, $all)),+),+];
    };
}

shown! {
    false: File, Batch, BatchEvent, Worker, RequestStages;
    true: BatchResult, InferResponse, DeadLetter, Delivery, WebhookEndpoint, RetryJob, RetryDeadLetterResponse,
        RetryDeadLettersResponse, PurgeDeadLettersResponse, CreateEndpointResponse, RotateSecretResponse,
        SendTestEventResponse;
}

/// The message as JSON.
#[must_use]
pub fn of<M: Shown>(message: &M) -> Value {
    let descriptor = POOL.get_message_by_name(M::NAME).expect("every message that is generated is compiled");
    let bytes = message.encode_to_vec();
    let message = DynamicMessage::decode(descriptor, bytes.as_slice()).expect("it was just encoded");
    object(&message, M::ALL)
}

/// All of these.
#[must_use]
pub fn list<M: Shown>(messages: &[M]) -> Value {
    messages.iter().map(of).collect()
}

fn object(message: &DynamicMessage, all: bool) -> Value {
    let descriptor = message.descriptor();
    let mut fields = Map::new();
    for field in descriptor.fields().filter(|field| field.full_name() != SECRET) {
        let is_choice = field.containing_oneof().is_some_and(|choice| !choice.is_synthetic());
        if is_choice && !message.has_field(&field) {
            continue;
        }
        let value = value(message, &field, all);
        if all || !(value.is_null() || value == "") {
            fields.insert(field.name().to_owned(), value);
        }
    }
    let is_chosen = |fields: &[FieldDescriptor]| fields.iter().any(|field| message.has_field(field));
    for choice in descriptor.oneofs().filter(|choice| !choice.is_synthetic()) {
        if !is_chosen(&choice.fields().collect::<Vec<_>>()) {
            // From a newer server.
            fields.insert("unknown".to_owned(), json!({}));
        }
    }
    Value::Object(fields)
}

fn value(message: &DynamicMessage, field: &FieldDescriptor, all: bool) -> Value {
    if field.supports_presence() && !message.has_field(field) {
        return match field.kind() {
            Kind::Message(kind) if ZEROS.contains(&kind.full_name()) => object(&DynamicMessage::new(kind), all),
            _ => Value::Null,
        };
    }
    let set = message.get_field(field);
    match &*set {
        prost_reflect::Value::I64(0) if field.full_name() == NO_LINE => Value::Null,
        set => one(set, &field.kind(), all),
    }
}

fn one(value: &prost_reflect::Value, kind: &Kind, all: bool) -> Value {
    use prost_reflect::Value as Of;
    match value {
        Of::Bool(value) => json!(value),
        Of::I32(value) => json!(value),
        Of::I64(value) => json!(value),
        Of::U32(value) => json!(value),
        Of::U64(value) => json!(value),
        Of::F32(value) => json!(value),
        Of::F64(value) => json!(value),
        Of::String(value) => json!(value),
        Of::Bytes(value) => json_or_text(value),
        Of::EnumNumber(number) => match kind {
            Kind::Enum(kind) => json!(bare(kind, *number)),
            _ => json!(number),
        },
        Of::Message(message) => match message.descriptor().full_name() {
            "google.protobuf.Timestamp" => json!(time(message.transcode_to().ok().as_ref())),
            "google.protobuf.Duration" => json!(seconds(message.transcode_to().ok().as_ref())),
            _ => object(message, all),
        },
        Of::List(values) => values.iter().map(|value| one(value, kind, all)).collect(),
        Of::Map(entries) => {
            let of_value = map_value(kind);
            let entries = entries.iter().map(|(key, value)| (text(key), one(value, &of_value, all)));
            Value::Object(entries.collect())
        }
    }
}

/// The kind of a map's values; `kind` is that of its entries.
fn map_value(kind: &Kind) -> Kind {
    let entry = kind.as_message().map(MessageDescriptor::map_entry_value_field);
    entry.map_or_else(|| kind.clone(), |field| field.kind())
}

fn text(key: &MapKey) -> String {
    match key {
        MapKey::Bool(key) => key.to_string(),
        MapKey::I32(key) => key.to_string(),
        MapKey::I64(key) => key.to_string(),
        MapKey::U32(key) => key.to_string(),
        MapKey::U64(key) => key.to_string(),
        MapKey::String(key) => key.clone(),
    }
}

/// An enum's value without the prefix that all its values have; one that is not known here is "UNSPECIFIED".
fn bare(kind: &EnumDescriptor, number: i32) -> String {
    let none = kind.default_value();
    let prefix = none.name().strip_suffix("UNSPECIFIED").unwrap_or_default().to_owned();
    let value = kind.get_value(number).unwrap_or(none);
    let name = value.name();
    name.strip_prefix(&*prefix).unwrap_or(name).to_owned()
}

/// Lines of results and bodies of answers: JSON, unless a worker has answered something else.
fn json_or_text(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|_| String::from_utf8_lossy(bytes).into())
}

/// A timestamp as RFC 3339 in UTC. `None` if it is not set or outside of the years 1970 to 9999.
#[must_use]
pub fn time(time: Option<&prost_types::Timestamp>) -> Option<String> {
    let time = SystemTime::try_from(*time?).ok()?;
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    if since >= YEAR_10000 {
        return None;
    }
    Some(humantime::format_rfc3339_micros(time).to_string())
}

/// A duration. `None` if it is not set or negative, which no server sends.
#[must_use]
pub fn duration(span: Option<&prost_types::Duration>) -> Option<Duration> {
    Duration::try_from(*span?).ok()
}

fn seconds(span: Option<&prost_types::Duration>) -> Option<String> {
    duration(span).map(|span| format!("{}s", span.as_secs_f64()))
}

/// A batch's state, such as "COMPLETED".
#[must_use]
pub fn batch_status(status: i32) -> &'static str {
    let name = pb::BatchStatus::try_from(status).unwrap_or_default().as_str_name();
    name.strip_prefix("BATCH_STATUS_").unwrap_or(name)
}

/// A worker's state, such as "HEALTHY".
#[must_use]
pub fn worker_state(state: i32) -> &'static str {
    let name = pb::WorkerState::try_from(state).unwrap_or_default().as_str_name();
    name.strip_prefix("WORKER_STATE_").unwrap_or(name)
}

#[cfg(test)]
mod tests;
