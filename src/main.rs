//! The `tidemill` command: reads the command line and calls the library.

use std::{env, io::Write as _, process::ExitCode};

use tidemill::cli::{self, UsageError};

fn main() -> ExitCode {
    let cli = match cli::parse(env::args_os().collect::<Vec<_>>()) {
        Ok(cli) => cli,
        // Wrong usage is told on stderr with code 2; help that was asked for goes to stdout with code 0.
        Err(UsageError::Usage(error)) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
        Err(UsageError::Config(error)) => return fail(&error.into()),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::from(error).context("starting the runtime")),
    };
    let result = runtime.block_on(cli::run(cli));
    // A read of stdin that nobody waits for any more would hold the process up.
    runtime.shutdown_background();
    result.unwrap_or_else(|error| fail(&error))
}

fn fail(error: &anyhow::Error) -> ExitCode {
    match cli::report(error) {
        Some(text) => {
            // Nobody is left to be told if stderr is gone.
            let _ = writeln!(std::io::stderr(), "error: {text}");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}
