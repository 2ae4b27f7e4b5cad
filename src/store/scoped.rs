//! The only place where a scope becomes SQL.

use sea_orm::{ColumnTrait, QueryFilter};

use crate::domain::Scope;

/// Restricts a query to the rows within the scope. `owner` is the column with the rows' owner.
pub(super) fn within<F: QueryFilter>(find: F, owner: impl ColumnTrait, scope: &Scope) -> F {
    match scope.owner() {
        None => find,
        Some(name) => find.filter(owner.eq(name.as_str())),
    }
}
