//! Fields of a JSON body.

use serde_json::{Map, Value};

use super::problem::Problem;

/// A field that is there and not null.
pub(super) fn given<'a>(of: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    of.get(name).filter(|value| !value.is_null())
}

/// A text that must be there.
///
/// # Errors
/// [`Problem`].
pub(super) fn required<'a>(of: &'a Map<String, Value>, name: &str) -> Result<&'a str, Problem> {
    text(of, name)?.ok_or_else(|| Problem::missing(name))
}

/// A text, if it is there.
///
/// # Errors
/// [`Problem`]: it is something else.
pub(super) fn text<'a>(of: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, Problem> {
    match given(of, name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(Problem::kind(name, "a string", other)),
    }
}

/// A small integer, if it is there. `param`: its full name.
///
/// # Errors
/// [`Problem`]: it is something else.
pub(super) fn integer(of: &Map<String, Value>, name: &str, param: &str) -> Result<Option<i32>, Problem> {
    let Some(value) = given(of, name) else { return Ok(None) };
    let number = value.as_i64().and_then(|number| i32::try_from(number).ok());
    number.map(Some).ok_or_else(|| Problem::kind(param, "an integer", value))
}
