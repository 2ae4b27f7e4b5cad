//! The number of connections to workers that this process can afford.

use tokio::sync::Semaphore;

/// The fewest connections, whatever the limit on open files.
const FEWEST: usize = 16;

/// Half of the files that this process may have open: the rest is for the database, objects, clients, webhooks, and for
/// connections that are kept for the next request.
pub(super) fn budget() -> usize {
    // Where there is no such file nothing is known of a limit.
    of(std::fs::read_to_string("/proc/self/limits").ok().as_deref().and_then(soft_limit))
}

/// Reads the soft limit on open files from Linux's list of limits. `None`: unlimited.
fn soft_limit(limits: &str) -> Option<usize> {
    let rest = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    rest.split_whitespace().next()?.parse().ok()
}

fn of(soft: Option<usize>) -> usize {
    soft.map_or(Semaphore::MAX_PERMITS, |soft| (soft / 2).clamp(FEWEST, Semaphore::MAX_PERMITS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_left_for_everything_else() {
        assert_eq!((of(Some(256)), of(Some(1_048_576)), of(Some(8))), (128, 524_288, FEWEST));
        assert_eq!(of(None), Semaphore::MAX_PERMITS);
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max processes             63432                63432                processes \n\
                      Max open files            1024                 524288               files     \n";
        assert_eq!(soft_limit(limits), Some(1_024));
        assert_eq!(soft_limit(&limits.replace("1024", "unlimited")), None);
    }
}
