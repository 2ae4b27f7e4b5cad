//! A database that is emptied for the next seed: to open and migrate one takes longer than to simulate.

use crate::direct;
use sea_orm::{ConnectionTrait, DatabaseConnection, Statement};
use tempfile::TempDir;
use tidemill::store::Store;

pub struct Database {
    pub store: Store,
    raw: DatabaseConnection,
    /// Deletes every row but the counters, which begin anew.
    empty: String,
    _folder: TempDir,
}

impl Database {
    pub async fn open() -> Self {
        // On tmpfs where there is one: no power fails here. That is tried in tests/process/power.rs.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let file = folder.path().join("tidemill.db");
        let store = Store::sqlite(&file).await.unwrap();
        let raw = direct::connect(format!("sqlite://{}", file.display())).await;
        let tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' \
            AND name NOT IN ('seaql_migrations', 'counters')";
        let tables = raw.query_all_raw(Statement::from_string(raw.get_database_backend(), tables)).await.unwrap();
        assert!(tables.len() > 10, "the tables have other names now");
        let mut empty = String::from("PRAGMA foreign_keys = OFF; BEGIN IMMEDIATE; UPDATE counters SET value = 0;");
        for table in tables {
            let name: String = table.try_get("", "name").unwrap();
            empty.push_str(&format!("DELETE FROM {name};"));
        }
        empty.push_str("COMMIT;");
        Self { store, raw, empty, _folder: folder }
    }

    pub async fn empty(&self) {
        self.raw.execute_unprepared(&self.empty).await.unwrap();
    }
}
