//! `tidemill serve`, `migrate` and `sim`: the commands that are servers or work on a server's data.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context;
use clap::Args;
use tokio::net::TcpListener;

use super::{descriptors, meter::note, out, signals};
use crate::{
    app::{App, FAREWELL},
    blobs,
    config::{
        BlobStore, Database, LogFormat, SecretParser, SecretSetting, ServeConfig, parse_address, parse_database_url,
    },
    sim::{Sim, SimConfig},
    store::Store,
};

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// TOML file with settings, as for serve.
    #[arg(long, env = "TIDEMILL_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of the SQLite database.
    #[arg(long, env = "TIDEMILL_DATA_DIR", value_name = "DIR", default_value = "./data")]
    data_dir: PathBuf,
    /// PostgreSQL: postgres://user:password@host/database. Default: SQLite in --data-dir.
    #[arg(long, env = "TIDEMILL_DATABASE_URL", value_name = "URL", hide_env_values = true, help_heading = "Storage",
        allow_hyphen_values = true, value_parser = SecretParser(parse_database_url))]
    database_url: Option<SecretSetting>,
    /// Only show which migrations are applied; change nothing.
    #[arg(long)]
    status: bool,
}

/// Arguments of `sim`.
#[derive(Debug, Args)]
pub struct SimArgs {
    /// Address to serve on. Port 0: any free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8000", value_parser = parse_address)]
    listen: SocketAddr,
    /// The models that it lists, comma-separated.
    #[arg(long, value_name = "MODEL,…", value_delimiter = ',', default_value = "sim-7b")]
    models: Vec<String>,
    /// Time to the first token, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = 50)]
    latency_ms: u64,
    /// Tokens per second of one request; 0: all at once.
    #[arg(long, value_name = "N", default_value_t = 100.0, value_parser = not_negative)]
    tokens_per_second: f64,
    /// Share of requests that fail, 0 to 1.
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = share)]
    error_rate: f64,
    /// Seed of the randomness: the same seed gives the same answers.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The most requests that run at once; further ones wait, as in vLLM.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = at_least_one)]
    max_num_seqs: usize,
}

/// Serves until SIGTERM or Ctrl-C, then drains; a second signal ends it at once.
///
/// # Errors
/// The settings are refused, or the server can't start.
pub async fn serve(config: ServeConfig) -> anyhow::Result<()> {
    let config = config.validate()?;
    if config.log_format == LogFormat::Json {
        log_panics();
    }
    descriptors::raise();
    if let (Database::Postgres(_), BlobStore::Directory(directory)) = (config.database(), config.blob_store()) {
        tracing::warn!(
            "the database is PostgreSQL, but the objects are in {}: run only this one server, or set --blobs to a store that all servers share",
            directory.display()
        );
    }
    if config.insecure_allow_anonymous && !config.listen.ip().is_loopback() {
        tracing::warn!("anybody who can reach {} may do everything (--insecure-allow-anonymous)", config.listen);
    }
    let shutdown = signals::on_signal(Some(config.drain_timeout + FAREWELL))?;
    let started = tokio::select! {
        started = App::start(config) => started?,
        // While waiting for the database or migrating it, nothing has been claimed yet.
        () = shutdown.cancelled() => {
            tracing::info!("stopped while starting");
            return Ok(());
        }
    };
    Ok(started.run_until(shutdown).await?)
}

/// The standard library would print it in its own format between the lines of JSON.
fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string);
        tracing::error!(panic = info.payload_as_str().unwrap_or("it does not say why"), place, "something panicked");
    }));
}

/// Migrates a database and prints its migrations.
///
/// # Errors
/// The database can't be opened or migrated.
pub async fn migrate(args: MigrateArgs, json: bool) -> anyhow::Result<()> {
    let database = Database::of(args.database_url.as_ref(), &args.data_dir);
    let store = match (&database, args.status) {
        (Database::Sqlite(file), true) if !file.exists() => {
            if !json {
                out::line(format!("no database yet: {}", file.display()))?;
            }
            return Ok(());
        }
        (Database::Sqlite(file), true) => Store::sqlite_unmigrated(file).await?,
        (Database::Sqlite(file), false) => {
            blobs::make_folder(&args.data_dir).with_context(|| format!("--data-dir {}", args.data_dir.display()))?;
            Store::sqlite(file).await?
        }
        (Database::Postgres(url), true) => Store::postgres_unmigrated(url.expose(), 1).await?,
        (Database::Postgres(url), false) => Store::postgres(url.expose(), 2).await?,
    };
    for (name, applied) in store.migrations().await? {
        if json {
            out::line(serde_json::json!({"migration": name, "applied": applied}))?;
        } else {
            out::line(format!("{}  {name}", if applied { "applied" } else { "pending" }))?;
        }
    }
    store.close().await;
    Ok(())
}

/// Serves a simulated worker until SIGTERM or Ctrl-C.
///
/// # Errors
/// The address can't be used.
pub async fn sim(args: SimArgs) -> anyhow::Result<()> {
    let shutdown = signals::on_signal(None)?;
    let sim = Sim::new(SimConfig {
        models: args.models.clone(),
        latency: Duration::from_millis(args.latency_ms),
        tokens_per_second: args.tokens_per_second,
        error_rate: args.error_rate,
        seed: args.seed,
        max_num_seqs: args.max_num_seqs,
    })?;
    let listener = TcpListener::bind(args.listen).await.with_context(|| format!("--listen {}", args.listen))?;
    note(&format!("simulated worker on http://{}, models {}", listener.local_addr()?, args.models.join(", ")));
    Ok(sim.serve(listener, shutdown).await?)
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("expected 0 to 1".to_owned()),
    }
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
        _ => Err("expected 0 or more".to_owned()),
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err("expected 1 or more".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_numbers_are_refused() {
        assert_eq!(share("0.25"), Ok(0.25));
        assert!(share("1.1").is_err() && share("NaN").is_err() && share("-0.1").is_err());
        assert!(not_negative("inf").is_err() && not_negative("-1").is_err() && not_negative("0").is_ok());
        assert!(at_least_one("0").is_err() && at_least_one("1").is_ok());
    }

    #[tokio::test]
    async fn migrations_are_shown_before_and_after() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tidemill.db");
        let before = Store::sqlite_unmigrated(&file).await.unwrap();
        let pending = before.migrations().await.unwrap();
        assert!(!pending.is_empty() && pending.iter().all(|(_, applied)| !applied), "{pending:?}");
        before.close().await;
        let after = Store::sqlite(&file).await.unwrap();
        assert!(after.migrations().await.unwrap().iter().all(|(_, applied)| *applied));
        after.close().await;
    }
}
