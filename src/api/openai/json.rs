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
    // What is beyond the range is so for the service, too, which says what the range is.
    let number = whole(value).map(|number| number.clamp(i32::MIN.into(), i32::MAX.into()));
    let number = number.and_then(|number| i32::try_from(number).ok());
    number.map(Some).ok_or_else(|| Problem::kind(param, "an integer", value))
}

/// A whole number, or the end of the range on whose side it lies beyond 64 bits: the service says what is too much. Such a
/// number is read as a decimal one.
#[allow(clippy::cast_possible_truncation)] // it saturates
pub(super) fn whole(value: &Value) -> Option<i64> {
    match (value.as_i64(), value.as_f64()) {
        (Some(whole), _) => Some(whole),
        (None, Some(number)) if number.abs() >= 2_f64.powi(63) => Some(number as i64),
        (None, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_beyond_64_bits_is_whole_and_out_of_range() {
        let of = |text: &str| whole(&serde_json::from_str(text).unwrap());
        assert_eq!((of("7"), of("-9223372036854775808")), (Some(7), Some(i64::MIN)));
        for huge in ["9223372036854775808", "18446744073709551615", "1180591620717411303424", "1e300"] {
            assert_eq!(of(huge), Some(i64::MAX), "{huge}");
        }
        assert_eq!(of("-1180591620717411303424"), Some(i64::MIN));
        for other in ["1.5", "1.0", "\"7\"", "null", "[7]"] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
