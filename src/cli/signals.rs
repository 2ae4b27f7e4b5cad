//! What ends a server: SIGTERM or Ctrl-C in order, a second one at once, and a timer if the order takes too long.
//!
//! Signals are handled on a thread of their own, which also works when every thread of the runtime is blocked by a disk
//! that hangs or a log that nobody reads.

use std::{io, process, sync::mpsc, thread, time::Duration};

use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::meter::note;

/// The exit code of a process that SIGINT ended, as shells report it.
const INTERRUPTED: i32 = 130;
/// Subtracted from the limit, because exiting takes a moment.
const MARGIN: Duration = Duration::from_millis(300);
/// Time limit for a last message, because a full pipe may block it.
const WORD: Duration = Duration::from_millis(100);
/// Stands for no limit.
const FOR_EVER: Duration = Duration::from_secs(3_600);

/// Returns a token that SIGTERM or Ctrl-C cancels. A second signal ends the process at once. With a `limit`, the
/// process ends that long after the first signal whatever it does, and SIGHUP has no effect.
///
/// # Errors
/// The system refuses signal handlers or a thread.
pub fn on_signal(limit: Option<Duration>) -> io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let (ready, is_ready) = mpsc::sync_channel(1);
    let stop = token.clone();
    thread::Builder::new().name("signals".into()).spawn(move || {
        let listening = Builder::new_current_thread().enable_all().build();
        let _ = match listening {
            Ok(runtime) => runtime.block_on(listen(limit, &stop, &ready)),
            Err(error) => ready.send(Err(error)),
        };
    })?;
    is_ready.recv().map_err(io::Error::other)??;
    Ok(token)
}

async fn listen(
    limit: Option<Duration>,
    stop: &CancellationToken,
    ready: &mpsc::SyncSender<io::Result<()>>,
) -> Result<(), mpsc::SendError<io::Result<()>>> {
    let handlers = || {
        let hangup = limit.map(|_| signal(SignalKind::hangup())).transpose()?;
        io::Result::Ok((signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, hangup))
    };
    let (mut terminate, mut interrupt, mut hangup) = match handlers() {
        Ok(handlers) => handlers,
        Err(error) => return ready.send(Err(error)),
    };
    ready.send(Ok(()))?;
    let mut end_at = None;
    loop {
        let overdue = sleep_until(end_at.unwrap_or_else(|| Instant::now() + FOR_EVER));
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = hung_up(&mut hangup) => {
                say(|| tracing::warn!("SIGHUP does nothing: settings are read at the start; restart to change them"));
                continue;
            }
            () = overdue => {
                if end_at.is_some() {
                    say(|| tracing::error!("did not stop in time and ends now; its work is released when its leases end"));
                    process::exit(1);
                }
                continue;
            }
        }
        if end_at.is_some() || stop.is_cancelled() {
            say(|| note("stopped at once"));
            process::exit(INTERRUPTED);
        }
        stop.cancel();
        end_at = limit.map(|limit| Instant::now() + limit.saturating_sub(MARGIN));
    }
}

async fn hung_up(hangup: &mut Option<tokio::signal::unix::Signal>) {
    match hangup {
        Some(hangup) => drop(hangup.recv().await),
        None => std::future::pending().await,
    }
}

/// Runs `word`, which prints a message, on a thread of its own, and does not wait if the output is blocked.
fn say(word: impl FnOnce() + Send + 'static) {
    let (said, is_said) = mpsc::sync_channel(1);
    thread::spawn(move || {
        word();
        let _ = said.send(());
    });
    let _ = is_said.recv_timeout(WORD);
}
