//! Lists as one parameter of a statement.

use sea_orm::DatabaseBackend;

use super::{StoreError, convert::to_json};
use crate::domain::BatchId;

/// These ids as one parameter, so that the statement is the same for any number of them.
pub(super) fn ids_parameter(ids: &[BatchId]) -> Result<sea_orm::Value, StoreError> {
    Ok(to_json(&ids.iter().map(BatchId::as_str).collect::<Vec<_>>())?.into())
}

/// The SQL for the texts of such a parameter.
pub(super) fn texts_of(backend: DatabaseBackend, place: usize) -> String {
    match backend {
        DatabaseBackend::Sqlite => format!("(SELECT value FROM json_each(${place}))"),
        _ => format!("(SELECT value FROM json_array_elements_text(${place}::json) AS one(value))"),
    }
}
