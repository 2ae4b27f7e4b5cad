//! No secret is ever printed: over all settings that hold one, in all ways to give them, right or wrong. What counts as a
//! secret is what help hides (`hide_env_values`), so that a new one is covered on its own.

use std::{ffi::OsString, os::unix::ffi::OsStringExt as _};

use clap::{Arg, Command};
use proptest::prelude::*;

use super::{command, parse};
use crate::config::ConfigFile;

/// In every value, and in no other text.
const CANARY: &str = "C4n4ry";

/// Every command that takes a secret, with the secret and what else the command needs.
fn secrets() -> Vec<(Vec<String>, Arg)> {
    fn walk(command: &Command, all_globals: &[Arg], path: &[String], found: &mut Vec<(Vec<String>, Arg)>) {
        let mut args: Vec<Arg> = command.get_arguments().cloned().collect();
        // What is taken everywhere is read in one way everywhere: one command is enough.
        let globals = if path.last().is_some_and(|name| name == "list") { all_globals } else { &[] };
        args.extend(
            globals
                .iter()
                .filter(|global| !args.iter().any(|arg| arg.get_id() == global.get_id()))
                .cloned()
                .collect::<Vec<_>>(),
        );
        if !command.has_subcommands() {
            for secret in args.iter().filter(|arg| arg.is_hide_env_values_set()) {
                let mut line = path.to_vec();
                for other in args.iter().filter(|arg| arg.is_required_set() && arg.get_id() != secret.get_id()) {
                    line.extend(other.get_long().map(|long| format!("--{long}")));
                    line.push("x".to_owned());
                }
                found.push((line, secret.clone()));
            }
        }
        for sub in command.get_subcommands() {
            walk(sub, all_globals, &[path, &[sub.get_name().to_owned()]].concat(), found);
        }
    }
    let (mut found, command) = (Vec::new(), command());
    let globals: Vec<Arg> = command.get_arguments().filter(|arg| arg.is_global_set()).cloned().collect();
    walk(&command, &globals, &["tidemill".to_owned()], &mut found);
    found
}

/// Whatever comes of a command line, as people may see it.
fn shown(line: &[String], rest: &[OsString]) -> String {
    let all: Vec<OsString> = line.iter().map(OsString::from).chain(rest.iter().cloned()).collect();
    match parse(all) {
        Ok(cli) => format!("{cli:?}"),
        Err(error) => format!("{error}\n{error:?}"),
    }
}

/// All spellings in which a command line can contain this value.
fn ways(secret: &Arg, value: &OsString) -> Vec<Vec<OsString>> {
    given_as(secret.get_long().unwrap(), value)
}

fn given_as(name: &str, value: &OsString) -> Vec<Vec<OsString>> {
    let mut joined = OsString::from(format!("--{name}="));
    joined.push(value);
    vec![vec![format!("--{name}").into(), value.clone()], vec![joined]]
}

/// Under misspelt names, twice, and before nonsense.
fn wrong_ways(secret: &Arg, value: &OsString) -> Vec<Vec<OsString>> {
    let long = secret.get_long().unwrap();
    let names = [format!("{long}x"), long.replace('-', "_"), long[..long.len() - 1].to_owned()];
    let mut ways: Vec<_> = names.iter().flat_map(|name| given_as(name, value)).collect();
    ways.push(vec![format!("--{long}").into(), value.clone(), format!("--{long}").into(), value.clone()]);
    ways.push(vec![format!("--{long}").into(), value.clone(), "--no-such-flag".into()]);
    ways
}

fn nonsense() -> Vec<OsString> {
    let mut all: Vec<OsString> = [
        "",
        " key",
        "key\n",
        "key\n\n",
        "k\u{e9}y",
        "key key",
        "\u{1b}[2J",
        "--",
        "-",
        "-k",
        "--json",
        "://u:p@h",
        "whsec_!",
        "@h",
        "=",
        ",",
    ]
    .iter()
    .flat_map(|odd| [format!("{CANARY}{odd}"), format!("{odd}{CANARY}")])
    .map(OsString::from)
    .collect();
    for url in [
        "postgres://u:C4n4ry#x@h/d",
        "postgres://u:C4n4ry/x@h/d",
        "postgres://C4n4ry:5432x/d",
        "postgres://u:p@C4n4ry:x/d",
        "postgres://h/d?sslmode=C4n4ry",
        "postgres://h/d?C4n4ry=1",
        "postgres://h/d?port=C4n4ry",
        "postgres://h/d?host=C4n4ry%ff",
        "postgres://u:C4n4ry%ff@h/d",
        "mysql://u:C4n4ry@h/d",
    ] {
        all.push(url.into());
    }
    all.push(CANARY.repeat(2_000).into());
    all.push(OsString::from_vec([CANARY.as_bytes(), b"\xff"].concat()));
    all
}

#[test]
fn no_secret_of_a_command_line_is_printed() {
    let secrets = secrets();
    for known in
        ["token", "worker_api_key", "database_url", "webhook_secret", "master_key", "previous_master_key", "secret"]
    {
        assert!(secrets.iter().any(|(_, secret)| secret.get_id() == known), "{known} is no longer hidden");
    }
    for (line, secret) in &secrets {
        let odd = nonsense().into_iter().flat_map(|value| ways(secret, &value));
        for way in
            odd.chain(wrong_ways(secret, &CANARY.into())).chain(wrong_ways(secret, &format!("{CANARY} x").into()))
        {
            let shown = shown(line, &way);
            assert!(!shown.contains(CANARY), "{line:?} {way:?}:\n{shown}");
        }
    }
}

#[test]
fn a_refused_secret_is_named_with_its_variable() {
    let text = shown(&["tidemill".into(), "serve".into()], &["--worker-api-key".into(), "a b".into()]);
    assert!(
        text.starts_with(
            "error: --worker-api-key <KEY> (or TIDEMILL_WORKER_API_KEY): expected printable ASCII without spaces or line ends"
        ),
        "{text}"
    );
}

/// Every secret setting in the file, right or wrong or not TOML at all.
fn file_texts(key: &str, value: &str) -> Vec<String> {
    let quoted = toml::Value::String(value.to_owned()).to_string();
    vec![
        format!("{key} = {quoted}"),
        format!("{key} = {value}"),
        format!("{key} = \"{value}"),
        format!("{key} = '{value}"),
        format!("{key} = \"{value}\" \"{value}\""),
        format!("{key} = [{quoted}]"),
        format!("{key} = {{ value = {quoted} }}"),
        format!("{key} = {quoted}\n{key} = {quoted}"),
        format!("max_tries = 3\n{key} {value}"),
        format!("{key} = \"\"\"{value}"),
    ]
}

fn shown_of_file(key: &str, value: &str) -> Vec<String> {
    let texts = file_texts(key, value).into_iter();
    texts
        .map(|text| match ConfigFile::parse("t.toml", &text) {
            Ok(file) => format!("{file:?}"),
            Err(error) => format!("{error}\n{error:?}"),
        })
        .collect()
}

#[test]
fn no_secret_of_a_file_is_printed() {
    let serve = command().find_subcommand("serve").unwrap().clone();
    for secret in serve.get_arguments().filter(|arg| arg.is_hide_env_values_set() && !arg.is_global_set()) {
        let key = secret.get_id().as_str();
        for value in nonsense().iter().filter_map(|value| value.to_str()) {
            for shown in shown_of_file(key, value) {
                assert!(!shown.contains(CANARY), "{key} = {value:?}:\n{shown}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn no_text_around_a_secret_makes_it_shown(before in "\\PC{0,6}", after in "\\PC{0,6}", pick in any::<prop::sample::Index>()) {
        let value = format!("{before}{CANARY}{after}");
        let all = secrets();
        let (line, secret) = pick.get(&all);
        for way in ways(secret, &OsString::from(&value)) {
            let shown = shown(line, &way);
            prop_assert!(!shown.contains(CANARY), "{:?}:\n{}", way, shown);
        }
        for key in ["worker_api_key", "database_url"] {
            for shown in shown_of_file(key, &value) {
                prop_assert!(!shown.contains(CANARY), "{} {:?}:\n{}", key, value, shown);
            }
        }
    }
}
