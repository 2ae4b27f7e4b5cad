//! Pages of batches and files, newest first.
//!
//! Each page scans one index from where the previous page ended, and checks all other filters by the key of each row.
//! So a page costs the same with ten million batches as with ten, unless two filters are each common but rarely met
//! together; then the rarer one is scanned.

use std::collections::BTreeMap;

use sea_orm::{
    ColumnTrait, ConnectionTrait, EntityTrait, Order, QueryFilter, QueryOrder, QuerySelect,
    sea_query::{ColumnRef, Expr, ExprTrait, IntoColumnRef, Query, SelectStatement},
};

use super::{
    Store, StoreError,
    convert::readable,
    entity::{batch, batch_metadata, batch_model, file},
    scoped::visible,
};
use crate::domain::{Batch, BatchId, BatchStatus, Endpoint, File, FileId, FileKind, Scope};

/// Index entries counted at most to find the rarest of several filters: about 1 ms.
const COUNTED: u64 = 10_000;
/// Aliases of the table that is scanned and of those that are only checked.
const WALKED: &str = "walked";
const LOOKED_AT: &str = "looked_at";

/// A filter for batches.
#[derive(Clone, Debug)]
pub struct BatchFilter {
    /// Only those within this scope.
    pub scope: Scope,
    /// Only batches in one of these states. Empty: in any.
    pub statuses: Vec<BatchStatus>,
    /// Only batches of this endpoint. `None`: of any.
    pub endpoint: Option<Endpoint>,
    /// Only batches that use this model. `None`: any.
    pub model: Option<String>,
    /// Only batches whose metadata has all of these pairs.
    pub metadata: BTreeMap<String, String>,
}

/// A filter for files.
#[derive(Clone, Debug)]
pub struct FileFilter {
    /// Only those within this scope.
    pub scope: Scope,
    /// Only files with this purpose. `None`: any.
    pub purpose: Option<String>,
}

/// The order of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageOrder {
    /// Newest first.
    #[default]
    Newest,
    /// Oldest first.
    Oldest,
}

impl BatchFilter {
    /// All batches within a scope.
    #[must_use]
    pub fn within(scope: Scope) -> Self {
        Self { scope, statuses: Vec::new(), endpoint: None, model: None, metadata: BTreeMap::new() }
    }
}

impl FileFilter {
    /// All files within a scope.
    #[must_use]
    pub fn within(scope: Scope) -> Self {
        Self { scope, purpose: None }
    }
}

/// The index that a page of batches scans. All are in the order of the batches' ids.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Walk<'a> {
    /// The batches, by the owner, the endpoint and the state of the filter if it has them.
    Batches,
    /// The batches with this model.
    Model(&'a str),
    /// The batches with this pair of metadata.
    Pair(&'a str, &'a str),
}

/// A [`BatchFilter`] with at most one state, and where to start.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    filter: &'a BatchFilter,
    status: Option<BatchStatus>,
    order: PageOrder,
    after: Option<&'a BatchId>,
}

impl Store {
    /// At most `limit` batches, newest first, that follow `after` in this order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn batches(
        &self,
        filter: &BatchFilter,
        after: Option<&BatchId>,
        limit: u64,
    ) -> Result<Vec<Batch>, StoreError> {
        self.batches_in(filter, PageOrder::Newest, after, limit).await
    }

    /// The same, in either order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn batches_in(
        &self,
        filter: &BatchFilter,
        order: PageOrder,
        after: Option<&BatchId>,
        limit: u64,
    ) -> Result<Vec<Batch>, StoreError> {
        let after = after.map(|after| after.as_str().to_owned());
        let rows = |after| self.batch_rows(filter, order, after, limit);
        readable_page("batch", limit, after, rows, |row: &batch::Model| &row.id).await
    }

    async fn batch_rows(
        &self,
        filter: &BatchFilter,
        order: PageOrder,
        after: Option<String>,
        limit: u64,
    ) -> Result<Vec<batch::Model>, StoreError> {
        let after = after.map(BatchId::from_text);
        let after = after.as_ref();
        // No index has the batches of several states in the order of their ids, so each state is scanned separately. In
        // the order in which states are entered, so that a batch that moves on meanwhile is met twice rather than
        // never.
        let states = BatchStatus::ALL.into_iter().filter(|status| filter.statuses.contains(status)).map(Some);
        let states: Vec<_> = if filter.statuses.is_empty() { vec![None] } else { states.collect() };
        let mut rows = Vec::new();
        for status in states {
            let wanted = Wanted { filter, status, order, after };
            let walk = self.rarest(wanted).await?;
            let page = batch::Entity::find().filter(batch::Column::Id.in_subquery(wanted.page(walk, limit)));
            rows.extend(page.all(self.read()).await?);
        }
        in_order(&mut rows, order, limit, |row| &row.id);
        Ok(rows)
    }

    /// The scan that meets the fewest batches. Counts only if there is a choice.
    async fn rarest<'a>(&self, wanted: Wanted<'a>) -> Result<Walk<'a>, StoreError> {
        let walks = wanted.walks();
        if let [only] = walks.as_slice() {
            return Ok(*only);
        }
        let mut rarest = (COUNTED + 1, Walk::Batches);
        for walk in walks {
            let some = wanted.walk(walk).limit(COUNTED).to_owned();
            let count = Query::select().expr_as(Expr::cust("COUNT(*)"), "met").from_subquery(some, "some").to_owned();
            let row = self.read().query_one(&count).await?;
            let row = row.ok_or_else(|| StoreError::Corrupt("no count".into()))?;
            let met = u64::try_from(row.try_get::<i64>("", "met")?).unwrap_or(0);
            if met < rarest.0 {
                rarest = (met, walk);
            }
        }
        Ok(rarest.1)
    }

    /// At most `limit` files, newest first, that follow `after` in this order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn files(
        &self,
        filter: &FileFilter,
        after: Option<&FileId>,
        limit: u64,
    ) -> Result<Vec<File>, StoreError> {
        self.files_in(filter, PageOrder::Newest, after, limit).await
    }

    /// The same, in either order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn files_in(
        &self,
        filter: &FileFilter,
        order: PageOrder,
        after: Option<&FileId>,
        limit: u64,
    ) -> Result<Vec<File>, StoreError> {
        let after = after.map(|after| after.as_str().to_owned());
        let rows = |after| self.file_rows(filter, order, after, limit);
        readable_page("file", limit, after, rows, |row: &file::Model| &row.id).await
    }

    async fn file_rows(
        &self,
        filter: &FileFilter,
        order: PageOrder,
        after: Option<String>,
        limit: u64,
    ) -> Result<Vec<file::Model>, StoreError> {
        let kinds: &[Option<&str>] = match &filter.purpose {
            None => &[None],
            Some(purpose) if purpose == FileKind::Input.purpose() => &[Some("input")],
            Some(_) => &[Some("output"), Some("error")],
        };
        let mut rows = Vec::new();
        for kind in kinds {
            let find = file::Entity::find().limit(limit);
            let find = match order {
                PageOrder::Newest => find.order_by_desc(file::Column::Id),
                PageOrder::Oldest => find.order_by_asc(file::Column::Id),
            };
            let mut find = visible(find, &filter.scope);
            if let Some(kind) = kind {
                find = find.filter(file::Column::Kind.eq(*kind));
            }
            if let Some(after) = &after {
                find = find.filter(match order {
                    PageOrder::Newest => file::Column::Id.lt(after.as_str()),
                    PageOrder::Oldest => file::Column::Id.gt(after.as_str()),
                });
            }
            rows.extend(find.all(self.read()).await?);
        }
        in_order(&mut rows, order, limit, |row| &row.id);
        Ok(rows)
    }
}

impl<'a> Wanted<'a> {
    /// The possible scans for this filter.
    fn walks(self) -> Vec<Walk<'a>> {
        let filter = self.filter;
        let batches = filter.scope.owner().is_some() || self.status.is_some() || filter.endpoint.is_some();
        let pairs = self.filter.metadata.iter().map(|(name, value)| Walk::Pair(name, value));
        let model = self.filter.model.as_deref().map(Walk::Model);
        let walks: Vec<_> = batches.then_some(Walk::Batches).into_iter().chain(pairs).chain(model).collect();
        if walks.is_empty() { vec![Walk::Batches] } else { walks }
    }

    /// The ids that a scan meets.
    fn walk(self, walk: Walk<'_>) -> SelectStatement {
        let key = walk.key(WALKED);
        let mut ids = self.rows_of(walk, WALKED);
        ids.column(key.clone());
        if let Some(after) = self.after {
            ids.and_where(match self.order {
                PageOrder::Newest => Expr::col(key).lt(after.as_str()),
                PageOrder::Oldest => Expr::col(key).gt(after.as_str()),
            });
        }
        ids
    }

    /// The first ids that a scan meets and that match the filter.
    fn page(self, walk: Walk<'_>, limit: u64) -> SelectStatement {
        let key = walk.key(WALKED);
        let mut ids = self.walk(walk);
        for other in self.walks().into_iter().filter(|other| *other != walk) {
            let mut rows = self.rows_of(other, LOOKED_AT);
            rows.expr(Expr::val(1)).and_where(Expr::col(other.key(LOOKED_AT)).equals(key.clone()));
            ids.and_where(Expr::exists(rows));
        }
        let order = match self.order {
            PageOrder::Newest => Order::Desc,
            PageOrder::Oldest => Order::Asc,
        };
        ids.order_by(key, order).limit(limit);
        ids
    }

    /// The rows that match this filter.
    fn rows_of(self, walk: Walk<'_>, alias: &'static str) -> SelectStatement {
        let mut rows = Query::select();
        match walk {
            Walk::Batches => {
                rows.from_as(batch::Entity, alias);
                if let Some(owner) = self.filter.scope.owner() {
                    rows.and_where(Expr::col((alias, batch::Column::Owner)).eq(owner.as_str()));
                }
                if let Some(endpoint) = self.filter.endpoint {
                    rows.and_where(Expr::col((alias, batch::Column::Endpoint)).eq(endpoint.path()));
                }
                if let Some(status) = self.status {
                    rows.and_where(Expr::col((alias, batch::Column::Status)).eq(status.as_str()));
                }
            }
            Walk::Model(model) => {
                rows.from_as(batch_model::Entity, alias);
                rows.and_where(Expr::col((alias, batch_model::Column::Model)).eq(model));
            }
            Walk::Pair(name, value) => {
                rows.from_as(batch_metadata::Entity, alias);
                rows.and_where(Expr::col((alias, batch_metadata::Column::Name)).eq(name));
                rows.and_where(Expr::col((alias, batch_metadata::Column::Value)).eq(value));
            }
        }
        rows
    }
}

impl Walk<'_> {
    /// Its column with the batch's id.
    fn key(self, alias: &'static str) -> ColumnRef {
        match self {
            Walk::Batches => (alias, batch::Column::Id).into_column_ref(),
            Walk::Model(_) => (alias, batch_model::Column::BatchId).into_column_ref(),
            Walk::Pair(..) => (alias, batch_metadata::Column::BatchId).into_column_ref(),
        }
    }
}

/// A page of `limit` readable rows, from `rows` after an id. Unreadable rows are replaced by further ones, because a
/// caller would take a short page for the last one.
pub(super) async fn readable_page<R, T, F>(
    what: &str,
    limit: u64,
    mut after: Option<String>,
    rows: impl Fn(Option<String>) -> F,
    id: fn(&R) -> &String,
) -> Result<Vec<T>, StoreError>
where
    T: TryFrom<R, Error = StoreError>,
    F: Future<Output = Result<Vec<R>, StoreError>>,
{
    let mut found = Vec::new();
    loop {
        let some = rows(after).await?;
        let is_last = (some.len() as u64) < limit;
        after = some.last().map(|row| id(row).clone());
        for row in some {
            let name = id(&row).clone();
            found.extend(readable(what, &name, T::try_from(row)));
        }
        if is_last || found.len() as u64 >= limit {
            found.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
            return Ok(found);
        }
    }
}

/// Merges the results of several scans, each at most `limit`, into one page.
fn in_order<T>(rows: &mut Vec<T>, order: PageOrder, limit: u64, id: impl Fn(&T) -> &String) {
    rows.sort_by(|one, other| match order {
        PageOrder::Newest => id(other).cmp(id(one)),
        PageOrder::Oldest => id(one).cmp(id(other)),
    });
    rows.dedup_by(|one, other| id(one) == id(other));
    rows.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
}
