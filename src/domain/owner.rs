//! Owners of files, batches and endpoints, and which owners' rows a caller may see.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An owner: the name of the access token that created something. On a server without tokens it is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner(String);

impl Owner {
    pub fn named(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// The owner on a server without tokens.
    #[must_use]
    pub fn nobody() -> Self {
        Self::default()
    }

    /// Whether this is the owner on a server without tokens.
    #[must_use]
    pub fn is_nobody(&self) -> bool {
        self.0.is_empty()
    }

    /// The name, as it is stored.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name, owned.
    #[must_use]
    pub fn into_string(self) -> String {
        self.0
    }
}

impl From<&str> for Owner {
    fn from(name: &str) -> Self {
        Self::named(name)
    }
}

impl From<String> for Owner {
    fn from(name: String) -> Self {
        Self(name)
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The owners whose rows a call may read and change. Every query for a tenant's row takes a scope, so that no query can
/// omit the check.
///
/// Where it must outlive its call it is stored, as the owner's name or null.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Option<String>", into = "Option<String>")]
pub enum Scope {
    /// All owners' rows: for admins and for the engine itself.
    All,
    /// One owner's rows only.
    Of(Owner),
}

impl Scope {
    /// Whether the scope includes this owner's rows.
    #[must_use]
    pub fn sees(&self, owner: &Owner) -> bool {
        match self {
            Self::All => true,
            Self::Of(mine) => mine == owner,
        }
    }

    /// The only owner in the scope. `None`: all owners.
    #[must_use]
    pub fn owner(&self) -> Option<&Owner> {
        match self {
            Self::All => None,
            Self::Of(owner) => Some(owner),
        }
    }
}

impl From<Option<String>> for Scope {
    fn from(name: Option<String>) -> Self {
        name.map_or(Self::All, |name| Self::Of(Owner(name)))
    }
}

impl From<Scope> for Option<String> {
    fn from(scope: Scope) -> Self {
        match scope {
            Scope::All => None,
            Scope::Of(owner) => Some(owner.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_sees_its_own_and_nothing_of_a_server_without_tokens() {
        let ana = Scope::Of("ana".into());
        assert!(ana.sees(&"ana".into()) && !ana.sees(&"bob".into()) && !ana.sees(&Owner::nobody()));
        assert!(Scope::All.sees(&"ana".into()) && Scope::All.sees(&Owner::nobody()));
        assert!(!Scope::Of(Owner::nobody()).sees(&"ana".into()), "nobody is not everybody");
    }

    #[test]
    fn a_stored_scope_is_a_name_or_null() {
        for (scope, stored) in [(Scope::All, "null"), (Scope::Of("ana".into()), "\"ana\"")] {
            assert_eq!(serde_json::to_string(&scope).unwrap(), stored);
            assert_eq!(serde_json::from_str::<Scope>(stored).unwrap(), scope);
        }
    }
}
