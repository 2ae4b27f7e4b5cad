//! The TOML file. Its values become the flags' defaults, so a value means the same wherever it is given, and the
//! environment and flags take precedence by clap's own rules.

use std::{collections::BTreeMap, error::Error as _, fmt, fs, path::Path};

use clap::{ArgAction, Command};

use super::{ConfigError, ServeConfig};

/// The similarity (Jaro-Winkler, 0 to 1) from which a valid name is suggested for an unknown one.
const ALIKE: f64 = 0.75;

/// A parsed configuration file: every key is a setting and every value is valid for it.
#[derive(Clone)]
pub struct ConfigFile {
    values: BTreeMap<String, Vec<String>>,
}

impl fmt::Debug for ConfigFile {
    /// Only the keys, because some values are secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.values.keys()).finish()
    }
}

impl ConfigFile {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`], naming file and key.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let file = path.display().to_string();
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(&file, &text),
            Err(error) => Err(ConfigError::Unreadable { file, error }),
        }
    }

    /// Reads a file's text.
    ///
    /// # Errors
    /// [`ConfigError`], naming file and key.
    pub fn parse(file: &str, text: &str) -> Result<Self, ConfigError> {
        // Some editors put a byte order mark before the first line.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let table: toml::Table = toml::from_str(text)
            .map_err(|error| ConfigError::NotToml { file: file.to_owned(), message: not_toml(&error, text) })?;
        let command = ServeConfig::command().mut_args(|arg| arg.env(None::<&'static str>));
        let mut values = BTreeMap::new();
        for (key, value) in table {
            let bad = |message: String| ConfigError::BadValue { file: file.to_owned(), key: key.clone(), message };
            let Some(arg) = command.get_arguments().find(|arg| arg.get_id() == key.as_str() && key != "config") else {
                return Err(ConfigError::UnknownKey { file: file.to_owned(), hint: hint(&command, &key), key });
            };
            let is_switch = matches!(arg.get_action(), ArgAction::SetTrue);
            let texts = match (value, matches!(arg.get_action(), ArgAction::Append)) {
                (toml::Value::Array(list), true) => list.into_iter().map(scalar).collect::<Result<_, _>>(),
                (value, _) => scalar(value).map(|text| vec![text]),
            }
            .map_err(bad)?;
            check(&command, &key, is_switch, &texts).map_err(bad)?;
            values.insert(key, texts);
        }
        Ok(Self { values })
    }

    /// Makes the file's values the defaults of those arguments that the command has.
    #[must_use]
    pub fn as_defaults(&self, command: Command) -> Command {
        command.mut_args(|arg| match self.values.get(arg.get_id().as_str()) {
            Some(values) => {
                let secret = arg.is_hide_env_values_set();
                arg.default_values(values.clone()).hide_default_value(secret)
            }
            None => arg,
        })
    }
}

/// The error and its place. The reader's own text also shows the line, which may contain a secret.
fn not_toml(error: &toml::de::Error, text: &str) -> String {
    let message = error.message().lines().next().unwrap_or_default();
    // Some of its messages repeat a value between backticks; none of the words around them is worth that.
    let message = if message.contains('`') { "this is not TOML" } else { message };
    let Some(at) = error.span().map(|span| span.start) else { return message.to_owned() };
    let before = &text[..text.floor_char_boundary(at)];
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("line {line}, column {column}: {message}")
}

fn scalar(value: toml::Value) -> Result<String, String> {
    match value {
        toml::Value::String(text) => Ok(text),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Boolean(flag) => Ok(flag.to_string()),
        toml::Value::Float(_) | toml::Value::Datetime(_) => Err("expected a text or a whole number".to_owned()),
        toml::Value::Array(_) => Err("expected one value, not a list".to_owned()),
        toml::Value::Table(_) => Err("expected a value, not a table: settings have no sections".to_owned()),
    }
}

/// Tries the values as the flag's.
fn check(command: &Command, key: &str, is_switch: bool, values: &[String]) -> Result<(), String> {
    if is_switch {
        return match values {
            [one] if one == "true" || one == "false" => Ok(()),
            _ => Err("expected true or false".to_owned()),
        };
    }
    let flag = key.replace('_', "-");
    let flags = values.iter().map(|value| format!("--{flag}={value}"));
    match command.clone().try_get_matches_from(flags) {
        Ok(_) => Ok(()),
        Err(error) => Err(match error.source() {
            Some(source) => source.to_string(),
            None => {
                let message = first_line(&error.to_string());
                // A secret's refusal names its flag, which is not what the file has.
                let flag = format!("--{} ", key.replace('_', "-"));
                let why = message.starts_with(&flag).then(|| message.split_once(": ")).flatten();
                why.map_or_else(|| message.clone(), |(_, why)| why.to_owned())
            }
        }),
    }
}

fn first_line(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

fn hint(command: &Command, key: &str) -> String {
    let mut names: Vec<(f64, &str)> = command
        .get_arguments()
        .map(|arg| arg.get_id().as_str())
        .filter(|name| *name != "config")
        .map(|name| (strsim::jaro_winkler(name, &key.replace('-', "_").to_lowercase()), name))
        .collect();
    names.sort_by(|a, b| b.0.total_cmp(&a.0));
    let near: Vec<_> = names.iter().take(3).filter(|(alike, _)| *alike >= ALIKE).map(|(_, name)| *name).collect();
    if near.is_empty() {
        names.sort_by_key(|(_, name)| *name);
        let all: Vec<_> = names.iter().map(|(_, name)| *name).collect();
        return format!("the settings are {}", all.join(", "));
    }
    format!("did you mean {}?", near.join(" or "))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::WorkerPriority;

    fn refusal(text: &str) -> String {
        ConfigFile::parse("t.toml", text).unwrap_err().to_string()
    }

    #[test]
    fn every_setting_can_be_in_the_file() {
        let text = r#"
            listen = "[::1]:9"
            worker = ["http://a:8000", "http://b:8000/v1"]
            worker_max_in_flight = 7
            worker_max_in_flight_cap = 70
            worker_priority = -3
            worker_health_path = "none"
            worker_health_interval = "30s"
            request_timeout = "1m 30s"
            worker_answer_memory = "64MiB"
            max_tries = 2
            data_dir = "/d"
            roles = ["scheduler", "api"]
            worker_api_key = "key"
            database_url = "postgres://u:p@h/d"
            database_connections = 20
            blobs = "s3://bucket/prefix"
            max_file_lines = 1_000
            max_file_bytes = "4GiB"
            openai_bad_files = "fail-batch"
            limit_requests_per_second = 20
            limit_bytes_per_day = "1GB"
            limit_queued_lines = 5000
            limit_concurrent_uploads = 3
            limit_infer_calls = 11
            limit_watches = 12
            limit_downloads = 13
            lease = "1m"
            flush_interval = "500ms"
            tls_cert = "c"
            tls_key = "k"
            tls_client_ca = "a"
            tokens = "t"
            insecure_allow_anonymous = true
            public_host = ["batch.example.com", "app.example.com"]
            webhook_allow_cidr = "10.0.0.0/8"
            webhook_https_only = true
            webhook_max_in_flight = 99
            webhook_retry_schedule = ["1s", "2m"]
            webhook_secret = "canary"
            master_key = "canary"
            master_key_file = "m"
            previous_master_key = "canary"
            max_connection_age = "1h"
            max_connections = 500
            drain_timeout = "5s"
            log_format = "json"
            log = "tidemill=debug"
        "#;
        let file = ConfigFile::parse("t.toml", text).unwrap();
        assert_eq!(file.values.len(), ServeConfig::command().get_arguments().count() - 1, "all but config");
        let config = ServeConfig::from_flags([], Some(&file)).unwrap();
        assert_eq!(config.worker.len(), 2);
        assert_eq!(config.role_names(), "api,scheduler");
        assert_eq!(config.worker_priority, WorkerPriority::Body(-3));
        assert_eq!((config.max_file_bytes, config.worker_answer_memory), (4 << 30, 64 << 20));
        assert_eq!((config.worker_health_path.path(), config.worker_health_interval.as_secs()), (None, 30));
        assert_eq!((config.limit_requests_per_second, config.limit_bytes_per_day), (20, 1_000_000_000));
        assert_eq!((config.limit_queued_lines, config.limit_concurrent_uploads), (5_000, 3));
        assert_eq!((config.limit_infer_calls, config.limit_watches, config.limit_downloads), (11, 12, 13));
        assert_eq!((config.public_host.len(), config.max_connections), (2, Some(500)));
        assert_eq!(config.request_timeout.as_secs(), 90);
        assert!(config.insecure_allow_anonymous);
        assert_eq!(config.webhook_allow_cidr[0].to_string(), "10.0.0.0/8");
        assert_eq!((config.webhook_max_in_flight, config.webhook_retry_schedule.len()), (99, 2));
        assert_eq!(config.webhook_retry_schedule[1].as_secs(), 120);
        let shown = format!("{config:?} {file:?}");
        assert!(!shown.contains("u:p") && !shown.contains("canary"), "no password in logs");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let message = refusal("lisen = \"127.0.0.1:1\"");
        assert!(message.starts_with("config file t.toml: unknown setting \"lisen\"; did you mean listen"), "{message}");
        assert!(refusal("data-dir = \"x\"").contains("did you mean data_dir"), "{}", refusal("data-dir = \"x\""));
        assert!(refusal("zzz = 1").contains("the settings are blobs, data_dir, "));
        assert!(refusal("config = \"x\"").contains("unknown setting"), "a file can't name another");
        let message = refusal("listen = \"here\"");
        assert!(message.starts_with("config file t.toml: listen: expected an address and a port"), "{message}");
        assert!(refusal("max_tries = 0").starts_with("config file t.toml: max_tries: 0 is not in 1..=100"));
        assert!(refusal("log_format = \"xml\"").contains("log_format: invalid value 'xml'"));
        assert!(refusal("[worker]\nurl = \"x\"").contains("worker: expected a value, not a table"));
        assert!(refusal("listen = [\"127.0.0.1:1\"]").contains("listen: expected one value"));
        assert!(refusal("insecure_allow_anonymous = 1").contains("expected true or false"));
        assert!(refusal("max_file_bytes = \"many\"").contains("10GB"));
        assert!(refusal("database_url = \"mysql://h/d\"").contains("expected postgres://"));
        assert!(refusal("worker = [1, 2").contains("is not valid TOML: line 1, column "));
        assert_eq!(
            refusal("worker_api_key = \"a b\""),
            "config file t.toml: worker_api_key: expected printable ASCII without spaces or line ends"
        );
        assert!(
            refusal("worker = \"gpu:8000\"").contains("worker: it does not begin with http:// or https://; expected")
        );
        assert!(ConfigFile::parse("t.toml", "\u{feff}max_tries = 2\r\n").is_ok(), "as Windows' editors write it");
        let priority = "worker_priority: expected auto, off or a whole number such as 10";
        assert!(refusal("worker_priority = \"low\"").contains(priority));
    }

    /// What a client of the same settings may give: values that are right for some of them, and nonsense.
    fn any_value() -> impl Strategy<Value = String> {
        prop_oneof![
            "[0-9]{1,6}",
            "[0-9]{1,4}(ms|s|m|h|d|KB|GiB)",
            "127\\.0\\.0\\.1:[0-9]{1,5}",
            "https?://[a-z]{1,5}(:[0-9]{1,4})?(,http://[a-z]{1,3})?",
            "10\\.[0-9]\\.0\\.0/(8|16|33)(,fd00::/8)?",
            "(postgres|mysql)://[a-z]{1,8}:[a-z]{1,8}@h/d",
            "(true|false|json|text|info|warn,tidemill=debug)",
            "[A-Za-z0-9+/]{43}=",
            "\\PC{0,12}",
        ]
    }

    proptest! {
        #[test]
        fn no_text_crashes_it_and_every_refusal_names_the_file(text in "\\PC{0,80}|([a-z_]{1,12} ?= ?[^\n]{0,12}\n){0,4}") {
            if let Err(error) = ConfigFile::parse("t.toml", &text) {
                prop_assert!(error.to_string().starts_with("config file t.toml"), "{error}");
            }
        }

        #[test]
        fn a_value_in_the_file_means_what_its_flag_means(pick in any::<prop::sample::Index>(), value in any_value()) {
            let command = ServeConfig::command();
            let all: Vec<_> = command.get_arguments().filter(|arg| arg.get_id() != "config").collect();
            let arg = pick.get(&all);
            let key = arg.get_id().as_str();
            let is_switch = matches!(arg.get_action(), ArgAction::SetTrue);
            let shown = if is_switch { value.clone() } else { toml::Value::String(value.clone()).to_string() };
            let file = ConfigFile::parse("t.toml", &format!("{key} = {shown}"));
            let flag = format!("--{}={value}", key.replace('_', "-"));
            match file {
                Ok(file) if is_switch => prop_assert!(ServeConfig::from_flags([], Some(&file)).is_ok()),
                Ok(file) => {
                    let (filed, flagged) = (ServeConfig::from_flags([], Some(&file)), ServeConfig::from_flags([flag.as_str()], None));
                    prop_assert_eq!(format!("{:?}", filed.unwrap()), format!("{:?}", flagged.unwrap()));
                }
                Err(error) => {
                    let message = error.to_string();
                    prop_assert!(is_switch || ServeConfig::from_flags([flag.as_str()], None).is_err(), "{message}");
                    prop_assert!(message.contains(key) || is_switch, "{message}");
                    let hidden = arg.is_hide_env_values_set() && value.len() > 10;
                    prop_assert!(!hidden || !message.contains(&value), "a secret is shown: {message}");
                }
            }
        }
    }
}
