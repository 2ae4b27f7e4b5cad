//! The caller of a request.

use super::Denied;
use crate::domain::{Owner, Scope};

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// May do everything with their own files and batches.
    Submit,
    /// May do everything.
    Admin,
}

/// The caller of a request that has passed a gate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The owner of what they create.
    pub owner: Owner,
    pub role: Role,
}

impl Caller {
    /// The caller of a server without tokens, or of one that only asks for client certificates.
    #[must_use]
    pub fn anonymous() -> Self {
        Self { owner: Owner::nobody(), role: Role::Admin }
    }

    /// The files, batches and webhooks that they may read and change.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match self.role {
            Role::Submit => Scope::Of(self.owner.clone()),
            Role::Admin => Scope::All,
        }
    }

    /// Refuses callers that are not admins.
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
