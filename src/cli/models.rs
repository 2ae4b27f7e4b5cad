//! `tidemill models …`: the file of models that tidemill may load itself.

use std::{env, fs, path::PathBuf};

use anyhow::{Context, bail};
use clap::Subcommand;
use serde_json::json;

use super::out;
use crate::{
    engines::{
        gpus,
        models::{Launch, Model, Models, ModelsError, Problem, check},
        place::Memory,
    },
    words,
};

/// Commands for models.
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// Check a models file and show what would be run for each model. Nothing is started.
    #[command(
        after_help = "Example:\n  tidemill models check models.toml\n\nExit codes: 0 all is well; 1 the file has \
                            problems, each of which is named with its line, or a program or a GPU is missing here."
    )]
    Check {
        /// The file, such as models.toml.
        #[arg(required_unless_present = "model")]
        file: Option<PathBuf>,
        /// A model in short form, as if the file had it: its name and its repository. Repeatable.
        #[arg(long, value_name = "NAME=REPO")]
        model: Vec<String>,
    },
}

/// Runs a command.
///
/// # Errors
/// What went wrong, for people.
pub async fn run(command: ModelsCommand, json: bool) -> anyhow::Result<u8> {
    let ModelsCommand::Check { file, model } = command;
    let name = file.as_ref().map_or_else(|| "--model".to_owned(), |file| file.display().to_string());
    let text = match &file {
        Some(path) => {
            Some(fs::read_to_string(path).map_err(|error| anyhow::anyhow!(words::file(&error))).context(name.clone())?)
        }
        None => None,
    };
    let read = match text {
        Some(text) => Models::parse(&name, &text),
        None => Ok(Models::default()),
    };
    let (models, problems) = match read.and_then(|models| models.with(&model)) {
        Ok(models) => {
            let mut problems = check::missing(&models, &env::var("PATH").unwrap_or_default());
            problems.extend(check::unplaceable(&models, &gpus::find().await));
            (models, problems)
        }
        Err(ModelsError { problems, .. }) => (Models::default(), problems),
    };
    if json {
        let models: Vec<_> = models.models.iter().map(as_json).collect();
        let shown = |problem: &Problem| json!({"line": problem.line, "message": problem.message});
        let problems: Vec<_> = problems.iter().map(shown).collect();
        out::line(json!({"file": name, "models": models, "problems": problems}))?;
        return Ok(u8::from(!problems.is_empty()));
    }
    if !problems.is_empty() {
        let lines: Vec<_> = problems.iter().map(|problem| format!("\n  {problem}")).collect();
        bail!("{name} can't be used here:{}", lines.concat());
    }
    let rows: Vec<_> = models.models.iter().map(row).collect();
    out::table(["MODEL", "GPUS", "MEMORY", "ALSO NAMED", "COMMAND"], &rows)?;
    Ok(0)
}

/// What would be run, with an example of a port and the first GPUs.
fn command(model: &Model) -> String {
    let gpus: Vec<u32> = (0..).take(model.gpus).collect();
    let command = model.command(&Launch { port: 8000, gpus: &gpus, log: "engine.log", share: None });
    let env = command.env.iter().map(|(name, value)| format!("{name}={}", quoted(value)));
    let words = std::iter::once(&command.program).chain(&command.args).map(|word| quoted(word));
    env.chain(words).collect::<Vec<_>>().join(" ")
}

/// A word as a shell would need it.
fn quoted(word: &str) -> String {
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./:=,+@%".contains(letter);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

fn memory(model: &Model) -> Option<u64> {
    match model.memory {
        Memory::Whole => None,
        Memory::Bytes(bytes) => Some(bytes),
    }
}

fn row(model: &Model) -> [String; 5] {
    let memory = memory(model).map_or_else(|| "all".to_owned(), |bytes| bytesize::ByteSize(bytes).to_string());
    let also: Vec<_> = model.names().skip(1).collect();
    [model.name.to_string(), model.gpus.to_string(), memory, also.join(","), command(model)]
}

fn as_json(model: &Model) -> serde_json::Value {
    let names: Vec<_> = model.names().collect();
    json!({
        "name": model.name.as_str(), "names": names, "gpus": model.gpus, "memory": memory(model),
        "command": command(model),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_with_problems_and_one_that_is_not_there_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("models.toml");
        let check = |json| run(ModelsCommand::Check { file: Some(file.clone()), model: Vec::new() }, json);
        let message = format!("{:#}", check(false).await.unwrap_err());
        assert!(message.ends_with("models.toml: No such file or directory"), "{message}");
        fs::write(&file, "[models.a]\ncmd = \"sh\"\n[models.b]\nvlm = \"x\"\n").unwrap();
        let message = check(false).await.unwrap_err().to_string();
        let lines: Vec<_> = message.lines().skip(1).collect();
        let first = "  line 2: a: cmd must pass {port} on: it is where the engine has to listen";
        assert_eq!(lines[..1], [first]);
        assert!(lines[2].contains("line 4: unknown key \"vlm\"; did you mean vllm?"), "{message}");
        assert_eq!(check(true).await.unwrap(), 1);
        fs::write(&file, "[models.a]\ncmd = \"sh {port}\"\ngpus = 0\n").unwrap();
        assert_eq!((check(false).await.unwrap(), check(true).await.unwrap()), (0, 0));
    }

    #[test]
    fn commands_are_shown_as_a_shell_would_need_them() {
        let text = "[models.a]\ncmd = \"run --json '{}' {port}\"\nenv = { A = \"it's\" }\n";
        let models = Models::parse("m", text).unwrap();
        assert_eq!(command(&models.models[0]), "A='it'\\''s' CUDA_VISIBLE_DEVICES=0 run --json '{}' 8000");
        assert_eq!(as_json(&models.models[0])["names"][0], "a");
    }
}
