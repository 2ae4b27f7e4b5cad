//! The GPUs of this machine and who holds their memory, as `nvidia-smi` tells.
//!
//! What it prints depends on where it runs: in a container process ids are the host's or absent, and with MIG or WDDM
//! the memory of a process is `[N/A]`. So totals always count, and processes only where they are known.

use std::{io, path::Path, process::Stdio, time::Duration};

use tokio::{process::Command, time::timeout};

use super::place::Gpu;

/// The arguments that list GPUs.
const GPUS: [&str; 2] = ["--query-gpu=index,uuid,memory.total,memory.used", "--format=csv,noheader,nounits"];
/// The arguments that list processes on GPUs.
const PROCESSES: [&str; 2] = ["--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits"];
/// The longest that it may take. With many GPUs and no persistence mode it takes seconds.
const LONGEST: Duration = Duration::from_secs(30);
const MIB: u64 = 1024 * 1024;

/// A GPU as found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its number.
    pub index: u32,
    /// Its id, which stays the same over restarts.
    pub uuid: String,
    /// Its memory in bytes; 0 if that is not told.
    pub total: u64,
    /// The bytes of it that are in use.
    pub used: u64,
}

/// A process that holds memory of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnGpu {
    /// The GPU's id.
    pub uuid: String,
    /// The process, as far as it is told.
    pub pid: Option<u32>,
    /// The bytes that it holds, as far as that is told.
    pub bytes: Option<u64>,
}

/// Why GPUs can't be listed.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// There is no such program.
    #[error("there is no nvidia-smi on PATH")]
    NoProgram,
    /// It can't be run.
    #[error("nvidia-smi can't be run: {0}")]
    NotRun(io::Error),
    /// It took too long.
    #[error("nvidia-smi did not answer within 30 s")]
    TooSlow,
    /// It failed; this is what it said.
    #[error("nvidia-smi failed: {0}")]
    Failed(String),
    /// It said something unexpected.
    #[error("nvidia-smi printed a line that is not understood: {0:?}")]
    NotUnderstood(String),
}

/// Lists the GPUs of this machine.
///
/// # Errors
/// [`GpuError`].
pub async fn find() -> Result<Vec<Found>, GpuError> {
    gpus(&nvidia_smi(Path::new("nvidia-smi"), GPUS).await?)
}

/// Lists the processes that hold memory of GPUs.
///
/// # Errors
/// [`GpuError`].
pub async fn holders() -> Result<Vec<OnGpu>, GpuError> {
    processes(&nvidia_smi(Path::new("nvidia-smi"), PROCESSES).await?)
}

async fn nvidia_smi(program: &Path, args: [&str; 2]) -> Result<String, GpuError> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).kill_on_drop(true);
    let output = match timeout(LONGEST, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => return Err(GpuError::NoProgram),
        Ok(Err(error)) => return Err(GpuError::NotRun(error)),
        Err(_) => return Err(GpuError::TooSlow),
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(said);
    }
    // It reports most failures on stdout.
    let error = String::from_utf8_lossy(&output.stderr);
    let line = error.lines().chain(said.lines()).map(str::trim).find(|line| !line.is_empty());
    Err(GpuError::Failed(line.map_or_else(|| output.status.to_string(), str::to_owned)))
}

fn fields<const N: usize>(line: &str) -> Option<[&str; N]> {
    let all: Vec<&str> = line.split(',').map(str::trim).collect();
    all.try_into().ok()
}

/// A number of MiB in bytes. `None` if it is not told, as in `[N/A]`.
fn mib(field: &str) -> Option<u64> {
    field.parse::<u64>().ok().map(|number| number.saturating_mul(MIB))
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty())
}

fn gpus(text: &str) -> Result<Vec<Found>, GpuError> {
    let gpu = |line: &str| {
        let [index, uuid, total, used] = fields(line)?;
        let (total, used) = (mib(total).unwrap_or(0), mib(used).unwrap_or(0));
        Some(Found { index: index.parse().ok()?, uuid: uuid.to_owned(), total, used })
    };
    lines(text).map(|line| gpu(line).ok_or_else(|| GpuError::NotUnderstood(line.to_owned()))).collect()
}

fn processes(text: &str) -> Result<Vec<OnGpu>, GpuError> {
    let process = |line: &str| {
        let [uuid, pid, bytes] = fields(line)?;
        Some(OnGpu { uuid: uuid.to_owned(), pid: pid.parse().ok(), bytes: mib(bytes) })
    };
    lines(text).map(|line| process(line).ok_or_else(|| GpuError::NotUnderstood(line.to_owned()))).collect()
}

/// The GPUs as the policy sees them: what others than our own processes hold counts as foreign. `held` says how many
/// bytes our engines are expected to hold on a GPU, for where processes are not told.
#[must_use]
pub fn for_policy(found: &[Found], on_gpus: &[OnGpu], ours: &[u32], held: impl Fn(u32) -> u64) -> Vec<Gpu> {
    let gpu = |gpu: &Found| {
        let own = on_gpus.iter().filter(|one| one.uuid == gpu.uuid && one.pid.is_some_and(|pid| ours.contains(&pid)));
        let own: Option<Vec<u64>> = own.map(|one| one.bytes).collect();
        let own = match own {
            Some(bytes) if !bytes.is_empty() => bytes.iter().sum(),
            _ => held(gpu.index),
        };
        Gpu { index: gpu.index, total: gpu.total, foreign: gpu.used.saturating_sub(own) }
    };
    found.iter().map(gpu).collect()
}

/// Why less than `need` bytes of a GPU are free, and who holds the rest. `None`: enough are. `name` is the name of a
/// process, where it is known.
#[must_use]
pub fn shortage(gpu: &Found, on_gpus: &[OnGpu], need: u64, name: impl Fn(u32) -> Option<String>) -> Option<String> {
    let free = gpu.total.saturating_sub(gpu.used);
    if gpu.total == 0 || free >= need {
        return None;
    }
    let gib = |bytes: u64| format!("{:.1}", bytes as f64 / (1024.0 * 1024.0 * 1024.0));
    let mut text = format!("gpu {} has {} of {} GiB free", gpu.index, gib(free), gib(gpu.total));
    let mut here: Vec<&OnGpu> = on_gpus.iter().filter(|one| one.uuid == gpu.uuid).collect();
    here.sort_by_key(|one| std::cmp::Reverse(one.bytes));
    for one in here.into_iter().take(3) {
        let holds = one.bytes.map_or_else(|| "some".to_owned(), |bytes| format!("{} GiB", gib(bytes)));
        let who = match one.pid {
            Some(pid) => format!("pid {pid}{}", name(pid).map_or_else(String::new, |name| format!(" {name}"))),
            None => "a process that this machine does not tell".to_owned(),
        };
        text.push_str(&format!("; {who} holds {holds}"));
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "0, GPU-5f3a, 81559, 77000\n1, GPU-77b0, 81559, 4\n";
    const GIB: u64 = 1 << 30;

    #[test]
    fn gpus_are_read_and_what_is_not_told_is_not_guessed() {
        let found = gpus(TWO).unwrap();
        assert_eq!((found.len(), found[1].index, found[1].uuid.as_str()), (2, 1, "GPU-77b0"));
        assert_eq!((found[0].total, found[0].used), (81_559 * MIB, 77_000 * MIB));
        assert_eq!(gpus("0, GPU-1, [N/A], [N/A]\r\n").unwrap()[0].total, 0, "as with unified memory");
        assert_eq!(gpus("\n").unwrap(), []);
        let message = gpus("No devices were found").unwrap_err().to_string();
        assert_eq!(message, "nvidia-smi printed a line that is not understood: \"No devices were found\"");
    }

    #[test]
    fn memory_of_others_is_what_our_processes_do_not_hold() {
        let found = gpus(TWO).unwrap();
        let on_gpus = processes("GPU-5f3a, 4711, 70000\nGPU-5f3a, 12, 6000\nGPU-77b0, [N/A], [N/A]\n").unwrap();
        let seen = for_policy(&found, &on_gpus, &[12], |_| 0);
        assert_eq!((seen[0].foreign, seen[1].foreign), (71_000 * MIB, 4 * MIB));
        assert_eq!(for_policy(&found, &on_gpus, &[12, 4711], |_| 0)[0].foreign, 1000 * MIB);
        let hidden = processes("GPU-5f3a, 12, [N/A]\n").unwrap();
        assert_eq!(for_policy(&found, &hidden, &[12], |_| 77_000 * MIB)[0].foreign, 0, "what we expect to hold");
        assert_eq!(for_policy(&found, &[], &[12], |_| 0)[0].foreign, 77_000 * MIB);
    }

    #[test]
    fn who_holds_the_memory_is_named() {
        let found = gpus(TWO).unwrap();
        let on_gpus = processes("GPU-5f3a, 12, 1000\nGPU-5f3a, 4711, 73626\nGPU-5f3a, [N/A], [N/A]\n").unwrap();
        let name = |pid| (pid == 4711).then(|| "python".to_owned());
        assert_eq!(
            shortage(&found[0], &on_gpus, 40 * GIB, name).unwrap(),
            "gpu 0 has 4.5 of 79.6 GiB free; pid 4711 python holds 71.9 GiB; pid 12 holds 1.0 GiB; \
             a process that this machine does not tell holds some"
        );
        assert_eq!(shortage(&found[0], &on_gpus, GIB, name), None);
        assert_eq!(shortage(&Found { total: 0, ..found[0].clone() }, &[], GIB, name), None, "not known");
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_program_that_fails_says_why() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("smi");
        let absent = nvidia_smi(&program, GPUS).await.unwrap_err();
        assert_eq!(absent.to_string(), "there is no nvidia-smi on PATH");
        std::fs::write(
            &program,
            "#!/bin/sh\n[ \"$2\" = --format=csv,noheader,nounits ] || exit 3\necho \"$1\"\nexit $(cat \"$0\".rc)\n",
        )
        .unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::write(folder.path().join("smi.rc"), "0").unwrap();
        assert_eq!(nvidia_smi(&program, GPUS).await.unwrap().trim(), GPUS[0]);
        std::fs::write(folder.path().join("smi.rc"), "9").unwrap();
        let failed = nvidia_smi(&program, PROCESSES).await.unwrap_err();
        assert_eq!(failed.to_string(), format!("nvidia-smi failed: {}", PROCESSES[0]));
    }
}
