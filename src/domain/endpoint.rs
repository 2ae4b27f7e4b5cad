//! The API paths that requests may name.

use std::{fmt, str::FromStr};

use strum::{EnumCount, IntoStaticStr, VariantArray};

use super::variants;

/// An endpoint of a worker that batch requests may use. Messages list them in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EnumCount, VariantArray, IntoStaticStr)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    #[strum(serialize = "/v1/chat/completions")]
    ChatCompletions,
    /// `/v1/completions`
    #[strum(serialize = "/v1/completions")]
    Completions,
    /// `/v1/embeddings`
    #[strum(serialize = "/v1/embeddings")]
    Embeddings,
    /// `/v1/responses`
    #[strum(serialize = "/v1/responses")]
    Responses,
    /// `/v1/score`
    #[strum(serialize = "/v1/score")]
    Score,
    /// `/v1/rerank`
    #[strum(serialize = "/v1/rerank")]
    Rerank,
    /// `/v1/messages`, of Anthropic's API
    #[strum(serialize = "/v1/messages")]
    Messages,
}

impl Endpoint {
    /// All of them.
    pub const ALL: [Self; Self::COUNT] = variants();

    /// The path, from `/v1`.
    #[must_use]
    pub fn path(self) -> &'static str {
        self.into()
    }

    /// All paths as one text, for messages.
    #[must_use]
    pub fn list() -> String {
        Self::ALL.map(Self::path).join(", ")
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.path())
    }
}

/// A path that no [`Endpoint`] has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown endpoint {0:?}; expected one of {list}", list = Endpoint::list())]
pub struct UnknownEndpoint(pub String);

impl FromStr for Endpoint {
    type Err = UnknownEndpoint;

    fn from_str(path: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|endpoint| endpoint.path() == path).ok_or_else(|| UnknownEndpoint(path.to_owned()))
    }
}
