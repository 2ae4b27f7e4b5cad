//! What ends a server: SIGTERM and Ctrl-C in order, a second one at once, and the clock if the order takes too long.
//!
//! Signals are heard on a thread of their own. It works also when nothing else does: when every thread of the runtime
//! waits for a disk that hangs, or for somebody to read the log.

use std::{io, process, sync::mpsc, thread, time::Duration};

use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::meter::note;

/// What a shell reports of a process that SIGINT has ended.
const INTERRUPTED: i32 = 130;
/// Before the limit: the process itself takes a moment to end.
const MARGIN: Duration = Duration::from_millis(300);
/// How long a last word may take: nobody may read it.
const WORD: Duration = Duration::from_millis(100);
/// For a server without a limit: an hour is for ever.
const FOR_EVER: Duration = Duration::from_secs(3_600);

/// A token that SIGTERM or Ctrl-C cancels. A second signal ends the process at once. With a `limit` the first one ends
/// it after that time, whatever the process does, and SIGHUP does nothing.
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
                    say(|| tracing::error!("did not stop in time and ends now; leases give back what it had"));
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

/// Says something, unless nobody takes it.
fn say(word: impl FnOnce() + Send + 'static) {
    let (said, is_said) = mpsc::sync_channel(1);
    thread::spawn(move || {
        word();
        let _ = said.send(());
    });
    let _ = is_said.recv_timeout(WORD);
}
