//! What only the machine can tell about a file: whether the programs and GPUs are there. Nothing is started.

use std::{
    env,
    path::{Path, PathBuf},
};

use super::{Launch, Memory, Model, Models, Preset, Problem};
use crate::engines::gpus::{Found, GpuError};

/// The port and log of a command that is only shown.
const SHOWN: Launch<'static> = Launch { port: 8000, gpus: &[], log: "engine.log", share: None };

/// What is missing on this machine. `path` is the search path for programs, as in `PATH`.
#[must_use]
pub fn missing(models: &Models, path: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    for model in &models.models {
        let programs = [Some(model.command(&SHOWN)), model.stop_command(&SHOWN)];
        for program in programs.into_iter().flatten().map(|command| command.program) {
            if find(&program, path).is_none() {
                let hint = if matches!(model.preset, Preset::Vllm { .. }) {
                    "install vLLM, or put the directory of its `vllm` on PATH"
                } else {
                    "write its whole path, or put its directory on PATH"
                };
                let message = format!("{}: there is no program {program:?}: {hint}", model.name);
                problems.push(Problem { line: None, message });
            }
        }
        problems.extend(adapters(model));
    }
    problems
}

/// What the GPUs of this machine can't do for the models. Only a file that names GPUs works without `nvidia-smi`.
#[must_use]
pub fn unplaceable(models: &Models, found: &Result<Vec<Found>, GpuError>) -> Vec<Problem> {
    let problem = |message: String| Problem { line: None, message };
    let stated = models.gpus.as_ref();
    let found = match (found, stated) {
        (Ok(found), _) => found,
        (Err(_), Some(_)) => return Vec::new(),
        (Err(_), None) if models.models.iter().all(|model| model.gpus == 0) => return Vec::new(),
        (Err(error), None) => {
            let message = format!("the GPUs of this machine are not known: {error}. Name them: [gpus] with use = [0]");
            return vec![problem(message)];
        }
    };
    let is_there = |index: u32| found.iter().any(|gpu| gpu.index == index);
    let mut problems: Vec<Problem> = stated
        .into_iter()
        .flat_map(|stated| &stated.indexes)
        .filter(|index| !is_there(**index))
        .map(|index| problem(format!("[gpus] use names the GPU {index}, and this machine has {}", found.len())))
        .collect();
    let may_use = |gpu: &&Found| stated.is_none_or(|stated| stated.indexes.contains(&gpu.index));
    let usable: Vec<_> = found.iter().filter(may_use).collect();
    for model in &models.models {
        let fits = |gpu: &&&Found| match model.memory {
            Memory::Whole => true,
            Memory::Bytes(bytes) => stated.and_then(|stated| stated.memory).unwrap_or(gpu.total) >= bytes,
        };
        let large = usable.iter().filter(fits).count();
        if model.gpus > usable.len() {
            let there = usable.len();
            problems.push(problem(format!("{}: needs {} GPUs, and there are {there} to use", model.name, model.gpus)));
        } else if model.gpus > large {
            let message = format!("{}: its memory is more than that of {} GPUs", model.name, usable.len() - large);
            problems.push(problem(message));
        }
    }
    problems
}

/// Adapters given as absolute paths must be there; other names may be repositories.
fn adapters(model: &Model) -> Vec<Problem> {
    let absent = model.loras.iter().filter(|(_, path)| Path::new(path).is_absolute() && !Path::new(path).exists());
    let message = |(name, path)| format!("{}: the adapter {name} is not at {path}", model.name);
    absent.map(|adapter| Problem { line: None, message: message(adapter) }).collect()
}

/// Where a program is, as the system would find it.
fn find(program: &str, path: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(PathBuf::from(program)).filter(|file| is_program(file));
    }
    env::split_paths(path).map(|folder| folder.join(program)).find(|file| is_program(file))
}

#[cfg(unix)]
fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    file.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

#[cfg(not(unix))]
fn is_program(file: &Path) -> bool {
    file.is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_programs_and_adapters_are_named() {
        let text = "[models.a]\nvllm = \"x\"\nloras = { l = \"/no/such/place\", r = \"org/lora\" }\n\
                    [models.b]\ncmd = \"sh {port}\"\nstop_cmd = \"/no/such/stop\"\n";
        let models = Models::parse("m.toml", text).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = format!("{}:/bin:/usr/bin", folder.path().display());
        let found: Vec<_> = missing(&models, &path).iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "a: there is no program \"vllm\": install vLLM, or put the directory of its `vllm` on PATH",
                "a: the adapter l is not at /no/such/place",
                "b: there is no program \"/no/such/stop\": write its whole path, or put its directory on PATH",
            ]
        );
        std::fs::write(folder.path().join("vllm"), "").unwrap();
        assert_eq!(missing(&models, &path).len(), 3, "a file that can't be run is no program");
    }

    #[test]
    fn what_the_gpus_can_not_do_is_named() {
        let found = |indexes: &[u32]| {
            let gpu = |index: &u32| Found { index: *index, uuid: String::new(), total: 80 << 30, used: 0 };
            Ok(indexes.iter().map(gpu).collect::<Vec<_>>())
        };
        let told = |text: &str, found: &Result<Vec<Found>, GpuError>| {
            let models = Models::parse("m.toml", text).unwrap();
            unplaceable(&models, found).iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        };
        let two = "[models.a]\nvllm = \"x\"\ngpus = 2\n";
        assert_eq!(told(two, &found(&[0, 1])), "");
        assert_eq!(told(two, &found(&[0])), "a: needs 2 GPUs, and there are 1 to use");
        let absent = Err(GpuError::NoProgram);
        let message = told(two, &absent);
        assert!(message.contains("there is no nvidia-smi on PATH. Name them: [gpus]"), "{message}");
        assert_eq!(told(&two.replace('2', "0"), &absent), "", "it needs none");
        let stated = format!("[gpus]\nuse = [0, 5]\n{two}");
        assert_eq!(told(&stated, &absent), "");
        let message = told(&stated, &found(&[0, 1]));
        assert!(
            message.starts_with("[gpus] use names the GPU 5, and this machine has 2\na: needs 2 GPUs"),
            "{message}"
        );
        let large = two.replace("gpus = 2", "memory = \"90GiB\"");
        assert_eq!(told(&large, &found(&[0, 1])), "a: its memory is more than that of 2 GPUs");
        assert_eq!(told(&large.replace("90", "70"), &found(&[0, 1])), "");
    }
}
