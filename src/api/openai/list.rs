//! Lists as OpenAI writes them.

use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

pub(super) use crate::api::v1::query::Query;

/// One page of a list.
pub(super) fn page(data: &[Value], has_more: bool) -> Response {
    let id = |item: Option<&Value>| item.map(|item| item["id"].clone());
    let (first_id, last_id) = (id(data.first()), id(data.last()));
    let list = json!({"object": "list", "data": data, "has_more": has_more, "first_id": first_id, "last_id": last_id});
    axum::Json(list).into_response()
}
