//! Explains why the PostgreSQL driver got no connection.

use crate::words::{self, Peer};

/// The driver's error as a message for people.
pub(super) fn in_words(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(refused) => {
            let text = refused.message();
            let hint = if text.contains("prepared statement") {
                "; if this is a pooler in transaction mode: tidemill needs session mode"
            } else {
                ""
            };
            format!("{text}{hint}")
        }
        sqlx::Error::Tls(source) => {
            let text = words::cause(Peer::Database, &**source);
            if text.contains("server does not support TLS") {
                return "the server does not offer TLS, which sslmode asks for: leave sslmode out, or turn TLS on there".to_owned();
            }
            text
        }
        sqlx::Error::PoolTimedOut => "all connections were in use, or none could be opened in time".to_owned(),
        other => words::cause(Peer::Database, other),
    }
}
