//! Reads a vLLM server's load from the Prometheus text format, version 0.0.4.

use super::Load;

/// Reads vLLM's gauges from a `/metrics` page, summed over its engines. `None`: the page has none of vLLM's names.
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

/// The recent hit rate of a worker's prefix cache.
#[derive(Clone, Copy, Debug, Default)]
pub struct HitRate {
    /// Tokens looked up and found, at the last call.
    before: Option<(f64, f64)>,
    rate: Option<f64>,
}

impl HitRate {
    /// Records a report of the worker. Returns the share of prompt tokens, 0 to 1, that its prefix cache held since the
    /// report before; `None` if it has looked up none since.
    pub fn observe(&mut self, load: &Load) -> Option<f64> {
        let now = (load.prefix_queries, load.prefix_hits);
        // A worker that was restarted counts from 0, and its cache is empty.
        let restarted = self.before.is_some_and(|(queries, hits)| now.0 < queries || now.1 < hits);
        if restarted {
            *self = Self::default();
        }
        let (queries, hits) = self.before.map_or((0.0, 0.0), |(queries, hits)| (now.0 - queries, now.1 - hits));
        if queries > 0.0 {
            self.rate = Some((hits / queries).min(1.0));
        }
        self.before = Some(now);
        self.rate
    }
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
    fn the_hit_rate_is_that_of_the_last_prompts() {
        let mut rate = HitRate::default();
        let mut seen =
            |prefix_queries, prefix_hits| rate.observe(&Load { prefix_queries, prefix_hits, ..Load::default() });
        assert_eq!(seen(1_000.0, 900.0), None, "what was before it was known is not lately");
        assert_eq!(seen(1_000.0, 900.0), None);
        assert_eq!(seen(1_100.0, 925.0), Some(0.25));
        assert_eq!(seen(1_100.0, 925.0), Some(0.25), "nothing new");
        assert_eq!(seen(1_200.0, 925.0), Some(0.0));
        assert_eq!(seen(50.0, 0.0), None, "restarted");
        assert_eq!(seen(60.0, 10.0), Some(1.0));
        assert_eq!(HitRate::default().observe(&Load::default()), None, "a worker without those counters");
    }

    #[test]
    fn another_servers_page_is_not() {
        assert_eq!(parse("http_requests_total 7\n"), None);
        assert_eq!(parse("vllm:num_requests_running{ nonsense\nvllm:num_requests_waiting NaN\n"), None);
    }

    proptest! {
        #[test]
        fn a_hit_rate_is_a_share(steps in prop::collection::vec((0.0..1e6, 0.0..1e6), 0..20)) {
            let mut rate = HitRate::default();
            for (prefix_queries, prefix_hits) in steps {
                let rate = rate.observe(&Load { prefix_queries, prefix_hits, ..Load::default() });
                prop_assert!(rate.is_none_or(|rate| (0.0..=1.0).contains(&rate)), "{rate:?}");
            }
        }

        #[test]
        fn no_page_is_too_odd(page in "(vllm:num_requests_running)?[\\PC\n{} ]{0,60}") {
            let _ = parse(&page);
        }
    }
}
