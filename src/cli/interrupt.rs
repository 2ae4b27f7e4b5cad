//! Ctrl-C while a command follows a batch: the batch is the server's and goes on.

use std::future::Future;

use super::meter::note;

/// As a shell reports a process that SIGINT ended.
pub const EXIT_CODE: u8 = 130;

/// Follows a batch until it is done, or until Ctrl-C: then it says what becomes of the batch, and the exit code is 130.
///
/// # Errors
/// Those of `following`.
pub async fn or_interrupted(batch: &str, following: impl Future<Output = anyhow::Result<u8>>) -> anyhow::Result<u8> {
    tokio::select! {
        biased;
        // Without a handler Ctrl-C ends the process, as it always did.
        Ok(()) = tokio::signal::ctrl_c() => {
            note(&farewell(batch));
            Ok(EXIT_CODE)
        }
        done = following => done,
    }
}

fn farewell(batch: &str) -> String {
    // The terminal has written ^C, and the bar stands there.
    format!(
        "\nthe batch goes on without this command\n  follow it again: tidemill batch watch {batch}\n  end it:          tidemill \
         batch cancel {batch}"
    )
}
