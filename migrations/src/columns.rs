//! Short forms for the column types that the schema uses. Times are microseconds since the Unix epoch in UTC (`big`), so
//! that both databases store, compare and index them the same way.

use sea_orm_migration::prelude::*;

/// A table under construction.
pub(crate) struct Table {
    create: TableCreateStatement,
}

impl Table {
    pub(crate) fn new(name: &'static str) -> Self {
        let mut create = sea_orm_migration::prelude::Table::create();
        create.table(Alias::new(name)).if_not_exists();
        Self { create }
    }

    pub(crate) fn text(mut self, column: &'static str) -> Self {
        self.create.col(ColumnDef::new(Alias::new(column)).text().not_null());
        self
    }

    pub(crate) fn opt_text(mut self, column: &'static str) -> Self {
        self.create.col(ColumnDef::new(Alias::new(column)).text().null());
        self
    }

    pub(crate) fn big(mut self, column: &'static str) -> Self {
        self.create.col(ColumnDef::new(Alias::new(column)).big_integer().not_null());
        self
    }

    /// A counter that starts at 0.
    pub(crate) fn count(mut self, column: &'static str) -> Self {
        self.create.col(ColumnDef::new(Alias::new(column)).big_integer().not_null().default(0));
        self
    }

    pub(crate) fn opt_big(mut self, column: &'static str) -> Self {
        self.create.col(ColumnDef::new(Alias::new(column)).big_integer().null());
        self
    }

    pub(crate) fn int(mut self, column: &'static str) -> Self {
        self.create.col(ColumnDef::new(Alias::new(column)).integer().not_null());
        self
    }

    pub(crate) fn opt_int(mut self, column: &'static str) -> Self {
        self.create.col(ColumnDef::new(Alias::new(column)).integer().null());
        self
    }

    pub(crate) fn flag(mut self, column: &'static str) -> Self {
        self.create.col(ColumnDef::new(Alias::new(column)).boolean().not_null().default(false));
        self
    }

    pub(crate) fn blob(mut self, column: &'static str) -> Self {
        self.create.col(ColumnDef::new(Alias::new(column)).blob().not_null());
        self
    }

    pub(crate) fn opt_blob(mut self, column: &'static str) -> Self {
        self.create.col(ColumnDef::new(Alias::new(column)).blob().null());
        self
    }

    /// The primary key.
    pub(crate) fn key(mut self, columns: &[&'static str]) -> Self {
        let mut index = Index::create();
        for column in columns {
            index.col(Alias::new(*column));
        }
        self.create.primary_key(&mut index);
        self
    }

    /// Creates the table.
    pub(crate) async fn create(self, manager: &SchemaManager<'_>) -> Result<(), DbErr> {
        manager.create_table(self.create).await
    }

    pub(crate) async fn drop(manager: &SchemaManager<'_>, names: &[&'static str]) -> Result<(), DbErr> {
        for name in names {
            manager
                .drop_table(sea_orm_migration::prelude::Table::drop().table(Alias::new(*name)).if_exists().to_owned())
                .await?;
        }
        Ok(())
    }
}

/// Creates an index named after its table and columns.
pub(crate) async fn index(
    manager: &SchemaManager<'_>,
    table: &'static str,
    columns: &[&'static str],
    unique: bool,
) -> Result<(), DbErr> {
    let mut create = Index::create();
    create.name(format!("{table}_by_{}", columns.join("_"))).table(Alias::new(table)).if_not_exists();
    for column in columns {
        create.col(Alias::new(*column));
    }
    if unique {
        create.unique();
    }
    manager.create_index(create).await
}
