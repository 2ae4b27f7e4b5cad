//! The `tidemill` command: reads the command line and calls the library.

use std::{env, ffi::OsString, io::Write as _, process::ExitCode};

use tidemill::cli::{self, UsageError};

fn main() -> ExitCode {
    let args: Vec<OsString> = env::args_os().collect();
    let cli = match cli::parse(args.clone()) {
        Ok(cli) => cli,
        // Wrong usage is told on stderr with code 2; help that was asked for goes to stdout with code 0.
        Err(UsageError::Usage(error)) => {
            if error.use_stderr() && cli::asks_for_json(&args) {
                say(&cli::json_line(error.to_string().trim_end()));
            } else {
                let printed = error.print();
                let is_full = printed.is_err_and(|error| error.kind() != std::io::ErrorKind::BrokenPipe);
                if is_full && !error.use_stderr() {
                    return ExitCode::FAILURE;
                }
            }
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
        Err(UsageError::Config(error)) => return fail(&error.into(), cli::asks_for_json(&args)),
    };
    let json = cli.fails_in_json();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::from(error).context("starting the runtime"), json),
    };
    let result = runtime.block_on(cli::run(cli));
    // A read of stdin that nobody waits for any more, or a write to a disk that hangs, would hold the process up.
    runtime.shutdown_background();
    result.unwrap_or_else(|error| fail(&error, json))
}

fn fail(error: &anyhow::Error, json: bool) -> ExitCode {
    match cli::report(error) {
        Some(text) => {
            say(&if json { cli::json_line(&text) } else { format!("error: {text}") });
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}

fn say(line: &str) {
    // Nobody is left to be told if stderr is gone.
    let _ = writeln!(std::io::stderr(), "{line}");
}
