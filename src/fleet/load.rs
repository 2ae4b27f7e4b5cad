//! Reads what a vLLM server says of its load: the Prometheus text format, version 0.0.4.

use super::Load;

/// Reads vLLM's gauges out of a `/metrics` page, summed over its engines. None: none of vLLM's names is there.
#[must_use]
pub fn parse(page: &str) -> Option<Load> {
    let mut load = Load::default();
    let (mut seen, mut caches) = (false, 0u32);
    for line in page.lines().filter(|line| line.starts_with("vllm:")) {
        let Some((name, value)) = sample(line) else { continue };
        match name {
            "vllm:num_requests_running" => load.running += value,
            "vllm:num_requests_waiting" => load.waiting += value,
            "vllm:num_preemptions_total" => load.preemptions += value,
            "vllm:prefix_cache_queries_total" => load.prefix_queries += value,
            "vllm:prefix_cache_hits_total" => load.prefix_hits += value,
            "vllm:kv_cache_usage_perc" => {
                load.kv_cache_usage += value;
                caches += 1;
            }
            _ => continue,
        }
        seen = true;
    }
    if caches > 1 {
        load.kv_cache_usage /= f64::from(caches);
    }
    seen.then_some(load)
}

/// `name{labels} value [timestamp]`
fn sample(line: &str) -> Option<(&str, f64)> {
    let (name, rest) = match line.find('{') {
        Some(at) => (&line[..at], line[at..].rsplit_once('}')?.1),
        None => line.split_once(' ')?,
    };
    let value: f64 = rest.split_whitespace().next()?.parse().ok()?;
    value.is_finite().then_some((name.trim(), value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn vllms_page_is_read() {
        let page = "# HELP vllm:num_requests_running Number of requests in model execution batches.\n\
                    # TYPE vllm:num_requests_running gauge\n\
                    vllm:num_requests_running{engine=\"0\",model_name=\"tiny\"} 3.0\n\
                    vllm:num_requests_running{engine=\"1\",model_name=\"tiny\"} 4.0\n\
                    vllm:num_requests_waiting{engine=\"0\",model_name=\"a } b\"} 2.0\n\
                    vllm:num_requests_waiting_by_reason{engine=\"0\",reason=\"capacity\"} 2.0\n\
                    vllm:kv_cache_usage_perc{engine=\"0\"} 0.25\n\
                    vllm:kv_cache_usage_perc{engine=\"1\"} 0.75\n\
                    vllm:num_preemptions_total{engine=\"0\"} 1e1\n\
                    vllm:prefix_cache_queries_total{engine=\"0\"} 40.0\n\
                    vllm:prefix_cache_hits_total{engine=\"0\"} 30.0\n\
                    process_cpu_seconds_total 7\n";
        let expected = Load {
            running: 7.0,
            waiting: 2.0,
            kv_cache_usage: 0.5,
            preemptions: 10.0,
            prefix_queries: 40.0,
            prefix_hits: 30.0,
        };
        assert_eq!(parse(page), Some(expected));
    }

    #[test]
    fn another_servers_page_is_not() {
        assert_eq!(parse("http_requests_total 7\n"), None);
        assert_eq!(parse("vllm:num_requests_running{ nonsense\nvllm:num_requests_waiting NaN\n"), None);
    }

    proptest! {
        #[test]
        fn no_page_is_too_odd(page in "(vllm:num_requests_running)?[\\PC\n{} ]{0,60}") {
            let _ = parse(&page);
        }
    }
}
