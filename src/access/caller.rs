//! The caller of a request.

use super::Denied;
use crate::domain::{Owner, Scope};

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Everything with their own files and batches.
    Submit,
    /// Everything.
    Admin,
}

/// Who calls. Every request that has passed a gate has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// What they make belongs to.
    pub owner: Owner,
    /// What they may do.
    pub role: Role,
}

impl Caller {
    /// Whoever calls a server without tokens, or one that asks for client certificates only.
    #[must_use]
    pub fn anonymous() -> Self {
        Self { owner: Owner::nobody(), role: Role::Admin }
    }

    /// Whose files, batches and webhooks they may read and change.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match self.role {
            Role::Submit => Scope::Of(self.owner.clone()),
            Role::Admin => Scope::All,
        }
    }

    /// Refuses all but admins.
    ///
    /// # Errors
    /// [`Denied::AdminOnly`].
    pub fn require_admin(&self) -> Result<(), Denied> {
        match self.role {
            Role::Admin => Ok(()),
            Role::Submit => Err(Denied::AdminOnly),
        }
    }
}
