//! The limit of open files and connections of the process.

/// Raises the soft limit on open files, which shells and containers set to 1,024 or less, to the hard one: each request
/// to a worker, each client and each webhook needs one.
#[cfg(target_os = "linux")]
pub(super) fn raise() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let before = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: before.maximum, ..before });
    let now = getrlimit(Resource::Nofile).current;
    let in_words = |limit: Option<u64>| limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    match raised {
        Ok(()) => tracing::info!(was = in_words(before.current), now = in_words(now), "limit of open files"),
        Err(error) => {
            tracing::warn!(%error, limit = in_words(now), "the limit of open files can't be raised; set it with ulimit -n");
        }
    }
}

/// Other systems: does not change the limit.
#[cfg(not(target_os = "linux"))]
pub(super) fn raise() {}
