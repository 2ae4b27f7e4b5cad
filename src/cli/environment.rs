//! Checks environment variables: those that look like settings but are none, and those that are empty.

use std::{
    collections::BTreeSet,
    env,
    ffi::{OsStr, OsString},
};

use clap::{Arg, ArgAction, Command};

/// The prefix of every setting's variable.
const PREFIX: &str = "TIDEMILL_";
/// Variables without a flag: the log filter of client commands, and the fault points of tests.
const WITHOUT_FLAG: [&str; 2] = ["TIDEMILL_LOG", "TIDEMILL_FAULT"];
/// The similarity (Jaro-Winkler, 0 to 1) from which a setting's variable is suggested.
const ALIKE: f64 = 0.85;
/// Under these headings an empty variable is refused: a server that took a missing secret or a missing directory for
/// "not set" would run open, unencrypted or on the wrong data.
const NEVER_EMPTY: [&str; 2] = ["Security", "Storage"];

/// Warnings about variables with our prefix that are not settings, most often misspelt ones. They never contain values.
pub fn warnings(command: &Command, names: impl IntoIterator<Item = OsString>) -> Vec<String> {
    let mut known: BTreeSet<String> = WITHOUT_FLAG.map(str::to_owned).into();
    collect(command, &mut known);
    let mut unknown: Vec<String> = names
        .into_iter()
        .map(|name| name.to_string_lossy().into_owned())
        .filter(|name| name.starts_with(PREFIX) && !known.contains(name) && !is_for_somebody_else(name))
        .collect();
    unknown.sort();
    unknown.into_iter().map(|name| warning(&name, &known)).collect()
}

fn warning(name: &str, known: &BTreeSet<String>) -> String {
    let alike = |one: &String| strsim::jaro_winkler(one.trim_start_matches(PREFIX), name.trim_start_matches(PREFIX));
    let nearest = known.iter().map(|one| (alike(one), one)).max_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        Some((alike, nearest)) if alike >= ALIKE => {
            format!("the environment variable {name} is not a setting and has no effect: did you mean {nearest}?")
        }
        _ => format!(
            "the environment variable {name} is not a setting and has no effect: `tidemill serve --help` lists the settings"
        ),
    }
}

/// Variables that Kubernetes sets for a Service whose name begins with "tidemill", and those of our own tests.
fn is_for_somebody_else(name: &str) -> bool {
    let rest = format!("_{}", name.trim_start_matches(PREFIX));
    let protocol = ["_TCP", "_UDP", "_SCTP"].iter().any(|protocol| rest.contains(protocol));
    rest.ends_with("_SERVICE_HOST")
        || rest.contains("_SERVICE_PORT")
        || rest.ends_with("_PORT")
        || (rest.contains("_PORT_") && protocol)
        || rest.starts_with("_TEST_")
}

fn collect(command: &Command, known: &mut BTreeSet<String>) {
    known.extend(command.get_arguments().filter_map(Arg::get_env).map(|name| name.to_string_lossy().into_owned()));
    command.get_subcommands().for_each(|command| collect(command, known));
}

/// Treats empty variables as not set, because Compose files and charts leave values that were not given empty. Where
/// that would be dangerous, the empty value is refused.
pub fn without_empty(command: Command) -> Command {
    without(command, &|name| env::var_os(name).is_some_and(|value| value.is_empty()))
}

fn without(command: Command, is_empty: &dyn Fn(&OsStr) -> bool) -> Command {
    let command = command.mut_args(|arg| match arg.get_env() {
        Some(name) if is_empty(name) && may_be_empty(&arg) => arg.env(None::<&'static str>),
        _ => arg,
    });
    // Rebuilds the command, because clap's own way to change all arguments takes no borrowing closure.
    let names: Vec<String> = command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, |command| without(command, is_empty)))
}

fn may_be_empty(arg: &Arg) -> bool {
    let is_switch = matches!(arg.get_action(), ArgAction::SetTrue | ArgAction::SetFalse);
    // A client without a token is admitted, or gets an error that asks for one.
    let secret = arg.is_hide_env_values_set() && arg.get_id() != "token";
    let guarded = arg.get_help_heading().is_some_and(|heading| NEVER_EMPTY.contains(&heading));
    is_switch || !(secret || guarded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(name: &str) -> Vec<String> {
        warnings(&super::super::command(), [OsString::from(name)])
    }

    #[test]
    fn a_misspelt_variable_is_told_with_the_nearest_name() {
        for (wrong, right) in [
            ("TIDEMILL_WORKERS", "TIDEMILL_WORKER"),
            ("TIDEMILL_DATADIR", "TIDEMILL_DATA_DIR"),
            ("TIDEMILL_WORKER_APIKEY", "TIDEMILL_WORKER_API_KEY"),
            ("TIDEMILL_DATABASE_UR", "TIDEMILL_DATABASE_URL"),
            ("TIDEMILL_TOKEN_FILES", "TIDEMILL_TOKEN_FILE"),
        ] {
            assert_eq!(told(wrong).len(), 1, "{wrong}");
            assert!(
                told(wrong)[0].contains(&format!("{wrong} is not a setting and has no effect: did you mean {right}?"))
            );
        }
        assert!(told("TIDEMILL_QQQQ")[0].contains("tidemill serve --help"), "{:?}", told("TIDEMILL_QQQQ"));
    }

    #[test]
    fn every_setting_and_what_others_set_is_left_in_peace() {
        let mut known = BTreeSet::new();
        collect(&super::super::command(), &mut known);
        assert!(known.len() > 40 && known.contains("TIDEMILL_WEBHOOK_SECRET") && known.contains("TIDEMILL_TLS_CA"));
        for name in known.iter().map(String::as_str).chain([
            "TIDEMILL_LOG",
            "TIDEMILL_FAULT",
            "PATH",
            "TIDEMILL",
            "TIDEMILL_SERVICE_HOST",
            "TIDEMILL_SERVICE_PORT",
            "TIDEMILL_SERVICE_PORT_GRPC",
            "TIDEMILL_PORT",
            "TIDEMILL_PORT_4080_TCP",
            "TIDEMILL_PORT_4080_TCP_ADDR",
            "TIDEMILL_API_SERVICE_HOST",
        ]) {
            assert_eq!(told(name), Vec::<String>::new(), "{name}");
        }
    }

    #[test]
    fn an_empty_variable_counts_as_unset_where_that_is_harmless() {
        let command = without(super::super::command(), &|_| true);
        let serve = command.find_subcommand("serve").unwrap();
        let is_read = |name: &str| {
            let arg = serve.get_arguments().find(|arg| arg.get_id() == name).unwrap();
            arg.get_env().is_some()
        };
        for name in ["worker", "listen", "webhook_https_only", "log", "max_tries"] {
            assert!(!is_read(name), "{name}");
        }
        for name in ["tokens", "master_key", "database_url", "worker_api_key", "blobs", "tls_client_ca", "data_dir"] {
            assert!(is_read(name), "{name}: an empty one is refused, not ignored");
        }
    }
}
