//! Ctrl-C while a command follows a batch: the command ends, the batch continues on the server.

use std::future::Future;

use super::meter::note;

/// The exit code of a process that SIGINT ended, as shells report it.
pub const EXIT_CODE: u8 = 130;

/// Follows a batch until it ends or until Ctrl-C. On Ctrl-C it says how to follow or cancel the batch, and the exit
/// code is 130.
///
/// # Errors
/// Those of `following`.
pub async fn or_interrupted(batch: &str, following: impl Future<Output = anyhow::Result<u8>>) -> anyhow::Result<u8> {
    tokio::select! {
        biased;
        // Without a handler Ctrl-C ends the process directly.
        Ok(()) = tokio::signal::ctrl_c() => {
            note(&farewell(batch));
            Ok(EXIT_CODE)
        }
        done = following => done,
    }
}

fn farewell(batch: &str) -> String {
    // The terminal has written ^C next to the bar.
    format!(
        "\nthe batch continues without this command\n  follow it again: tidemill batch watch {batch}\n  cancel it:       \
         tidemill batch cancel {batch}"
    )
}
