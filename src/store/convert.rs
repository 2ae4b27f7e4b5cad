//! Converts rows to domain types. A row that does not convert was not written by tidemill: [`StoreError::Corrupt`].

use std::{collections::BTreeSet, str::FromStr, time::Duration};

use parking_lot::Mutex;

use super::{StoreError, entity};
use crate::domain::{
    Batch, BatchId, BatchStatus, Counts, File, FileId, FileKind, Priority, Revision, Timestamp, TokenUsage,
    WebhookEndpointId, batch::StateTimes, lifecycle::Ending,
};

fn corrupt(what: &str, value: &str) -> StoreError {
    StoreError::Corrupt(format!("an unknown {what} {value:?}"))
}

/// Rows already named in the log. Each is named once, because a row that is read repeatedly would fill the log.
static NAMED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
/// The most rows remembered.
const MOST_NAMED: usize = 1_000;

/// Handles one row among others. A row that can't be read (it may be a newer version's) is named in the log and left
/// out, so that it does not hide the others.
pub(super) fn readable<T>(what: &str, id: &str, read: Result<T, StoreError>) -> Option<T> {
    match read {
        Ok(read) => Some(read),
        Err(error) => {
            let mut named = NAMED.lock();
            if named.len() < MOST_NAMED && named.insert(format!("{what} {id}")) {
                tracing::error!(what, id, %error, "a row can't be read; it is left out");
            }
            None
        }
    }
}

pub(super) fn json<T: serde::de::DeserializeOwned>(what: &str, text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|_| corrupt(what, text))
}

pub(super) fn to_json<T: serde::Serialize + ?Sized>(value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|error| StoreError::Corrupt(error.to_string()))
}

/// The variant of an enum that has this name.
pub(super) fn name<T: FromStr>(what: &str, text: &str) -> Result<T, StoreError> {
    text.parse().map_err(|_| corrupt(what, text))
}

pub(super) fn status(text: &str) -> Result<BatchStatus, StoreError> {
    name("batch status", text)
}

/// A duration as stored: microseconds.
pub(super) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// A stored duration.
pub(super) fn duration(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

pub(super) fn ending(text: Option<&str>) -> Result<Option<Ending>, StoreError> {
    text.map(|text| Ending::from_error_code(text).ok_or_else(|| corrupt("ending", text))).transpose()
}

/// A stored checksum.
pub(super) fn checksum(value: Option<i64>) -> Option<u32> {
    value.and_then(|value| u32::try_from(value).ok())
}

impl TryFrom<entity::file::Model> for File {
    type Error = StoreError;

    fn try_from(row: entity::file::Model) -> Result<Self, StoreError> {
        let kind = match (row.kind.as_str(), row.batch_id) {
            ("input", _) => FileKind::Input,
            ("output", Some(batch)) => FileKind::Output(BatchId::from_text(batch)),
            ("error", Some(batch)) => FileKind::Error(BatchId::from_text(batch)),
            (other, _) => return Err(corrupt("file kind", other)),
        };
        let endpoint = row.endpoint.map(|path| path.parse().map_err(|_| corrupt("endpoint", &path))).transpose()?;
        Ok(Self {
            id: FileId::from_text(row.id),
            owner: row.owner.into(),
            kind,
            filename: row.filename,
            bytes: row.bytes,
            line_count: row.line_count,
            models: json("model list", &row.models)?,
            endpoint,
            created_at: Timestamp(row.created_at),
            expires_at: row.expires_at.map(Timestamp),
            object_key: row.object_key,
            crc32c: checksum(row.crc32c),
        })
    }
}

impl TryFrom<entity::batch::Model> for Batch {
    type Error = StoreError;

    fn try_from(row: entity::batch::Model) -> Result<Self, StoreError> {
        let usage = TokenUsage {
            input: row.input_tokens,
            cached_input: row.cached_input_tokens,
            output: row.output_tokens,
            reasoning: row.reasoning_tokens,
            total: row.total_tokens,
        };
        let times = StateTimes {
            in_progress: row.in_progress_at.map(Timestamp),
            finalizing: row.finalizing_at.map(Timestamp),
            completed: row.completed_at.map(Timestamp),
            failed: row.failed_at.map(Timestamp),
            expired: row.expired_at.map(Timestamp),
            cancelling: row.cancelling_at.map(Timestamp),
            cancelled: row.cancelled_at.map(Timestamp),
        };
        Ok(Self {
            id: BatchId::from_text(row.id),
            owner: row.owner.into(),
            status: status(&row.status)?,
            ending: ending(row.ending.as_deref())?,
            endpoint: row.endpoint.parse().map_err(|_| corrupt("endpoint", &row.endpoint))?,
            models: json("model list", &row.models)?,
            input_file_id: FileId::from_text(row.input_file_id),
            output_file_id: row.output_file_id.map(FileId::from_text),
            error_file_id: row.error_file_id.map(FileId::from_text),
            counts: Counts { total: row.total, completed: row.completed, failed: row.failed },
            not_run: row.not_run,
            usage,
            errors: json("error list", &row.errors)?,
            metadata: json("metadata", &row.metadata)?,
            priority: Priority::new(row.priority).ok_or_else(|| corrupt("priority", &row.priority.to_string()))?,
            completion_window: duration(row.completion_window),
            created_at: Timestamp(row.created_at),
            expires_at: Timestamp(row.expires_at),
            times,
            segments: row.segments,
            segments_done: row.segments_done,
            webhook: row.webhook.map(|text| json("webhook", &text)).transpose()?,
            webhook_endpoint_id: row.webhook_endpoint_id.map(WebhookEndpointId::from_text),
            revision: Revision(row.revision),
            output_expires_after: row.output_expires_after.map(duration),
        })
    }
}
