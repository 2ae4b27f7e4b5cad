//! The models that the workers serve.

use std::collections::BTreeMap;

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{By, Id, Of, problem::Problem, shapes};
use crate::{
    access::Caller,
    fleet::WorkerState,
    service::{Service, short},
};

/// Each model once, by its name, with the time since when it is known here.
fn served(service: &Service, caller: &Caller) -> BTreeMap<String, i64> {
    let mut models: BTreeMap<String, i64> = BTreeMap::new();
    for worker in service.workers(caller) {
        match worker.state {
            WorkerState::Healthy | WorkerState::Draining => {}
            WorkerState::Starting | WorkerState::Down => continue,
        }
        let since = worker.created_at.unix_seconds();
        for model in worker.models {
            let first = models.entry(model).or_insert(since);
            *first = since.min(*first);
        }
    }
    models
}

pub(super) async fn list(State(service): Of, By(caller): By) -> Response {
    let models: Vec<Value> =
        served(&service, &caller).iter().map(|(id, created)| shapes::model(id, *created)).collect();
    axum::Json(json!({"object": "list", "data": models})).into_response()
}

pub(super) async fn show(State(service): Of, By(caller): By, Id(id): Id) -> Result<Response, Problem> {
    match served(&service, &caller).get(&id) {
        Some(created) => Ok(axum::Json(shapes::model(&id, *created)).into_response()),
        None => {
            let message = format!("The model '{}' does not exist or no healthy worker serves it now", short(&id));
            Err(Problem::new(StatusCode::NOT_FOUND, "model_not_found", message).on("model"))
        }
    }
}
