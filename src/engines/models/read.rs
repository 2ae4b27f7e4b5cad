//! Reads `models.toml`: every problem with its line, and what to do.

use std::{collections::BTreeMap, ops::RangeInclusive, time::Duration};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    Keep, Memory, Model, Models, ModelsError, Preset, Problem, StatedGpus,
    command::{PLACEHOLDERS, is_flag, placeholder, split},
};
use crate::config::{parse_bytes, parse_span};

/// The similarity (Jaro-Winkler, 0 to 1) from which a valid key is suggested for an unknown one.
const ALIKE: f64 = 0.75;
const SECTIONS: [&str; 3] = ["defaults", "gpus", "models"];
const DEFAULTS: [&str; 3] = ["start_timeout", "stop_timeout", "idle"];
const GPUS: [&str; 2] = ["use", "memory"];
const MODEL: [&str; 15] = [
    "vllm",
    "cmd",
    "args",
    "stop_cmd",
    "health",
    "env",
    "gpus",
    "memory",
    "keep",
    "idle",
    "replicas",
    "aliases",
    "loras",
    "start_timeout",
    "stop_timeout",
];
/// Flags of vLLM that would break what the preset relies on, each with what to do.
const RESERVED: [(&str, &str); 6] = [
    ("--host", "engines are reached on 127.0.0.1 only"),
    ("--port", "tidemill chooses the port"),
    ("--uds", "engines are reached on 127.0.0.1 only"),
    ("--api-key", "nobody but tidemill reaches the engine, and it sends none"),
    ("--served-model-name", "the name is that of the section, and more names are its aliases"),
    ("--lora-modules", "name adapters in loras"),
];
const START: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_hours(24);
const STOP: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_hours(1);
const IDLE: RangeInclusive<Duration> = Duration::from_secs(10)..=Duration::from_hours(24 * 365);
const LONGEST_NAME: usize = 256;
const MOST_GPUS: i64 = 64;

impl Models {
    /// Reads a file's text.
    ///
    /// # Errors
    /// [`ModelsError`] with every problem of the file.
    pub fn parse(file: &str, text: &str) -> Result<Self, ModelsError> {
        // Some editors put a byte order mark before the first line.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut reader = Reader { text, problems: Vec::new() };
        let models = match DeTable::parse(text) {
            Ok(table) => reader.file(table.get_ref()),
            Err(error) => {
                let at = error.span().map_or(0, |span| span.start);
                reader.problem(at, format!("this is not TOML: {}", error.message().lines().next().unwrap_or_default()));
                Self::default()
            }
        };
        if reader.problems.is_empty() {
            return Ok(models);
        }
        reader.problems.sort_by_key(|problem| problem.line);
        Err(ModelsError { file: file.to_owned(), problems: reader.problems })
    }

    /// Adds models of the short form `NAME=REPOSITORY`.
    ///
    /// # Errors
    /// [`ModelsError`] if it is not of that form, or a name occurs twice.
    pub fn with(mut self, shorts: &[String]) -> Result<Self, ModelsError> {
        let mut problems = Vec::new();
        for short in shorts {
            let pair = short.split_once('=').filter(|(_, repository)| !repository.is_empty());
            let Some((name, repository)) = pair else {
                let message = format!("{short:?}: expected NAME=REPOSITORY, such as qwen=Qwen/Qwen3-8B");
                problems.push(Problem { line: None, message });
                continue;
            };
            let twice = self.serving(name).map(|other| format!("the name {name:?} is already one of {}", other.name));
            if let Some(message) = bad_name(name).or(twice) {
                problems.push(Problem { line: None, message });
                continue;
            }
            self.models.push(Model::vllm(name, repository));
        }
        if problems.is_empty() { Ok(self) } else { Err(ModelsError { file: "--model".to_owned(), problems }) }
    }
}

struct Reader<'t> {
    text: &'t str,
    problems: Vec<Problem>,
}

type Value<'i> = Spanned<DeValue<'i>>;

impl Reader<'_> {
    fn problem(&mut self, at: usize, message: String) {
        let before = &self.text.as_bytes()[..at.min(self.text.len())];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        self.problems.push(Problem { line: Some(line), message });
    }

    fn unknown(&mut self, key: &Spanned<std::borrow::Cow<'_, str>>, known: &[&str]) {
        let name = key.get_ref();
        let alike = |one: &&&str| strsim::jaro_winkler(one, &name.replace('-', "_").to_lowercase());
        let nearest = known.iter().max_by(|a, b| alike(a).total_cmp(&alike(b))).filter(|one| alike(one) >= ALIKE);
        let hint = match nearest {
            Some(nearest) => format!("did you mean {nearest}?"),
            None => format!("expected {}", known.join(", ")),
        };
        self.problem(key.span().start, format!("unknown key {name:?}; {hint}"));
    }

    fn file(&mut self, table: &DeTable<'_>) -> Models {
        let mut models = Models::default();
        let mut defaults = Model::vllm("", "");
        for (key, value) in table {
            match key.get_ref().as_ref() {
                "defaults" => self.defaults(value, &mut defaults),
                "gpus" => models.gpus = self.gpus(value),
                "models" => {}
                _ => self.unknown(key, &SECTIONS),
            }
        }
        let Some(section) = table.get("models") else {
            if self.problems.is_empty() {
                let message = "there are no models: add a section such as [models.qwen] with vllm = \"Qwen/Qwen3-8B\"";
                self.problem(0, message.to_owned());
            }
            return models;
        };
        let mut taken = BTreeMap::new();
        for (key, value) in self.table(section).into_iter().flatten() {
            let at = key.span().start;
            let Some(table) = self.table(value) else { continue };
            if let Some(message) = bad_name(key.get_ref()) {
                self.problem(at, message);
                continue;
            }
            let Some(model) = self.model(at, key.get_ref(), table, &defaults) else { continue };
            for name in model.names() {
                if let Some(other) = taken.insert(name.to_owned(), model.name.clone()) {
                    let twice = if other == model.name {
                        "twice here".to_owned()
                    } else {
                        format!("already a name of {other}")
                    };
                    self.problem(
                        at,
                        format!("{}: the name {name:?} is {twice}; every name is for one model", model.name),
                    );
                }
            }
            self.fits(at, &model, models.gpus.as_ref());
            models.models.push(model);
        }
        models
    }

    fn defaults(&mut self, value: &Value<'_>, into: &mut Model) {
        for (key, value) in self.table(value).into_iter().flatten() {
            match key.get_ref().as_ref() {
                "start_timeout" => set(&mut into.start_timeout, self.span(value, &START)),
                "stop_timeout" => set(&mut into.stop_timeout, self.span(value, &STOP)),
                "idle" => set(&mut into.idle, self.idle(value)),
                _ => self.unknown(key, &DEFAULTS),
            }
        }
    }

    fn gpus(&mut self, value: &Value<'_>) -> Option<StatedGpus> {
        let at = value.span().start;
        let (mut indexes, mut memory) = (None, None);
        for (key, value) in self.table(value)? {
            match key.get_ref().as_ref() {
                "use" => indexes = self.indexes(value),
                "memory" => memory = self.bytes(value),
                _ => self.unknown(key, &GPUS),
            }
        }
        if indexes.is_none() && self.problems.is_empty() {
            self.problem(
                at,
                "[gpus] needs use, such as use = [0, 1]; leave the section out to use all GPUs".to_owned(),
            );
        }
        Some(StatedGpus { indexes: indexes?, memory })
    }

    fn indexes(&mut self, value: &Value<'_>) -> Option<Vec<u32>> {
        let mut indexes: Vec<u32> = Vec::new();
        for item in self.list(value, "a list of GPUs' numbers, such as [0, 1]")? {
            let index: u32 = self.number(item, 0..=1023)?;
            if indexes.contains(&index) {
                self.problem(item.span().start, format!("the GPU {index} is named twice"));
                return None;
            }
            indexes.push(index);
        }
        Some(indexes)
    }

    fn model(&mut self, at: usize, name: &str, table: &DeTable<'_>, defaults: &Model) -> Option<Model> {
        let mut model = Model { name: name.into(), ..defaults.clone() };
        let (mut repository, mut words, mut args) = (None, None, None);
        let before = self.problems.len();
        for (key, value) in table {
            match key.get_ref().as_ref() {
                "vllm" => repository = self.text(value),
                "cmd" => words = self.command(value),
                "args" => args = self.args(value),
                "stop_cmd" => model.stop_cmd = self.command(value),
                "health" => set(&mut model.health, self.path(value)),
                "env" => set(&mut model.env, self.env(value)),
                "gpus" => set(&mut model.gpus, self.number(value, 0..=MOST_GPUS)),
                "memory" => model.memory = self.bytes(value).map_or(Memory::Whole, Memory::Bytes),
                "keep" => set(&mut model.keep, self.keep(value)),
                "idle" => set(&mut model.idle, self.idle(value)),
                "replicas" => set(&mut model.replicas, self.replicas(value)),
                "aliases" => set(&mut model.aliases, self.names(value)),
                "loras" => set(&mut model.loras, self.texts(value)),
                "start_timeout" => set(&mut model.start_timeout, self.span(value, &START)),
                "stop_timeout" => set(&mut model.stop_timeout, self.span(value, &STOP)),
                _ => self.unknown(key, &MODEL),
            }
        }
        let has = |key: &str| table.contains_key(key);
        let wrong = match (has("vllm"), has("cmd")) {
            (true, true) => Some("vllm and cmd exclude each other: keep one"),
            (false, false) => Some("needs vllm = \"REPOSITORY\" or cmd = \"COMMAND … {port}\""),
            (false, true) if has("args") => Some("args are for vllm: write them into cmd"),
            (false, true) if has("loras") => {
                Some("loras are for vllm: with cmd, name what the engine serves in aliases")
            }
            (false, true) if has("keep") && model.keep == Keep::Sleep => {
                Some("keep = \"sleep\" is for vllm: a command has no calls for it")
            }
            (true, false) if has("stop_cmd") => Some("stop_cmd is for cmd: vllm ends by its signal"),
            _ => None,
        };
        if let Some(message) = wrong {
            self.problem(at, format!("{name}: {message}"));
        }
        model.preset = match (repository, words) {
            (Some(repository), None) => Preset::Vllm { repository, args: args.unwrap_or_default() },
            (None, Some(words)) => {
                let has_port = |word: &String| word.contains("{port}");
                if !words.iter().any(has_port) {
                    let at = table.get("cmd").map_or(at, |value| value.span().start);
                    self.problem(
                        at,
                        format!("{name}: cmd must pass {{port}} on: it is where the engine has to listen"),
                    );
                }
                Preset::Cmd { words }
            }
            _ => return None,
        };
        (self.problems.len() == before).then_some(model)
    }

    /// Whether GPUs that the file names can hold the model.
    fn fits(&mut self, at: usize, model: &Model, stated: Option<&StatedGpus>) {
        let (name, gpus) = (&model.name, model.gpus);
        if gpus == 0 && model.memory != Memory::Whole {
            self.problem(at, format!("{name}: memory is that of a GPU, and the model uses none (gpus = 0)"));
        }
        let Some(stated) = stated else { return };
        let there = stated.indexes.len();
        if gpus > there {
            self.problem(at, format!("{name}: needs {gpus} GPUs, and [gpus] use names {there}"));
        }
        if let (Memory::Bytes(need), Some(has)) = (model.memory, stated.memory)
            && need > has
        {
            self.problem(at, format!("{name}: its memory is more than a GPU's: see memory in [gpus]"));
        }
    }

    fn table<'v, 'i>(&mut self, value: &'v Value<'i>) -> Option<&'v DeTable<'i>> {
        let table = value.get_ref().as_table();
        if table.is_none() {
            self.problem(value.span().start, "expected a section, such as [models.qwen]".to_owned());
        }
        table
    }

    fn list<'v, 'i>(&mut self, value: &'v Value<'i>, expected: &str) -> Option<&'v [Value<'i>]> {
        let list = value.get_ref().as_array();
        if list.is_none() {
            self.problem(value.span().start, format!("expected {expected}"));
        }
        list.map(AsRef::as_ref)
    }

    fn text(&mut self, value: &Value<'_>) -> Option<String> {
        match value.get_ref().as_str() {
            Some(text) if !text.trim().is_empty() && !text.contains('\0') => Some(text.to_owned()),
            _ => {
                self.problem(value.span().start, "expected a text in quotes".to_owned());
                None
            }
        }
    }

    /// A text that another function understands.
    fn parsed<T>(&mut self, value: &Value<'_>, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let text = self.text(value)?;
        parse(&text).map_err(|message| self.problem(value.span().start, message)).ok()
    }

    fn number<T: TryFrom<i64>>(&mut self, value: &Value<'_>, range: RangeInclusive<i64>) -> Option<T> {
        let number =
            value.get_ref().as_integer().and_then(|number| i64::from_str_radix(number.as_str(), number.radix()).ok());
        let number = number.filter(|number| range.contains(number)).and_then(|number| T::try_from(number).ok());
        if number.is_none() {
            let message = format!("expected a whole number from {} to {}", range.start(), range.end());
            self.problem(value.span().start, message);
        }
        number
    }

    fn span(&mut self, value: &Value<'_>, range: &RangeInclusive<Duration>) -> Option<Duration> {
        self.parsed(value, |text| {
            let span = parse_span(text)?;
            let shown = |span: &Duration| humantime::format_duration(*span).to_string();
            let (least, most) = (shown(range.start()), shown(range.end()));
            if range.contains(&span) { Ok(span) } else { Err(format!("expected a time span from {least} to {most}")) }
        })
    }

    fn idle(&mut self, value: &Value<'_>) -> Option<Option<Duration>> {
        if value.get_ref().as_str() == Some("keep") {
            return Some(None);
        }
        self.span(value, &IDLE).map(Some)
    }

    fn bytes(&mut self, value: &Value<'_>) -> Option<u64> {
        self.parsed(value, |text| match parse_bytes(text)? {
            0 => Err("expected more than nothing, such as \"40GiB\"".to_owned()),
            bytes => Ok(bytes),
        })
    }

    fn keep(&mut self, value: &Value<'_>) -> Option<Keep> {
        self.parsed(value, |text| match text {
            "stop" => Ok(Keep::Stop),
            "sleep" => Ok(Keep::Sleep),
            _ => Err("expected \"stop\" or \"sleep\"".to_owned()),
        })
    }

    fn replicas(&mut self, value: &Value<'_>) -> Option<usize> {
        if value.get_ref().as_str() == Some("auto") {
            return Some(super::REPLICAS);
        }
        if value.get_ref().is_str() {
            self.problem(value.span().start, "expected \"auto\" or a whole number from 1".to_owned());
            return None;
        }
        self.number(value, 1..=super::REPLICAS as i64)
    }

    fn path(&mut self, value: &Value<'_>) -> Option<String> {
        self.parsed(value, |text| match text {
            path if path.starts_with('/') && !path.contains(char::is_whitespace) => Ok(path.to_owned()),
            _ => Err("expected a path that begins with /, such as \"/health\"".to_owned()),
        })
    }

    fn command(&mut self, value: &Value<'_>) -> Option<Vec<String>> {
        self.parsed(value, |text| {
            let words = split(text)?;
            words.iter().try_for_each(|word| known_placeholders(word))?;
            if words.first().is_none_or(String::is_empty) { Err("expected a command".to_owned()) } else { Ok(words) }
        })
    }

    fn args(&mut self, value: &Value<'_>) -> Option<Vec<String>> {
        let mut args = Vec::new();
        for item in self.list(value, "a list of texts, such as [\"--max-model-len\", \"16384\"]")? {
            // An argument may be empty, and may begin with spaces.
            let Some(arg) = item.get_ref().as_str().filter(|arg| !arg.contains('\0')) else {
                self.problem(item.span().start, "expected a text in quotes, numbers too: \"16384\"".to_owned());
                return None;
            };
            let reserved = RESERVED.iter().find(|(flag, _)| is_flag(arg, flag));
            let reserved = reserved.map(|(flag, why)| format!("{flag} can't be set here: {why}"));
            if let Some(message) = reserved.or_else(|| known_placeholders(arg).err()).or_else(|| two_in_one(arg)) {
                self.problem(item.span().start, message);
                return None;
            }
            args.push(arg.to_owned());
        }
        Some(args)
    }

    fn names(&mut self, value: &Value<'_>) -> Option<Vec<String>> {
        let mut names = Vec::new();
        for item in self.list(value, "a list of names, such as [\"gpt-4o-mini\"]")? {
            let name = self.parsed(item, |name| match bad_name(name) {
                Some(message) => Err(message),
                None => Ok(name.to_owned()),
            })?;
            names.push(name);
        }
        Some(names)
    }

    /// A table of names and texts.
    fn texts(&mut self, value: &Value<'_>) -> Option<BTreeMap<String, String>> {
        let mut texts = BTreeMap::new();
        for (key, value) in self.table(value)? {
            if let Some(message) = bad_name(key.get_ref()) {
                self.problem(key.span().start, message);
                return None;
            }
            texts.insert(key.get_ref().to_string(), self.text(value)?);
        }
        Some(texts)
    }

    fn env(&mut self, value: &Value<'_>) -> Option<BTreeMap<String, String>> {
        let mut env = BTreeMap::new();
        for (key, value) in self.table(value)? {
            let name = key.get_ref();
            let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
            if name.is_empty() || !name.chars().all(is_name) || name.starts_with(|letter: char| letter.is_ascii_digit())
            {
                self.problem(key.span().start, format!("{name:?} can't be a variable's name"));
                return None;
            }
            if name == "CUDA_VISIBLE_DEVICES" {
                let message = "tidemill chooses the GPUs: say how many in gpus, and which may be used in [gpus] use";
                self.problem(key.span().start, message.to_owned());
                return None;
            }
            let Some(text) = value.get_ref().as_str().filter(|text| !text.contains('\0')) else {
                self.problem(value.span().start, "expected a text in quotes, numbers too: \"1\"".to_owned());
                return None;
            };
            env.insert(name.to_string(), text.to_owned());
        }
        Some(env)
    }
}

fn set<T>(target: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *target = value;
    }
}

/// Why a text can't be a model's name.
fn bad_name(name: &str) -> Option<String> {
    let bad =
        name.is_empty() || name.len() > LONGEST_NAME || name.contains(|l: char| l.is_control() || l.is_whitespace());
    bad.then(|| format!("{name:?} can't be a name: expected 1 to {LONGEST_NAME} bytes without spaces"))
}

fn known_placeholders(text: &str) -> Result<(), String> {
    let mut rest = text;
    while let Some((_, name, after)) = placeholder(rest) {
        if !PLACEHOLDERS.contains(&name) {
            let known = PLACEHOLDERS.map(|name| format!("{{{name}}}")).join(" ");
            return Err(format!("{{{name}}} is no placeholder; there are {known}"));
        }
        rest = after;
    }
    Ok(())
}

/// A flag and its value in one text is the usual slip with lists of arguments.
fn two_in_one(arg: &str) -> Option<String> {
    let (flag, value) = arg.split_once(' ')?;
    let is_flag = flag.starts_with("--") && !flag.contains('=');
    is_flag.then(|| format!("{arg:?} is one argument; write two: {flag:?}, {:?}", value.trim()))
}

#[cfg(test)]
#[path = "read/tests.rs"]
mod tests;
