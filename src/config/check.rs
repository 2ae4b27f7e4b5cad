//! Validation of settings beyond their form.

use std::{path::Path, time::Duration};

use clap::ValueEnum;

use super::{ConfigError, DATA_DIR, Database, NodeRole, ServeConfig};
use crate::{delivery::schedule::Schedule, domain::HealthInterval};

impl ServeConfig {
    /// Refuses settings that can't work, and settings that would open the server to everybody unintentionally.
    ///
    /// # Errors
    /// [`ConfigError::Refused`], naming the setting and the ways out.
    pub fn validate(self) -> Result<Self, ConfigError> {
        self.check_tls()?;
        self.check_anonymous()?;
        self.check_spans()?;
        self.check_webhooks()?;
        self.check_workers()?;
        self.check_roles()?;
        self.check_objects()?;
        Ok(self)
    }

    fn check_tls(&self) -> Result<(), ConfigError> {
        match (&self.tls_cert, &self.tls_key, &self.tls_client_ca) {
            (Some(_), None, _) => refuse("--tls-cert", "needs --tls-key with the certificate's private key"),
            (None, Some(_), _) => refuse("--tls-key", "needs --tls-cert with the key's certificate chain"),
            (None, None, Some(_)) => {
                refuse("--tls-client-ca", "needs --tls-cert and --tls-key: client certificates require TLS")
            }
            (Some(_), Some(_), _) | (None, None, None) => Ok(()),
        }
    }

    fn check_anonymous(&self) -> Result<(), ConfigError> {
        let guarded = self.tokens.is_some() || self.tls_client_ca.is_some();
        if self.listen.ip().is_loopback() || guarded || self.insecure_allow_anonymous {
            return Ok(());
        }
        refuse(
            "--listen",
            format!(
                "{} is reachable from other machines, and nothing would restrict who may use it. Do one of these:\n  \
                 require access tokens:             --tokens FILE (make them with `tidemill token new`)\n  \
                 require client certificates:       --tls-cert FILE --tls-key FILE --tls-client-ca FILE\n  \
                 admit everybody who can reach it:  --insecure-allow-anonymous",
                self.listen
            ),
        )
    }

    fn check_roles(&self) -> Result<(), ConfigError> {
        let all = NodeRole::value_variants().iter().all(|role| self.has_role(*role));
        if all || matches!(self.database(), Database::Postgres(_)) {
            return Ok(());
        }
        refuse(
            "--roles",
            "with SQLite there is only one server, so it must have all roles. Leave --roles out, or use a PostgreSQL \
             database that several servers can share (--database-url).",
        )
    }

    fn check_workers(&self) -> Result<(), ConfigError> {
        if self.worker_answer_memory < 16 * 1024 * 1024 {
            return refuse("--worker-answer-memory", "must be at least 16MiB");
        }
        Ok(())
    }

    /// Servers that share a database must share the objects. A directory that was not set explicitly belongs to this
    /// server alone.
    fn check_objects(&self) -> Result<(), ConfigError> {
        let named = self.blobs.is_some() || self.data_dir != Path::new(DATA_DIR);
        if named || matches!(self.database(), Database::Sqlite(_)) {
            return Ok(());
        }
        refuse(
            "--blobs",
            format!(
                "with PostgreSQL, set where the objects are stored, because all servers of a database must share them. Do one of these:\n  \
                 --blobs s3://bucket/prefix  (or gs://…, az://…): an object store\n  \
                 --blobs file:///a/shared/path  a directory that every server has, on a network file system for instance\n  \
                 --data-dir /a/path  a directory other than {DATA_DIR}: for a single server, which stores them there"
            ),
        )
    }

    fn check_webhooks(&self) -> Result<(), ConfigError> {
        match Schedule::try_new(self.webhook_retry_schedule.clone()) {
            Ok(_) => Ok(()),
            Err(bad) => {
                refuse("--webhook-retry-schedule", format!("{bad}; the default is 5s,30s,2m,10m,30m,1h,2h,4h,8h"))
            }
        }
    }

    fn check_spans(&self) -> Result<(), ConfigError> {
        let second = Duration::from_secs(1);
        let day = 86_400 * second;
        for (setting, span, least, (most, in_words)) in [
            ("--request-timeout", self.request_timeout, second, (7 * day, "7d")),
            ("--lease", self.lease, 3 * second, (day, "1d")),
            ("--flush-interval", self.flush_interval, Duration::from_millis(10), (day, "1d")),
            ("--max-connection-age", self.max_connection_age, second, (365 * day, "365d")),
            (
                "--worker-health-interval",
                self.worker_health_interval,
                HealthInterval::LEAST,
                (HealthInterval::MOST, "1h"),
            ),
            ("--drain-timeout", self.drain_timeout, Duration::ZERO, (day, "1d")),
        ] {
            if span < least {
                return refuse(setting, format!("must be at least {}", humantime::format_duration(least)));
            }
            if span > most {
                return refuse(setting, format!("must be at most {in_words}"));
            }
        }
        // A lease is renewed and fenced between flushes: one that ends before the first flush would never keep its work.
        if self.flush_interval > self.lease / 2 {
            return refuse("--flush-interval", "must be at most half of --lease");
        }
        Ok(())
    }
}

fn refuse(setting: &'static str, message: impl Into<String>) -> Result<(), ConfigError> {
    Err(ConfigError::Refused { setting, message: message.into() })
}

#[cfg(test)]
mod tests {
    use super::super::{BlobStore, ConfigFile, Database};
    use super::*;
    use crate::domain::WorkerPriority;

    fn load(flags: &[&str]) -> Result<ServeConfig, ConfigError> {
        ServeConfig::from_flags(flags.iter().copied(), None).unwrap().validate()
    }

    fn refusal(flags: &[&str]) -> String {
        load(flags).unwrap_err().to_string()
    }

    #[test]
    fn the_defaults_are_as_promised() {
        let config = ServeConfig::default().validate().unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:4080");
        assert_eq!(config.database(), Database::Sqlite(Path::new("./data/tidemill.db").into()));
        assert_eq!(config.blob_store(), BlobStore::Directory(Path::new("./data/blobs").into()));
        assert_eq!((config.max_file_lines, config.max_file_bytes), (1_000_000, 10_000_000_000));
        assert_eq!((config.worker_max_in_flight, config.worker_max_in_flight_cap), (None, 1_024));
        assert_eq!(config.worker_priority, WorkerPriority::Auto);
        assert_eq!((config.max_tries, config.database_connections), (5, 10));
        assert_eq!(config.worker_answer_memory, 512 * 1024 * 1024);
        let limits = (config.limit_infer_calls, config.limit_watches, config.limit_downloads);
        assert_eq!((limits, config.max_connections), ((1_000, 10_000, 200), None));
        assert_eq!(config.request_timeout, Duration::from_secs(600));
        assert_eq!(config.lease, Duration::from_secs(30));
        assert_eq!(config.flush_interval, Duration::from_secs(2));
        assert_eq!(config.max_connection_age, Duration::from_secs(1_800));
        assert_eq!(config.drain_timeout, Duration::from_secs(10));
        assert_eq!((config.webhook_max_in_flight, config.webhook_retry_schedule.len()), (256, 9));
        assert_eq!(config.webhook_retry_schedule.iter().sum::<Duration>(), Duration::from_secs(56_555));
        assert!(config.worker.is_empty() && config.webhook_allow_cidr.is_empty() && !config.insecure_allow_anonymous);
    }

    #[test]
    fn flags_win_over_the_environment_and_that_over_the_file() {
        let file = ConfigFile::parse("t.toml", "data_dir = \"file\"\nmax_tries = 9\nworker = [\"http://f\"]").unwrap();
        // PATH stands in for TIDEMILL_DATA_DIR: it is set wherever tests run, and setting a variable is not safe here.
        let path = std::env::var("PATH").unwrap();
        let data_dir = |env: bool, flags: &[&str]| {
            let command = file.as_defaults(ServeConfig::command()).mut_args(|arg| match arg.get_id().as_str() {
                "data_dir" if env => arg.env("PATH"),
                _ => arg.env(None::<&'static str>),
            });
            let matches = command.try_get_matches_from(flags).unwrap();
            matches.get_one::<std::path::PathBuf>("data_dir").unwrap().display().to_string()
        };
        assert_eq!(data_dir(false, &[]), "file");
        assert_eq!(data_dir(true, &[]), path);
        assert_eq!(data_dir(true, &["--data-dir", "flag"]), "flag");
        let config = ServeConfig::from_flags(["--worker", "http://a", "--worker", "http://b"], Some(&file)).unwrap();
        assert_eq!(config.max_tries, 9);
        assert_eq!(config.worker.len(), 2, "a list is replaced, not joined: {:?}", config.worker);
    }

    #[test]
    fn every_setting_has_its_variable_and_its_help() {
        for arg in ServeConfig::command().get_arguments() {
            let name = arg.get_id().as_str();
            assert_eq!(arg.get_env().unwrap().to_str().unwrap(), format!("TIDEMILL_{}", name.to_uppercase()));
            assert_eq!(arg.get_long().unwrap(), name.replace('_', "-"));
            assert!(arg.get_help().is_some(), "{name}");
        }
    }

    #[test]
    fn an_open_address_is_refused_with_the_ways_out() {
        let message = refusal(&["--listen", "0.0.0.0:4080"]);
        for way in ["--listen: 0.0.0.0:4080", "--tokens", "--tls-client-ca", "--insecure-allow-anonymous"] {
            assert!(message.contains(way), "{message}");
        }
        assert!(load(&["--listen", "[::1]:0"]).is_ok());
        assert!(load(&["--listen", "0.0.0.0:1", "--tokens", "t"]).is_ok());
        assert!(load(&["--listen", "0.0.0.0:1", "--insecure-allow-anonymous"]).is_ok());
        let tls = ["--listen", "[::]:1", "--tls-cert", "c", "--tls-key", "k"];
        assert!(load(&tls).is_err(), "TLS alone says nothing about who calls");
        assert!(load(&[&tls[..], &["--tls-client-ca", "a"]].concat()).is_ok());
    }

    #[test]
    fn a_public_host_is_a_name_and_nothing_else() {
        let hosts =
            |name: &str| ServeConfig::from_flags(["--public-host", name], None).map(|config| config.public_host);
        assert_eq!(hosts("Batch.Example.com,*").unwrap(), ["batch.example.com", "*"]);
        for bad in ["https://batch.example.com", "batch.example.com:4080", "batch.example.com/", "", "a b"] {
            let message = hosts(bad).unwrap_err().to_string();
            assert!(message.contains("--public-host") && message.contains("without scheme"), "{message}");
        }
    }

    #[test]
    fn roles_are_split_on_postgres_only() {
        let config =
            load(&["--roles", "delivery,api,api", "--database-url", "postgres://h/d", "--blobs", "s3://b"]).unwrap();
        assert_eq!(config.role_names(), "api,delivery");
        assert!(!config.has_role(NodeRole::Scheduler));
        assert_eq!(load(&["--roles", "scheduler,delivery,api"]).unwrap().role_names(), "api,scheduler,delivery");
        assert_eq!(ServeConfig::default().role_names(), "api,scheduler,delivery");
    }

    #[test]
    fn postgres_needs_a_word_about_the_objects() {
        let postgres = ["--database-url", "postgres://h/d"];
        let message = refusal(&postgres);
        for way in ["--blobs: with PostgreSQL", "--blobs s3://", "--blobs file:///", "--data-dir"] {
            assert!(message.contains(way), "{message}");
        }
        for word in [["--blobs", "s3://bucket"], ["--blobs", "file:///shared"], ["--data-dir", "/var/lib/tidemill"]] {
            assert!(load(&[&postgres[..], &word].concat()).is_ok(), "{word:?}");
        }
        assert!(load(&[]).is_ok(), "SQLite has one server");
    }

    /// Added to a clock or to another span, it would overflow.
    #[test]
    fn a_span_without_end_is_refused_by_its_setting() {
        let mut spans = 0;
        for arg in ServeConfig::command().get_arguments() {
            let is_span = arg.get_value_names().is_some_and(|names| names.iter().any(|name| name.starts_with("SPAN")));
            let flag = format!("--{}", arg.get_long().unwrap());
            for long in ["1000000000000s", "366d", "36500d", "18446744073709551615s", "99999999999999999999y"] {
                if is_span {
                    let message = match ServeConfig::from_flags([flag.as_str(), long], None) {
                        Ok(config) => config.validate().unwrap_err().to_string(),
                        Err(error) => error.to_string(),
                    };
                    let says_most = message.contains("at most") || message.contains("1 ms to 7 days");
                    assert!(message.contains(&flag) && says_most, "{flag} {long}: {message}");
                    spans += 1;
                }
            }
        }
        assert_eq!(spans, 7 * 5);
    }

    #[test]
    fn what_is_no_span_is_told_in_words() {
        use super::super::parse_span;
        assert_eq!(parse_span("1h 30m"), Ok(Duration::from_secs(5_400)));
        for (text, words) in [
            ("30", "a number needs its unit: 30s, 30m or 30h"),
            ("", "expected a time span such as 500ms, 30s, 5m or 1h30m"),
            ("soon", "expected a time span such as"),
            ("-1s", "expected a time span such as"),
            ("5 parsecs", "\"parsecs\" is not a unit of time"),
            ("1e9s", "is not a unit of time"),
        ] {
            assert!(parse_span(text).unwrap_err().contains(words), "{text}: {:?}", parse_span(text));
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for (flags, setting) in [
            (&["--tls-cert", "c"][..], "--tls-cert: needs --tls-key"),
            (&["--tls-key", "k"], "--tls-key: needs --tls-cert"),
            (&["--tls-client-ca", "a"], "--tls-client-ca: needs --tls-cert and --tls-key"),
            (&["--worker-answer-memory", "15MiB"], "--worker-answer-memory: must be at least 16MiB"),
            (&["--roles", "api"], "--roles: with SQLite there is only one server"),
            (&["--lease", "2s"], "--lease: must be at least 3s"),
            (&["--lease", "3s", "--flush-interval", "2s"], "--flush-interval: must be at most half of --lease"),
            (&["--flush-interval", "0s"], "--flush-interval: must be at least 10ms"),
            (&["--request-timeout", "0s"], "--request-timeout: must be at least 1s"),
        ] {
            assert!(refusal(flags).starts_with(setting), "{}", refusal(flags));
        }
    }
}
