//! The only place where a scope becomes SQL.

use sea_orm::{ColumnTrait, Condition, QueryFilter};

use super::{entity::file, local_now};
use crate::domain::Scope;

/// Restricts a query to the rows within the scope. `owner` is the column with the rows' owner.
pub(super) fn within<F: QueryFilter>(find: F, owner: impl ColumnTrait, scope: &Scope) -> F {
    match scope.owner() {
        None => find,
        Some(name) => find.filter(owner.eq(name.as_str())),
    }
}

/// Restricts a query for files to those within the scope that are there: neither hidden nor expired. A file that expires
/// costs nobody a question to the database's clock, so this machine's decides.
pub(super) fn visible<F: QueryFilter>(find: F, scope: &Scope) -> F {
    let lasts = Condition::any().add(file::Column::ExpiresAt.is_null()).add(file::Column::ExpiresAt.gt(local_now().0));
    within(find, file::Column::Owner, scope).filter(file::Column::DeletedAt.is_null()).filter(lasts)
}
