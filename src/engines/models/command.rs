//! What is run for a model: program, arguments and environment.

use std::{collections::BTreeMap, time::Duration};

use super::{Keep, Model, Preset};

/// The placeholders of `cmd`, `args` and `stop_cmd`.
pub(super) const PLACEHOLDERS: [&str; 4] = ["port", "model", "gpus", "log"];
/// The most adapters that vLLM runs at a time; further ones take turns. Each takes memory.
const LORAS: usize = 8;
/// How much longer vLLM itself may take to get ready than tidemill waits: tidemill's limit is the one that counts.
const LONGER: Duration = Duration::from_mins(1);

/// Where an engine is started.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch<'a> {
    /// The port of 127.0.0.1 that it must serve on.
    pub port: u16,
    /// Its GPUs.
    pub gpus: &'a [u32],
    /// Its log file.
    pub log: &'a str,
    /// The share of each GPU's memory that it may take, 0 to 1. `None`: its own default.
    pub share: Option<f64>,
}

/// A command to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// The program.
    pub program: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// What is added to the environment.
    pub env: BTreeMap<String, String>,
}

impl Model {
    /// The command that starts an engine.
    #[must_use]
    pub fn command(&self, launch: &Launch<'_>) -> Launched {
        let fill = |text: &String| fill(text, self, launch);
        let (program, args) = match &self.preset {
            Preset::Cmd { words } => {
                let mut words = words.iter().map(fill);
                (words.next().unwrap_or_default(), words.collect())
            }
            Preset::Vllm { repository, args } => {
                let own: Vec<String> = args.iter().map(fill).collect();
                ("vllm".to_owned(), self.vllm_args(repository, own, launch))
            }
        };
        let mut env = self.preset_env();
        if !launch.gpus.is_empty() {
            env.insert("CUDA_VISIBLE_DEVICES".to_owned(), comma(launch.gpus));
        }
        env.extend(self.env.iter().map(|(name, value)| (name.clone(), value.clone())));
        Launched { program, args, env }
    }

    /// The command that ends an engine beside the signal, if the model has one.
    #[must_use]
    pub fn stop_command(&self, launch: &Launch<'_>) -> Option<Launched> {
        let mut words = self.stop_cmd.as_ref()?.iter().map(|word| fill(word, self, launch));
        Some(Launched { program: words.next()?, args: words.collect(), env: self.env.clone() })
    }

    fn vllm_args(&self, repository: &str, own: Vec<String>, launch: &Launch<'_>) -> Vec<String> {
        let mut args = Args { own, all: vec!["serve".to_owned(), repository.to_owned()] };
        args.add(&["--host"], &["127.0.0.1"]);
        args.add(&["--port"], &[&launch.port.to_string()]);
        let names: Vec<&str> =
            std::iter::once(self.name.as_str()).chain(self.aliases.iter().map(String::as_str)).collect();
        args.add(&["--served-model-name"], &names);
        args.add(&["--disable-uvicorn-access-log"], &[]);
        args.add(&["--enable-request-id-headers"], &[]);
        args.add(&["--scheduling-policy"], &["priority"]);
        if self.gpus > 1 {
            let parallel =
                ["--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp"];
            args.add(&parallel, &[&self.gpus.to_string()]);
        }
        if let Some(share) = launch.share {
            args.add(&["--gpu-memory-utilization", "--kv-cache-memory-bytes"], &[&format!("{share:.3}")]);
        }
        if self.keep == Keep::Sleep {
            args.add(&["--enable-sleep-mode"], &[]);
        }
        if !self.loras.is_empty() {
            let modules: Vec<String> = self.loras.iter().map(|(name, path)| format!("{name}={path}")).collect();
            args.add(&["--enable-lora"], &[]);
            args.add(&["--max-loras"], &[&self.loras.len().min(LORAS).to_string()]);
            args.add(&["--lora-modules"], &modules.iter().map(String::as_str).collect::<Vec<_>>());
        }
        args.all.extend(args.own);
        args.all
    }

    fn preset_env(&self) -> BTreeMap<String, String> {
        let mut env = BTreeMap::new();
        let Preset::Vllm { .. } = self.preset else { return env };
        let ready = (self.start_timeout + LONGER).as_secs().to_string();
        for (name, value) in [
            ("VLLM_NO_USAGE_STATS", "1"),
            ("VLLM_LOGGING_COLOR", "0"),
            ("NO_COLOR", "1"),
            ("VLLM_ENGINE_READY_TIMEOUT_S", ready.as_str()),
        ] {
            env.insert(name.to_owned(), value.to_owned());
        }
        if self.keep == Keep::Sleep {
            env.insert("VLLM_SERVER_DEV_MODE".to_owned(), "1".to_owned());
        }
        env
    }
}

/// vLLM's arguments: the preset's, as far as the operator has not given them.
struct Args {
    own: Vec<String>,
    all: Vec<String>,
}

impl Args {
    /// Adds a flag, unless the operator gave it or one that stands for the same.
    fn add(&mut self, flags: &[&str], values: &[&str]) {
        if self.own.iter().any(|arg| flags.iter().any(|flag| is_flag(arg, flag))) {
            return;
        }
        self.all.extend(flags.first().map(|flag| (*flag).to_owned()));
        self.all.extend(values.iter().map(|value| (*value).to_owned()));
    }
}

/// Whether an argument is that flag, alone or with its value. vLLM reads `_` in flags as `-`.
pub(super) fn is_flag(arg: &str, flag: &str) -> bool {
    let name = arg.split_once('=').map_or(arg, |(name, _)| name);
    name.starts_with('-') && name.replace('_', "-") == flag
}

fn comma(gpus: &[u32]) -> String {
    gpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn fill(text: &str, model: &Model, launch: &Launch<'_>) -> String {
    let mut filled = String::new();
    let mut rest = text;
    while let Some((before, name, after)) = placeholder(rest) {
        filled.push_str(before);
        match name {
            "port" => filled.push_str(&launch.port.to_string()),
            "model" => filled.push_str(model.name.as_str()),
            "gpus" => filled.push_str(&comma(launch.gpus)),
            "log" => filled.push_str(launch.log),
            other => filled.push_str(other),
        }
        rest = after;
    }
    filled.push_str(rest);
    filled
}

/// The first `{word}` of a text: what stands before it, the word, what stands after it. Other braces are text.
pub(super) fn placeholder(text: &str) -> Option<(&str, &str, &str)> {
    for (at, _) in text.match_indices('{') {
        let inside = &text[at + 1..];
        let end = inside.find(|letter: char| !letter.is_ascii_lowercase())?;
        if end > 0 && inside[end..].starts_with('}') {
            return Some((&text[..at], &inside[..end], &inside[end + 1..]));
        }
    }
    None
}

/// Splits a command into words as a shell would, with quotes and backslashes, and expands nothing.
///
/// # Errors
/// A quote is open at the end.
pub(super) fn split(text: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word, mut is_word) = (Vec::new(), String::new(), false);
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\'' | '"' => {
                is_word = true;
                loop {
                    match letters.next() {
                        Some(inner) if inner == letter => break,
                        Some('\\') if letter == '"' => word.extend(letters.next()),
                        Some(inner) => word.push(inner),
                        None => return Err(format!("the quote {letter} is never closed")),
                    }
                }
            }
            '\\' => match letters.next() {
                // A line that goes on in the next one.
                Some('\n') => {}
                Some(inner) => {
                    is_word = true;
                    word.push(inner);
                }
                None => return Err("a backslash at the end stands for nothing".to_owned()),
            },
            space if space.is_whitespace() => {
                if is_word {
                    words.push(std::mem::take(&mut word));
                }
                is_word = false;
            }
            other => {
                is_word = true;
                word.push(other);
            }
        }
    }
    if is_word {
        words.push(word);
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(gpus: &[u32]) -> Launch<'_> {
        Launch { port: 8123, gpus, log: "/l/x.log", share: None }
    }

    #[test]
    fn vllm_gets_the_flags_that_batches_need() {
        let mut model = Model::vllm("qwen", "Qwen/Qwen3-8B");
        let command = model.command(&launch(&[3]));
        assert_eq!(
            (command.program + " " + &command.args.join(" ")).as_str(),
            "vllm serve Qwen/Qwen3-8B --host 127.0.0.1 --port 8123 --served-model-name qwen --disable-uvicorn-access-log \
             --enable-request-id-headers --scheduling-policy priority"
        );
        assert_eq!(command.env["CUDA_VISIBLE_DEVICES"], "3");
        assert_eq!(command.env["VLLM_ENGINE_READY_TIMEOUT_S"], "1860", "a minute more than start_timeout");
        assert!(!command.env.contains_key("VLLM_SERVER_DEV_MODE"));
        model.aliases.push("gpt".to_owned());
        model.loras.insert("sql".to_owned(), "/m/sql".to_owned());
        (model.gpus, model.keep) = (2, Keep::Sleep);
        let command = model.command(&Launch { share: Some(0.5), ..launch(&[0, 1]) });
        let args = command.args.join(" ");
        for part in [
            "--served-model-name qwen gpt --",
            "--tensor-parallel-size 2",
            "--gpu-memory-utilization 0.500",
            "--enable-sleep-mode",
            "--enable-lora --max-loras 1 --lora-modules sql=/m/sql",
        ] {
            assert!(args.contains(part), "{part}: {args}");
        }
        assert_eq!(
            (command.env["CUDA_VISIBLE_DEVICES"].as_str(), command.env["VLLM_SERVER_DEV_MODE"].as_str()),
            ("0,1", "1")
        );
    }

    #[test]
    fn the_operators_flags_and_variables_win() {
        let mut model = Model::vllm("qwen", "Qwen/Qwen3-8B");
        let args = ["--scheduling-policy=fcfs", "--pipeline_parallel_size", "2", "--tag", "{port}"];
        model.preset = Preset::Vllm { repository: "r".to_owned(), args: args.map(str::to_owned).to_vec() };
        model.gpus = 2;
        model.env.insert("NO_COLOR".to_owned(), "0".to_owned());
        let command = model.command(&launch(&[]));
        let text = command.args.join(" ");
        assert!(text.ends_with("--scheduling-policy=fcfs --pipeline_parallel_size 2 --tag 8123"), "{text}");
        assert!(!text.contains("priority") && !text.contains("tensor"), "{text}");
        assert_eq!((command.env["NO_COLOR"].as_str(), command.env.get("CUDA_VISIBLE_DEVICES")), ("0", None));
    }

    #[test]
    fn commands_have_their_placeholders_filled_and_nothing_else() {
        let words = split("run 'a b' --json '{\"x\":{port}}' \\\n {gpus} {log} --name=tm-{model} $HOME").unwrap();
        let model = Model { preset: Preset::Cmd { words }, ..Model::vllm("m", "") };
        let command = model.command(&launch(&[0, 2]));
        assert_eq!(command.program, "run");
        assert_eq!(command.args, ["a b", "--json", "{\"x\":8123}", "0,2", "/l/x.log", "--name=tm-m", "$HOME"]);
        assert_eq!(command.env.len(), 1, "only the GPUs: {:?}", command.env);
        let model = Model { stop_cmd: Some(split("docker stop tm-{model}").unwrap()), ..model };
        assert_eq!(model.stop_command(&launch(&[])).unwrap().args, ["stop", "tm-m"]);
    }

    #[test]
    fn words_are_split_as_by_a_shell() {
        assert_eq!(split(r#"a  "b \" c"'d e'f \  "" "#).unwrap(), ["a", "b \" cd ef", " ", ""]);
        assert!(split("a 'b").is_err() && split("a \\").is_err());
        assert_eq!(split(" \n ").unwrap(), [""; 0]);
    }
}
