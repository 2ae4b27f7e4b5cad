//! Converts domain types to wire types.

use tonic::Status;

pub(super) use super::times::{span, time, timestamp};
use super::webhooks::webhook_to_proto;
use crate::{
    domain::{Batch, BatchStatus, Counts, File, TokenUsage, WebhookEndpointId},
    fleet::{WorkerState, WorkerView},
    pb,
    progress::{Event, EventKind, Progress},
    results::ResultLine,
    scheduler::{Stage, Stages},
    service::{Code, Service, ServiceError, batches::Shown},
};

pub(super) fn file(of: File) -> pb::File {
    pb::File {
        id: of.id.into_string(),
        purpose: of.kind.purpose().to_owned(),
        filename: of.filename,
        bytes: of.bytes,
        line_count: of.line_count,
        models: of.models,
        create_time: Some(timestamp(of.created_at)),
        expire_time: time(of.expires_at),
        endpoint: of.endpoint.map(|endpoint| endpoint.path().to_owned()).unwrap_or_default(),
        owner: of.owner.into_string(),
    }
}

fn batch_status(of: BatchStatus) -> pb::BatchStatus {
    match of {
        BatchStatus::Validating => pb::BatchStatus::Validating,
        BatchStatus::InProgress => pb::BatchStatus::InProgress,
        BatchStatus::Finalizing => pb::BatchStatus::Finalizing,
        BatchStatus::Completed => pb::BatchStatus::Completed,
        BatchStatus::Failed => pb::BatchStatus::Failed,
        BatchStatus::Expired => pb::BatchStatus::Expired,
        BatchStatus::Cancelling => pb::BatchStatus::Cancelling,
        BatchStatus::Cancelled => pb::BatchStatus::Cancelled,
    }
}

fn counts(of: Counts) -> pb::RequestCounts {
    pb::RequestCounts { total: of.total, completed: of.completed, failed: of.failed }
}

fn usage(of: TokenUsage) -> pb::TokenUsage {
    pb::TokenUsage {
        input_tokens: of.input,
        cached_input_tokens: of.cached_input,
        output_tokens: of.output,
        reasoning_tokens: of.reasoning,
        total_tokens: of.total,
    }
}

fn progress(of: Progress) -> pb::BatchProgress {
    pb::BatchProgress {
        request_counts: Some(counts(of.counts)),
        usage: Some(usage(of.usage)),
        requests_per_second: of.rates.requests_per_second,
        output_tokens_per_second: of.rates.output_tokens_per_second,
        eta: of.eta.map(span),
        queue_position: of.queue_position,
        waiting_reason: of.waiting_reason.unwrap_or_default(),
    }
}

pub(super) fn shown(of: Shown, service: &Service) -> pb::Batch {
    batch(of.batch, Some(of.progress), service)
}

/// A batch. Without `known` progress, that of its own counts.
fn batch(of: Batch, known: Option<Progress>, service: &Service) -> pb::Batch {
    let webhook = of.webhook.as_ref().map(|webhook| webhook_to_proto(webhook, service));
    let known = known.unwrap_or_else(|| Progress { counts: of.counts, usage: of.usage, ..Progress::default() });
    let text = |id: Option<crate::domain::FileId>| id.map(crate::domain::FileId::into_string).unwrap_or_default();
    pb::Batch {
        output_expire_time: time(of.output_expires_at()),
        owner: of.owner.into_string(),
        id: of.id.into_string(),
        status: batch_status(of.status).into(),
        endpoint: of.endpoint.path().to_owned(),
        models: of.models,
        input_file_id: of.input_file_id.into_string(),
        output_file_id: text(of.output_file_id),
        error_file_id: text(of.error_file_id),
        request_counts: Some(counts(of.counts)),
        usage: Some(usage(of.usage)),
        errors: of
            .errors
            .into_iter()
            .map(|error| pb::BatchError {
                code: error.code,
                message: error.message,
                line: error.line,
                param: error.param,
            })
            .collect(),
        metadata: of.metadata,
        priority: of.priority.value(),
        completion_window: Some(span(of.completion_window)),
        create_time: Some(timestamp(of.created_at)),
        in_progress_time: time(of.times.in_progress),
        finalizing_time: time(of.times.finalizing),
        completed_time: time(of.times.completed),
        failed_time: time(of.times.failed),
        expired_time: time(of.times.expired),
        cancelling_time: time(of.times.cancelling),
        cancelled_time: time(of.times.cancelled),
        expire_time: Some(timestamp(of.expires_at)),
        waiting_reason: known.waiting_reason.clone().unwrap_or_default(),
        progress: Some(progress(known)),
        webhook,
        webhook_endpoint_id: of.webhook_endpoint_id.map(WebhookEndpointId::into_string).unwrap_or_default(),
        revision: of.revision.0,
    }
}

pub(super) fn event(of: Event, service: &Service) -> pb::BatchEvent {
    use pb::batch_event::Event as Wire;
    pb::BatchEvent {
        batch_id: of.batch.map(crate::domain::BatchId::into_string).unwrap_or_default(),
        revision: of.revision.0,
        event_time: Some(timestamp(of.at)),
        sequence: of.sequence.0,
        event: Some(match of.kind {
            EventKind::StateChanged { batch: of, progress } => {
                Wire::StateChanged(batch(*of, progress.map(|progress| *progress), service))
            }
            EventKind::Progress(of) => Wire::Progress(progress(*of)),
            EventKind::Heartbeat => Wire::Heartbeat(pb::Heartbeat {}),
        }),
    }
}

/// A result, if it fits into a message of this many bytes.
pub(super) fn result(of: ResultLine, most: usize) -> Result<pb::BatchResult, Status> {
    let cursor = of.cursor.to_string();
    if of.line.len() > most - 4_096 {
        let message = format!(
            "the result of line {} is {} bytes long, more than a message of {most} bytes can carry: ask with a larger \
             max_message_bytes, or take it from the output file and go on after the cursor in this error's details",
            of.line_number,
            of.line.len()
        );
        let facts = Box::new([("cursor", cursor), ("custom_id", of.custom_id)]);
        let error = ServiceError::new(Code::ResourceExhausted, "RESULT_TOO_LARGE", message);
        return Err(ServiceError { facts, ..error }.into());
    }
    Ok(pb::BatchResult {
        custom_id: of.custom_id,
        cursor,
        line_number: of.line_number,
        succeeded: of.succeeded,
        line: of.line,
    })
}

pub(super) fn worker(of: WorkerView) -> pb::Worker {
    let state = match of.state {
        WorkerState::Starting => pb::WorkerState::Starting,
        WorkerState::Healthy => pb::WorkerState::Healthy,
        WorkerState::Draining => pb::WorkerState::Draining,
        WorkerState::Down => pb::WorkerState::Down,
    };
    let count = |value: u32| i32::try_from(value).unwrap_or(i32::MAX);
    let load = of.load.unwrap_or_default();
    let complaint = of.complaints.into_iter().next().map(|complaint| match complaint.model {
        Some(model) => format!("asked for the model {model:?}, it {}", complaint.what),
        None => complaint.what,
    });
    let last_error = of.last_error.or(complaint);
    pb::Worker {
        id: of.id.into_string(),
        url: of.url,
        models: of.models,
        state: state.into(),
        in_flight: count(of.in_flight),
        limit: count(of.limit),
        running: load.running,
        waiting: load.waiting,
        kv_cache_usage: load.kv_cache_usage,
        output_tokens_per_second: of.output_tokens_per_second,
        requests_per_second: of.requests_per_second,
        last_error: last_error.unwrap_or_default(),
        create_time: Some(timestamp(of.created_at)),
        reports_metrics: of.load.is_some(),
        prefix_hit_rate: of.prefix_hit_rate,
        request_time: of.request_time.map(span),
        health_path: of.health.path.map(|path| path.as_str().to_owned()).unwrap_or_default(),
        health_interval: of.health.interval.map(|interval| span(interval.span())),
    }
}

pub(super) fn stages(of: &Stages) -> pb::RequestStages {
    let mean = |stage: Stage| of.mean(stage).map(span);
    pb::RequestStages {
        queue: mean(Stage::Queue),
        dispatch: mean(Stage::Dispatch),
        worker: mean(Stage::Worker),
        persist: mean(Stage::Persist),
    }
}
