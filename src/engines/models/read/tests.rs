use proptest::prelude::*;

use super::*;

const FULL: &str = r#"
[defaults]
start_timeout = "20m"
stop_timeout = "1m"
idle = "10m"

[gpus]
use = [0, 3]
memory = "80GiB"

[models.llama-8b]
vllm = "meta-llama/Llama-3.1-8B-Instruct"
args = ["--max-model-len", "16384"]
loras = { sql = "/models/sql-lora" }
replicas = "auto"

[models."org/qwen-72b"]
vllm = "Qwen/Qwen2.5-72B-Instruct-AWQ"
gpus = 2
keep = "sleep"
idle = "keep"
replicas = 1
start_timeout = "1h"

[models.small]
cmd = "llama-server -m /m/small.gguf --host 127.0.0.1 --port {port}"
stop_cmd = "true {model}"
health = "/ready"
env = { GGML_CUDA_ENABLE_UNIFIED_MEMORY = "1" }
memory = "9GiB"
aliases = ["gpt-4o-mini"]
"#;

/// The problems of a text, one a line.
fn problems(text: &str) -> String {
    let problems = Models::parse("m.toml", text).unwrap_err().problems;
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// The one problem of a model with these lines, of which the first is line 2.
fn refusal(lines: &str) -> String {
    problems(&format!("[models.m]\n{lines}"))
}

#[test]
fn a_file_with_everything_is_understood() {
    let models = Models::parse("m.toml", FULL).unwrap();
    assert_eq!(models.gpus, Some(StatedGpus { indexes: vec![0, 3], memory: Some(80 << 30) }));
    let names: Vec<_> = models.models.iter().map(|model| model.name.as_str()).collect();
    assert_eq!(names.len(), 3);
    let llama = models.serving("sql").unwrap();
    assert_eq!((llama.name.as_str(), llama.replicas, llama.gpus), ("llama-8b", super::super::REPLICAS, 1));
    assert_eq!((llama.start_timeout.as_secs(), llama.stop_timeout.as_secs()), (1200, 60));
    assert_eq!(llama.idle, Some(Duration::from_mins(10)));
    let args = vec!["--max-model-len".to_owned(), "16384".to_owned()];
    let repository = "meta-llama/Llama-3.1-8B-Instruct".to_owned();
    assert_eq!(llama.preset, Preset::Vllm { repository, args });
    let qwen = models.serving("org/qwen-72b").unwrap();
    assert_eq!((qwen.gpus, qwen.keep, qwen.idle, qwen.replicas), (2, Keep::Sleep, None, 1));
    assert_eq!(qwen.start_timeout, Duration::from_hours(1));
    let small = models.serving("gpt-4o-mini").unwrap();
    assert_eq!((small.health.as_str(), small.memory), ("/ready", Memory::Bytes(9 << 30)));
    assert_eq!(small.env["GGML_CUDA_ENABLE_UNIFIED_MEMORY"], "1");
    assert!(models.serving("gpt").is_none());
    let spec = qwen.spec();
    assert_eq!((spec.gpus, spec.keep, spec.memory), (2, Keep::Sleep, Memory::Whole));
}

#[test]
fn every_problem_is_named_with_its_line() {
    let text =
        "[defaults]\nidel = \"1h\"\n[models.a]\nvllm = \"x\"\ngpu = 2\n[models.b]\nvllm = \"y\"\nkeep = \"warm\"\n";
    assert_eq!(
        problems(text),
        "line 2: unknown key \"idel\"; did you mean idle?\nline 5: unknown key \"gpu\"; did you mean gpus?\n\
         line 8: expected \"stop\" or \"sleep\""
    );
    let shown = Models::parse("m.toml", text).unwrap_err().to_string();
    assert!(
        shown.starts_with("models file m.toml: line 2: unknown key \"idel\"; did you mean idle?; line 5: "),
        "{shown}"
    );
}

#[test]
fn what_is_wrong_is_refused() {
    for (lines, message) in [
        ("", "line 1: m: needs vllm = \"REPOSITORY\" or cmd"),
        ("vllm = \"x\"\ncmd = \"y {port}\"", "line 1: m: vllm and cmd exclude each other"),
        ("cmd = \"llama-server\"", "line 2: m: cmd must pass {port} on"),
        ("cmd = \"x {prot} {port}\"", "line 2: {prot} is no placeholder; there are {port} {model} {gpus} {log}"),
        ("cmd = \"x 'y {port}\"", "line 2: the quote ' is never closed"),
        ("cmd = \"x {port}\"\nargs = []", "line 1: m: args are for vllm"),
        ("cmd = \"x {port}\"\nloras = { a = \"b\" }", "line 1: m: loras are for vllm"),
        ("cmd = \"x {port}\"\nkeep = \"sleep\"", "line 1: m: keep = \"sleep\" is for vllm"),
        ("vllm = \"x\"\nstop_cmd = \"y\"", "line 1: m: stop_cmd is for cmd"),
        ("vllm = \"x\"\nargs = [\"--port=1\"]", "line 3: --port can't be set here: tidemill chooses the port"),
        ("vllm = \"x\"\nargs = [\"--served_model_name\", \"y\"]", "line 3: --served-model-name can't be set here"),
        (
            "vllm = \"x\"\nargs = [\n\"--max-model-len 16384\"]",
            "line 4: \"--max-model-len 16384\" is one argument; write two",
        ),
        ("vllm = \"x\"\nargs = [16384]", "line 3: expected a text in quotes, numbers too"),
        ("vllm = \"x\"\nargs = \"--a\"", "line 3: expected a list of texts"),
        ("vllm = \"\"", "line 2: expected a text in quotes"),
        ("vllm = \"x\"\ngpus = -1", "line 3: expected a whole number from 0 to 64"),
        ("vllm = \"x\"\ngpus = \"2\"", "line 3: expected a whole number from 0 to 64"),
        ("vllm = \"x\"\ngpus = 0\nmemory = \"1GiB\"", "line 1: m: memory is that of a GPU"),
        ("vllm = \"x\"\nmemory = 9", "line 3: expected a text in quotes"),
        ("vllm = \"x\"\nmemory = \"much\"", "line 3: expected a number of bytes"),
        ("vllm = \"x\"\nmemory = \"0\"", "line 3: expected more than nothing"),
        ("vllm = \"x\"\nreplicas = 0", "line 3: expected a whole number from 1 to 64"),
        ("vllm = \"x\"\nreplicas = \"many\"", "line 3: expected \"auto\" or a whole number"),
        ("vllm = \"x\"\nidle = \"1s\"", "line 3: expected a time span from 10s to"),
        ("vllm = \"x\"\nstart_timeout = \"30\"", "line 3: a number needs its unit"),
        ("vllm = \"x\"\nhealth = \"health\"", "line 3: expected a path that begins with /"),
        ("vllm = \"x\"\naliases = [\"a b\"]", "line 3: \"a b\" can't be a name"),
        ("vllm = \"x\"\naliases = [\"m\"]", "line 1: m: the name \"m\" is twice here"),
        ("vllm = \"x\"\nenv = { \"1A\" = \"x\" }", "line 3: \"1A\" can't be a variable's name"),
        ("vllm = \"x\"\nenv = { A = 1 }", "line 3: expected a text in quotes"),
        ("vllm = \"x\"\nenv = { CUDA_VISIBLE_DEVICES = \"0\" }", "line 3: tidemill chooses the GPUs"),
    ] {
        let found = refusal(lines);
        assert!(found.starts_with(message) && !found.contains('\n'), "{lines}\n{found}");
    }
    for (text, message) in [
        ("", "line 1: there are no models: add a section such as [models.qwen]"),
        ("models = 1", "line 1: expected a section"),
        ("[models]\na = \"x\"", "line 2: expected a section"),
        ("[model.a]\nvllm = \"x\"", "line 1: unknown key \"model\"; did you mean models?"),
        ("[models.\"a b\"]\nvllm = \"x\"", "line 1: \"a b\" can't be a name"),
        (
            "[models.a]\nvllm = \"x\"\n[models.b]\nvllm = \"x\"\naliases = [\"a\"]",
            "line 3: b: the name \"a\" is already",
        ),
        ("[gpus]\nuse = [0, 0]\n[models.a]\nvllm = \"x\"", "line 2: the GPU 0 is named twice"),
        ("[gpus]\nmemory = \"1GiB\"\n[models.a]\nvllm = \"x\"", "line 1: [gpus] needs use"),
        ("[gpus]\nuse = [0]\n[models.a]\nvllm = \"x\"\ngpus = 2", "line 3: a: needs 2 GPUs, and [gpus] use names 1"),
        (
            "[gpus]\nuse = [0]\nmemory = \"1GiB\"\n[models.a]\nvllm = \"x\"\nmemory = \"2GiB\"",
            "line 4: a: its memory is more",
        ),
        ("[models.a\nvllm = \"x\"", "line 1: this is not TOML"),
        ("[models.a]\nvllm = \"x\"\nvllm = \"y\"", "line 3: this is not TOML"),
    ] {
        let found = problems(text);
        assert!(found.starts_with(message) && !found.contains('\n'), "{text}\n{found}");
    }
}

#[test]
fn the_short_form_is_a_model_with_defaults() {
    let short =
        |texts: &[&str]| Models::default().with(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
    let models = short(&["qwen=Qwen/Qwen3-8B", "b=c=d"]).unwrap();
    assert_eq!(models.models[0], Model::vllm("qwen", "Qwen/Qwen3-8B"));
    assert_eq!(models.models[1], Model::vllm("b", "c=d"));
    let error = short(&["qwen", "a=b", "a=c", "=x", "y="]).unwrap_err();
    assert_eq!(error.problems.len(), 4);
    assert!(error.to_string().starts_with("models file --model: \"qwen\": expected NAME=REPOSITORY"), "{error}");
    let models = Models::parse("m.toml", FULL).unwrap();
    assert!(models.with(&["gpt-4o-mini=x".to_owned()]).is_err(), "an alias of the file");
}

proptest! {
    #[test]
    fn no_text_crashes_it(text in "\\PC{0,60}|(\\[(models|gpus|defaults)(\\.[a-z\"]{0,3})?\\]\n([a-z_]{1,8} ?= ?[^\n]{0,12}\n){0,3}){0,3}") {
        let lines = text.lines().count() + 1;
        if let Err(error) = Models::parse("m.toml", &text) {
            prop_assert!(error.problems.iter().all(|problem| problem.line.is_some_and(|line| line <= lines)), "{error}");
        }
    }
}
