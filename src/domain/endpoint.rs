//! The API paths that requests may name.

use std::{fmt, str::FromStr};

/// An endpoint of a worker that batch requests may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    ChatCompletions,
    /// `/v1/completions`
    Completions,
    /// `/v1/embeddings`
    Embeddings,
    /// `/v1/responses`
    Responses,
    /// `/v1/score`
    Score,
    /// `/v1/rerank`
    Rerank,
    /// `/v1/messages`, of Anthropic's API
    Messages,
}

impl Endpoint {
    /// All of them, in the order in which messages list them.
    pub const ALL: [Self; 7] = [
        Self::ChatCompletions,
        Self::Completions,
        Self::Embeddings,
        Self::Responses,
        Self::Score,
        Self::Rerank,
        Self::Messages,
    ];

    /// The path, from `/v1`.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::ChatCompletions => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
            Self::Responses => "/v1/responses",
            Self::Score => "/v1/score",
            Self::Rerank => "/v1/rerank",
            Self::Messages => "/v1/messages",
        }
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

/// A path that is none of [`Endpoint::ALL`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown endpoint {0:?}; expected one of {list}", list = Endpoint::list())]
pub struct UnknownEndpoint(pub String);

impl FromStr for Endpoint {
    type Err = UnknownEndpoint;

    fn from_str(path: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|endpoint| endpoint.path() == path).ok_or_else(|| UnknownEndpoint(path.to_owned()))
    }
}
