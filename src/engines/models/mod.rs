//! `models.toml`: the models that tidemill may load, and how each is started.
//!
//! - [`read`]: from the file's text to [`Models`], with every problem and its line.
//! - [`command`]: what is run for a model.
//! - [`check`]: what only the machine can tell, such as a missing program.

pub mod check;
pub mod command;
pub mod read;

use std::{collections::BTreeMap, fmt, time::Duration};

pub use command::{Launch, Launched};

use super::{
    place::Memory,
    policy::{Keep, ModelName, Spec},
};

/// The most engines of a model where `replicas` is not set.
const REPLICAS: usize = 64;

/// How a model's engine is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Preset {
    /// `vllm serve` with the flags that batches need.
    Vllm {
        /// The model's repository or directory.
        repository: String,
        /// The operator's flags, which win over the preset's.
        args: Vec<String>,
    },
    /// Any command.
    Cmd {
        /// Program and arguments, with placeholders.
        words: Vec<String>,
    },
}

/// A model that can be loaded: an entry of `[models]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// The name that requests use.
    pub name: ModelName,
    /// How it is started.
    pub preset: Preset,
    /// What ends it beside its signal, such as `docker stop`: program and arguments, with placeholders.
    pub stop_cmd: Option<Vec<String>>,
    /// The path that answers 200 once it serves.
    pub health: String,
    /// Variables that are added to the environment.
    pub env: BTreeMap<String, String>,
    /// The GPUs that one engine needs.
    pub gpus: usize,
    /// The memory of each of them that it needs.
    pub memory: Memory,
    /// What becomes of its engine when another model needs the GPUs.
    pub keep: Keep,
    /// Without demand for so long, its engine stops.
    pub idle: Option<Duration>,
    /// The most engines at a time.
    pub replicas: usize,
    /// More names for the same model.
    pub aliases: Vec<String>,
    /// Adapters that are loaded with it: names that requests use, and where each is.
    pub loras: BTreeMap<String, String>,
    /// The longest that a start may take.
    pub start_timeout: Duration,
    /// From SIGTERM to SIGKILL.
    pub stop_timeout: Duration,
}

impl Model {
    /// A model with the defaults of `vllm = "repository"`.
    #[must_use]
    pub fn vllm(name: &str, repository: &str) -> Self {
        Self {
            name: name.into(),
            preset: Preset::Vllm { repository: repository.to_owned(), args: Vec::new() },
            stop_cmd: None,
            health: "/health".to_owned(),
            env: BTreeMap::new(),
            gpus: 1,
            memory: Memory::Whole,
            keep: Keep::Stop,
            idle: None,
            replicas: REPLICAS,
            aliases: Vec::new(),
            loras: BTreeMap::new(),
            start_timeout: Duration::from_mins(30),
            stop_timeout: Duration::from_secs(30),
        }
    }

    /// Every name under which requests can ask for it, its own first.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.name.as_str())
            .chain(self.aliases.iter().map(String::as_str))
            .chain(self.loras.keys().map(String::as_str))
    }

    /// What the policy needs to know of it.
    #[must_use]
    pub fn spec(&self) -> Spec {
        Spec {
            model: self.name.clone(),
            gpus: self.gpus,
            memory: self.memory,
            keep: self.keep,
            idle: self.idle,
            replicas: self.replicas,
        }
    }
}

/// The GPUs that the file names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatedGpus {
    /// Their numbers.
    pub indexes: Vec<u32>,
    /// The memory of each, for machines on which it can't be found out.
    pub memory: Option<u64>,
}

/// All of the file. What exists is valid.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Models {
    /// The GPUs to use. `None`: all that are found.
    pub gpus: Option<StatedGpus>,
    /// The models, by name.
    pub models: Vec<Model>,
}

impl Models {
    /// The model that serves a name: its own name, an alias or an adapter.
    #[must_use]
    pub fn serving(&self, name: &str) -> Option<&Model> {
        self.models.iter().find(|model| model.names().any(|own| own == name))
    }
}

/// Something that is wrong with a file, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The line, from 1; `None` if it concerns the machine or the file as a whole.
    pub line: Option<usize>,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

/// Why a file can't be used: all of its problems, in the order of their lines.
#[derive(Debug, thiserror::Error)]
#[error("models file {file}: {}", .problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct ModelsError {
    /// Its path.
    pub file: String,
    /// The problems, at least one.
    pub problems: Vec<Problem>,
}
