//! Leases of sweeps: which node does which periodic work.

use std::{fmt::Write as _, time::Duration};

use sea_orm::{ColumnTrait, ConnectionTrait, EntityTrait, QueryFilter, Statement, Value, sea_query::Expr};

use super::{Store, StoreError, convert, entity::sweep, now, write::commit};
use crate::domain::{NodeId, Timestamp};

/// A sweep that a node wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedSweep<'a> {
    /// The sweep's name.
    pub name: &'a str,
    /// How long ago this node last left it with nothing to do. `None`: it has not.
    pub caught_up: Option<Duration>,
}

/// A sweep, as its row says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SweepRow {
    /// The sweep's name.
    pub name: String,
    /// Whether the asking node holds its lease.
    pub is_ours: bool,
    /// How long ago a node last left it with nothing to do. `None`: none has.
    pub caught_up: Option<Duration>,
    /// How long ago a node first wanted to do it.
    pub known: Duration,
}

impl Store {
    /// Takes the leases of these sweeps that are free, and renews those that the node has, for `lease` from now. Records
    /// when the sweeps that it holds were last caught up. Returns the rows of all of `wanted`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn hold_sweeps(
        &self,
        node: &NodeId,
        wanted: &[WantedSweep<'_>],
        lease: Duration,
    ) -> Result<Vec<SweepRow>, StoreError> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let mut wanted = wanted.to_vec();
            // Nodes lock the rows in the same order.
            wanted.sort_unstable_by_key(|sweep| sweep.name);
            let mut sql =
                "INSERT INTO sweeps (name, holder, lease_expires_at, created_at, caught_up_at) VALUES".to_owned();
            let mut values: Vec<Value> = vec![
                node.as_str().into(),
                at.plus(lease).0.into(),
                at.0.into(),
                at.plus(lease.saturating_mul(2)).0.into(),
            ];
            for sweep in &wanted {
                let (comma, name) = (if values.len() == 4 { "" } else { "," }, values.len() + 1);
                let _ = write!(sql, "{comma} (${name}, $1, $2, $3, ${})", name + 1);
                values.extend([sweep.name.into(), sweep.caught_up.map(|ago| before(at, ago)).into()]);
            }
            // No node takes a lease for longer than `lease`, by a clock that another node may have read a little later than
            // this one. A lease that ends much later is of a clock that was set back since.
            sql.push_str(
            " ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, lease_expires_at = excluded.lease_expires_at, \
             caught_up_at = COALESCE(excluded.caught_up_at, sweeps.caught_up_at) \
             WHERE sweeps.holder = $1 OR sweeps.holder IS NULL \
             OR sweeps.lease_expires_at <= $3 OR sweeps.lease_expires_at > $4",
        );
            tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
            let rows = sweep::Entity::find()
                .filter(sweep::Column::Name.is_in(wanted.iter().map(|sweep| sweep.name)))
                .all(&tx)
                .await?;
            let row = |row: sweep::Model| SweepRow {
                is_ours: row.holder.as_deref() == Some(node.as_str()),
                caught_up: row.caught_up_at.map(|then| at.since(Timestamp(then))),
                known: at.since(Timestamp(row.created_at)),
                name: row.name,
            };
            commit(tx, rows.into_iter().map(row).collect())
        })
        .await
    }

    /// Gives back the leases of these sweeps that the node has.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn give_back_sweeps(&self, node: &NodeId, names: &[&str]) -> Result<(), StoreError> {
        self.write(|tx| async move {
            sweep::Entity::update_many()
                .col_expr(sweep::Column::Holder, Expr::val(Option::<String>::None))
                .filter(sweep::Column::Holder.eq(node.as_str()))
                .filter(sweep::Column::Name.is_in(names.iter().copied()))
                .exec(&tx)
                .await?;
            commit(tx, ())
        })
        .await
    }

    /// Ends the leases of all sweeps. Only for a database without other nodes, where they are the dead predecessor's.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn free_sweeps(&self) -> Result<(), StoreError> {
        self.write(|tx| async move {
            sweep::Entity::update_many()
                .col_expr(sweep::Column::Holder, Expr::val(Option::<String>::None))
                .exec(&tx)
                .await?;
            commit(tx, ())
        })
        .await
    }
}

fn before(at: Timestamp, ago: Duration) -> i64 {
    at.0.saturating_sub(convert::micros(ago))
}
