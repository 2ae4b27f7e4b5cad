//! The queries of lists.

use axum::extract::FromRequestParts;
use http::request::Parts;
use serde_json::Value;

use super::problem::Problem;

/// The query of a list, by name. Names that nobody knows are ignored.
pub(in crate::api) struct Query(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(Self::parse(parts.uri.query().unwrap_or_default()))
    }
}

impl Query {
    fn parse(text: &str) -> Self {
        Self(url::form_urlencoded::parse(text.as_bytes()).into_owned().collect())
    }

    /// The first value of that name.
    pub(in crate::api) fn get(&self, name: &str) -> Option<String> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    }

    /// How many items are wanted, 1 to `most`.
    ///
    /// # Errors
    /// [`Problem`].
    pub(in crate::api) fn limit(&self, default: u64, most: u64) -> Result<u64, Problem> {
        let Some(text) = self.get("limit") else { return Ok(default) };
        let Ok(limit) = text.parse::<i64>() else {
            return Err(Problem::kind("limit", "an integer", &Value::from(text)));
        };
        let wrong = |code, bound| {
            let message = format!("Invalid 'limit': integer {bound}, but got {limit} instead.");
            Problem::invalid(code, "limit", message)
        };
        match u64::try_from(limit) {
            Ok(limit) if (1..=most).contains(&limit) => Ok(limit),
            Ok(limit) if limit > most => {
                Err(wrong("integer_above_max_value", format!("above maximum value. Expected a value <= {most}")))
            }
            _ => Err(wrong("integer_below_min_value", "below minimum value. Expected a value >= 1".to_owned())),
        }
    }

    /// The id after which to go on. It need not be anybody's, as what it names may have been deleted: ids sort by age.
    ///
    /// # Errors
    /// [`Problem`]: it can't be an id.
    pub(in crate::api) fn after(&self, prefix: &str) -> Result<Option<String>, Problem> {
        self.id("after", prefix)
    }

    /// The id in a field of that name.
    ///
    /// # Errors
    /// [`Problem`]: it can't be an id.
    pub(in crate::api) fn id(&self, name: &str, prefix: &str) -> Result<Option<String>, Problem> {
        let Some(id) = self.get(name).filter(|id| !id.is_empty()) else { return Ok(None) };
        let digits = id.strip_prefix(prefix).filter(|digits| digits.len() == 32);
        if digits.is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit())) {
            return Ok(Some(id));
        }
        let message = format!("Invalid '{name}': {:?} is no id of this list.", crate::service::short(&id));
        Err(Problem::invalid("invalid_value", name, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_has_its_bounds() {
        let limit = |text: &str| Query::parse(text).limit(20, 100).map_err(|problem| problem.object()["code"].clone());
        assert_eq!((limit(""), limit("limit=1"), limit("x=1&limit=100")), (Ok(20), Ok(1), Ok(100)));
        assert_eq!(limit("limit=0"), Err("integer_below_min_value".into()));
        assert_eq!(limit("limit=-1"), Err("integer_below_min_value".into()));
        assert_eq!(limit("limit=101"), Err("integer_above_max_value".into()));
        for bad in ["limit=", "limit=a", "limit=1.5", "limit=99999999999999999999"] {
            assert_eq!(limit(bad), Err("invalid_type".into()), "{bad}");
        }
    }

    #[test]
    fn after_is_an_id() {
        let id = format!("batch_{}", "0".repeat(32));
        let after = |text: &str| Query::parse(&format!("after={text}")).after("batch_");
        assert_eq!(after(&id), Ok(Some(id.clone())));
        assert_eq!(after(""), Ok(None));
        for bad in ["2", "batch_x", "file-00000000000000000000000000000000", "batch_%00"] {
            assert!(after(bad).is_err(), "{bad}");
        }
    }
}
