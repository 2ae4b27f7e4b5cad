//! The one place where a scope becomes SQL.

use sea_orm::{ColumnTrait, QueryFilter};

use crate::domain::Scope;

/// Leaves in a query only the rows within the scope. `owner` is the column that says whose a row is.
pub(super) fn within<F: QueryFilter>(find: F, owner: impl ColumnTrait, scope: &Scope) -> F {
    match scope.owner() {
        None => find,
        Some(name) => find.filter(owner.eq(name.as_str())),
    }
}
