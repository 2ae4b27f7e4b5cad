//! Why an engine failed to start, from what it logged, and what follows. Pure.
//!
//! vLLM's last lines say "Engine core initialization failed. See root cause above": so the cause is the first line with
//! an exception that is not such a summary, and what it says decides whether another try makes sense.

use std::time::Duration;

/// The longest part of a line that is shown.
const SHOWN: usize = 300;
/// The pauses after the first, second, … failure; the last one from then on.
const PAUSES: [Duration; 5] = [
    Duration::from_secs(10),
    Duration::from_secs(30),
    Duration::from_mins(2),
    Duration::from_mins(10),
    Duration::from_mins(30),
];
/// A model that has served for so long has recovered: its failures are forgotten.
pub const RECOVERED: Duration = Duration::from_mins(10);
/// Lines that only point at the cause.
const SUMMARIES: [&str; 3] = ["See root cause above", "Engine core initialization failed", "Engine core proc"];

/// A kind of failure. It decides what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A flag or a setting is wrong.
    Configuration,
    /// The model is not there, or may not be fetched.
    Model,
    /// The model does not fit into the memory that it has.
    TooLarge,
    /// Others hold the memory.
    MemoryHeld,
    /// Others freed or took memory while it measured.
    MemoryMoved,
    /// Somebody else listens on its port.
    Port,
    /// Anything else: a crash, a start that took too long.
    Other,
}

/// What follows a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Try again at once; the failure does not count.
    AtOnce,
    /// Try again when the memory is free; the failure does not count.
    WhenMemoryIsFree,
    /// Try again after a pause.
    After(Duration),
    /// Try again when the configuration changes.
    WhenConfigured,
}

/// Words of a log, and what they mean. The first that occurs in the cause counts.
const WORDS: [(&str, Failure); 17] = [
    ("error: unrecognized arguments", Failure::Configuration),
    ("error: argument ", Failure::Configuration),
    ("validation error", Failure::Configuration),
    ("Free memory on device", Failure::MemoryHeld),
    ("Error in memory profiling", Failure::MemoryMoved),
    ("address already in use", Failure::Port),
    ("Address already in use", Failure::Port),
    ("CUDA out of memory", Failure::TooLarge),
    ("No available memory for the cache blocks", Failure::TooLarge),
    ("larger than the maximum number of tokens", Failure::TooLarge),
    ("is not a valid model identifier", Failure::Model),
    ("GatedRepoError", Failure::Model),
    ("RepositoryNotFoundError", Failure::Model),
    ("Repository Not Found", Failure::Model),
    ("401 Client Error", Failure::Model),
    ("gated repo", Failure::Model),
    ("Invalid repository ID or local directory", Failure::Model),
];

/// What a start's log says about its failure: the kind, and the line that says it best.
#[must_use]
pub fn cause(log: &str) -> (Failure, Option<String>) {
    let telling = log.lines().map(message).filter(|line| !SUMMARIES.iter().any(|summary| line.contains(summary)));
    let known = |line: &str| WORDS.iter().find(|(words, _)| line.contains(words)).map(|(_, failure)| *failure);
    if let Some((line, failure)) = telling.clone().find_map(|line| Some((line, known(line)?))) {
        return (failure, Some(cut(line)));
    }
    let exception = telling.clone().find(|line| is_exception(line));
    let last = || telling.clone().rfind(|line| !line.is_empty());
    (Failure::Other, exception.or_else(last).map(cut))
}

/// What follows the failure that is the `count`th of this kind that counts, from 1.
#[must_use]
pub fn next(failure: Failure, count: usize) -> Next {
    let longest = PAUSES[PAUSES.len() - 1];
    let pause = PAUSES.get(count.saturating_sub(1)).copied().unwrap_or(longest);
    match failure {
        Failure::Configuration => Next::WhenConfigured,
        Failure::TooLarge if count >= 2 => Next::WhenConfigured,
        Failure::Model if count >= 2 => Next::After(longest),
        Failure::MemoryHeld => Next::WhenMemoryIsFree,
        // A memory that moves all the time is a failure like others.
        Failure::MemoryMoved if count <= 1 => Next::AtOnce,
        Failure::Port => Next::AtOnce,
        Failure::TooLarge | Failure::Model | Failure::MemoryMoved | Failure::Other => Next::After(pause),
    }
}

/// What an operator can change.
#[must_use]
pub fn advice(failure: Failure) -> Option<&'static str> {
    match failure {
        Failure::Configuration => Some("change its args in models.toml"),
        Failure::Model => Some("check its repository, and give the server's environment a HF_TOKEN that may read it"),
        Failure::TooLarge => Some("give it more gpus, or a smaller --max-model-len or --max-num-seqs in its args"),
        Failure::MemoryHeld | Failure::MemoryMoved | Failure::Port | Failure::Other => None,
    }
}

/// A line without vLLM's prefix, such as `(EngineCore pid=7) ERROR 08-22 10:00:00 [core.py:9] `.
fn message(line: &str) -> &str {
    let line = line.trim();
    let line = match line.strip_prefix('(').and_then(|rest| rest.split_once(") ")) {
        Some((inside, rest)) if inside.contains("pid=") => rest,
        _ => line,
    };
    let is_level = ["ERROR ", "WARNING ", "INFO ", "CRITICAL "].iter().any(|level| line.starts_with(level));
    match line.split_once("] ") {
        Some((_, rest)) if is_level => rest.trim(),
        _ => line,
    }
}

/// Whether a line begins with an exception's name, as the last line of a Python traceback does.
fn is_exception(line: &str) -> bool {
    let Some((name, _)) = line.split_once(": ") else { return false };
    let is_name = name.chars().all(|letter| letter.is_ascii_alphanumeric() || "._".contains(letter));
    is_name && ["Error", "Exception", "Interrupt"].iter().any(|end| name.ends_with(end))
}

fn cut(line: &str) -> String {
    if line.len() <= SHOWN {
        return line.to_owned();
    }
    format!("{}…", &line[..line.floor_char_boundary(SHOWN)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_found_above_the_last_lines() {
        let log = "INFO 08-22 10:00:00 [api.py:1] starting\n\
                   (EngineCore pid=77) ERROR 08-22 10:00:09 [core.py:9] Traceback (most recent call last):\n\
                   (EngineCore pid=77) ERROR 08-22 10:00:09 [core.py:9] ValueError: Free memory on device cuda:0 \
                   (3.1/79.2 GiB) on startup is less than desired GPU memory utilization\n\
                   RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n";
        let (failure, line) = cause(log);
        assert_eq!(failure, Failure::MemoryHeld);
        assert!(line.unwrap().starts_with("ValueError: Free memory on device cuda:0 (3.1/79.2 GiB)"));
        let (failure, line) = cause("x\nKeyError: 'a'\nmore\nRuntimeError: Engine core initialization failed.\n");
        assert_eq!((failure, line.as_deref()), (Failure::Other, Some("KeyError: 'a'")));
        assert_eq!(cause("one\ntwo\n\n").1.as_deref(), Some("two"), "the last line where nothing says more");
        assert_eq!(cause(""), (Failure::Other, None));
        let long = cause(&format!("ValueError: {}", "é".repeat(400))).1.unwrap();
        assert!(long.ends_with('…') && long.len() < 310);
    }

    #[test]
    fn each_kind_is_recognized() {
        for (line, failure) in [
            ("vllm: error: unrecognized arguments: --max-len", Failure::Configuration),
            (
                "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
                Failure::Configuration,
            ),
            ("OSError: x is not a local folder and is not a valid model identifier listed on", Failure::Model),
            ("huggingface_hub.errors.GatedRepoError: 401 Client Error", Failure::Model),
            ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", Failure::TooLarge),
            ("ValueError: No available memory for the cache blocks. Try increasing", Failure::TooLarge),
            ("AssertionError: Error in memory profiling. Initial free memory", Failure::MemoryMoved),
            ("OSError: [Errno 98] Address already in use", Failure::Port),
            ("ValueError: something else", Failure::Other),
        ] {
            assert_eq!(cause(line), (failure, Some(line.to_owned())), "{line}");
        }
    }

    #[test]
    fn pauses_grow_and_what_another_try_can_not_mend_waits_for_a_change() {
        let pauses: Vec<_> = (1..=6).map(|count| next(Failure::Other, count)).collect();
        let seconds = [10, 30, 120, 600, 1800, 1800].map(|seconds| Next::After(Duration::from_secs(seconds)));
        assert_eq!(pauses, seconds);
        assert_eq!(next(Failure::Configuration, 1), Next::WhenConfigured);
        assert_eq!((next(Failure::TooLarge, 1), next(Failure::TooLarge, 2)), (seconds[0], Next::WhenConfigured));
        assert_eq!((next(Failure::Model, 1), next(Failure::Model, 2)), (seconds[0], seconds[4]));
        assert_eq!((next(Failure::MemoryMoved, 1), next(Failure::MemoryMoved, 2)), (Next::AtOnce, seconds[1]));
        assert_eq!((next(Failure::Port, 9), next(Failure::MemoryHeld, 9)), (Next::AtOnce, Next::WhenMemoryIsFree));
        assert!(advice(Failure::TooLarge).is_some() && advice(Failure::Port).is_none());
    }
}
