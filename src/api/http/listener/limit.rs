//! How many connections there may be.

/// The most connections where nothing is set and descriptors are plenty. Each costs some 30 KiB.
const PLENTY: u64 = 10_000;
/// The assumed limit of open files where the system does not report one: the usual soft limit.
const USUAL_DESCRIPTORS: u64 = 1_024;

/// How many connections this server keeps open: as many as are set, or [`PLENTY`], and never more than half of the
/// descriptors that the process may have. The other half is for files, the database and the workers.
pub(super) fn most(set: Option<u32>) -> usize {
    let room = descriptors().unwrap_or(USUAL_DESCRIPTORS) / 2;
    let wanted = set.map_or(PLENTY, u64::from);
    if set.is_some() && wanted > room {
        tracing::warn!(
            "--max-connections {wanted} is more than half of the {} files that this process may have open: {room} \
             connections are kept at most; raise the limit (ulimit -n, LimitNOFILE=)",
            room * 2
        );
    }
    usize::try_from(wanted.min(room)).unwrap_or(usize::MAX).max(1)
}

/// How many descriptors this process may have open (its soft limit).
#[cfg(target_os = "linux")]
fn descriptors() -> Option<u64> {
    soft_limit(&std::fs::read_to_string("/proc/self/limits").ok()?)
}

#[cfg(not(target_os = "linux"))]
fn descriptors() -> Option<u64> {
    None
}

/// The soft limit of open files in the words of `/proc/self/limits`.
#[cfg(target_os = "linux")]
fn soft_limit(limits: &str) -> Option<u64> {
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace().next()?;
    if soft == "unlimited" { Some(u64::MAX) } else { soft.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn the_limit_is_read_and_bounds_what_is_set() {
        let text = "Limit  Soft Limit  Hard Limit  Units\nMax processes  7  9  processes\nMax open files            1024  \
                    524288     files\n";
        assert_eq!(soft_limit(text), Some(1_024));
        assert_eq!(soft_limit("Max open files   unlimited  unlimited files"), Some(u64::MAX));
        assert_eq!(soft_limit(""), None);
        let room = descriptors().unwrap() / 2;
        assert_eq!(most(Some(5)), 5);
        assert_eq!(most(Some(u32::MAX)) as u64, room.min(u64::from(u32::MAX)));
        assert_eq!(most(None) as u64, room.min(PLENTY));
    }
}
