//! `/metrics` in Prometheus' text format, with vLLM's names, labels and help texts (0.32, read off a running server).

use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering},
};

use super::engine::Engine;

/// The engine's metrics, all as floats, as Python's client prints them. vLLM labels an engine with the first of the names that it serves its model under.
#[allow(clippy::cast_precision_loss)]
pub(super) fn render(engine: &Engine, preemptions: u64, model: &str) -> String {
    let counters = engine.counters();
    let total = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64;
    let (running, waiting) = (engine.running() as f64, engine.waiting() as f64);
    let all = [
        ("num_requests_running", "gauge", "Number of requests in model execution batches.", running),
        ("num_requests_waiting", "gauge", "Number of requests waiting to be processed.", waiting),
        ("kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", engine.kv_cache_usage()),
        (
            "prefix_cache_queries_total",
            "counter",
            "Prefix cache queries, in terms of number of queried tokens.",
            total(&counters.prefix_queries),
        ),
        (
            "prefix_cache_hits_total",
            "counter",
            "Prefix cache hits, in terms of number of cached tokens.",
            total(&counters.prefix_hits),
        ),
        ("num_preemptions_total", "counter", "Cumulative number of preemption from the engine.", preemptions as f64),
        ("prompt_tokens_total", "counter", "Number of prefill tokens processed.", total(&counters.prompt_tokens)),
        (
            "generation_tokens_total",
            "counter",
            "Number of generation tokens processed.",
            total(&counters.generation_tokens),
        ),
    ];
    let model = label(model);
    let mut text = String::with_capacity(2_048);
    for (name, kind, help, value) in all {
        // Writing to a String does not fail. The debug form has the ".0" that Python's floats have.
        let _ = writeln!(
            text,
            "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}\nvllm:{name}{{engine=\"0\",model_name=\"{model}\"}} {value:?}"
        );
    }
    text
}

/// Escaped as the format wants label values.
fn label(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::SimConfig;

    #[test]
    fn it_reads_like_vllm() {
        let text = render(&Engine::new(&SimConfig::default()), 0, "a\"b");
        assert!(text.starts_with(
            "# HELP vllm:num_requests_running Number of requests in model execution batches.\n\
             # TYPE vllm:num_requests_running gauge\n\
             vllm:num_requests_running{engine=\"0\",model_name=\"a\\\"b\"} 0.0\n"
        ));
        assert!(text.lines().all(|line| line.starts_with('#') || line.ends_with("} 0.0")), "{text}");
    }
}
