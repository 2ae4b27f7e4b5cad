//! Logs on stderr, Prometheus metrics, and the process's one TLS provider. Everything here may be called any number of
//! times: the first call counts.

mod seldom;
mod series;

use std::{
    io::{IsTerminal, stderr},
    sync::OnceLock,
    thread,
    time::Duration,
};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::{EnvFilter, filter::ParseError, fmt, prelude::*, registry};

pub(crate) use seldom::{Seldom, seldom};
pub use series::{Family, Series};

use crate::config::LogFormat;

/// Bucket bounds in seconds, from a quick embedding to a request at the default timeout.
const SECONDS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 180.0, 600.0];
/// Bucket bounds in bytes, from one short line to the longest upload.
const BYTES: [f64; 8] = [256.0, 1e3, 16e3, 64e3, 1e6, 4e6, 100e6, 10e9];
/// Bucket bounds for counts.
const COUNTS: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 512.0, 4096.0];
/// How often observations are folded into their buckets if nobody scrapes them, so that they do not pile up.
const UPKEEP: Duration = Duration::from_secs(5);

/// The log target of a library that checks certificates.
const VERIFIER: &str = "rustls_platform_verifier";

/// The Prometheus text format's content type.
pub const METRICS_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The metrics of workers, which are removed with their worker.
pub static WORKERS: Series = Series::new("worker");

static METRICS: OnceLock<Option<PrometheusHandle>> = OnceLock::new();

/// Starts logging to stderr, installs the metrics recorder and the TLS provider.
///
/// # Errors
/// The filter can't be parsed.
pub fn init(format: LogFormat, filter: &str) -> Result<(), ParseError> {
    let mut levels = EnvFilter::try_new(filter)?;
    // Logs each failed handshake as an error; the caller reports it in its own words, and not every second.
    if !filter.contains(VERIFIER) {
        levels = levels.add_directive(format!("{VERIFIER}=off").parse()?);
    }
    // Files and journals get no escape codes, nor do users who set NO_COLOR (https://no-color.org).
    let colours = stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    // The reader of the log may be gone. Lines that can't be written are dropped, because the layers' own complaint
    // would panic.
    let (text, json) = match format {
        LogFormat::Text => (Some(fmt::layer().with_ansi(colours).with_writer(stderr).log_internal_errors(false)), None),
        LogFormat::Json => {
            (None, Some(fmt::layer().json().flatten_event(true).with_writer(stderr).log_internal_errors(false)))
        }
    };
    // A subscriber that is already there, such as a test's, stays.
    let _ = registry().with(levels).with(text).with(json).try_init();
    install_tls_provider();
    metrics();
    Ok(())
}

/// Makes ring rustls' provider. reqwest and tonic are built without one of their own, so whatever opens a TLS connection
/// needs this first.
pub fn install_tls_provider() {
    // An error means that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// All metrics in Prometheus' text format. Empty if another recorder was installed first.
#[must_use]
pub fn render() -> String {
    let Some(metrics) = metrics() else { return String::new() };
    let mut page = metrics.render();
    WORKERS.render(&mut page);
    page
}

fn metrics() -> Option<&'static PrometheusHandle> {
    METRICS.get_or_init(install_metrics).as_ref()
}

fn install_metrics() -> Option<PrometheusHandle> {
    let handle = recorder().install_recorder().ok()?;
    let upkeep = handle.clone();
    let run = move || {
        loop {
            thread::sleep(UPKEEP);
            upkeep.run_upkeep();
        }
    };
    // Without the thread the metrics still work; a scrape does the upkeep too.
    let _ = thread::Builder::new().name("metrics-upkeep".to_owned()).spawn(run);
    metrics::describe_gauge!("tidemill_build_info", "Always 1; the label says which version runs.");
    metrics::gauge!("tidemill_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    Some(handle)
}

/// Histograms get their buckets by the unit at the end of their names.
fn recorder() -> PrometheusBuilder {
    let buckets: [(&str, &[f64]); 5] = [
        ("_seconds", &SECONDS),
        ("_bytes", &BYTES),
        ("_lines", &COUNTS),
        ("_requests", &COUNTS),
        ("_attempts", &COUNTS),
    ];
    buckets.into_iter().fold(PrometheusBuilder::new(), |builder, (unit, bounds)| {
        builder.set_buckets_for_metric(Matcher::Suffix(unit.to_owned()), bounds).expect("the bounds are not empty")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_is_the_same_as_once() {
        init(LogFormat::Json, "warn,tidemill=debug").unwrap();
        init(LogFormat::Text, "info").unwrap();
        assert!(rustls::crypto::CryptoProvider::get_default().is_some());
        assert!(render().contains("tidemill_build_info{version="), "{}", render());
        assert!(init(LogFormat::Text, "tidemill=loud").is_err());
    }

    /// A metric without help is one that promtool refuses and nobody understands: whoever makes one describes it, beside it.
    #[test]
    fn every_metric_in_the_code_is_described_there() {
        fn sources(folder: &std::path::Path, all: &mut String) {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    sources(&path, all);
                } else if path.extension().is_some_and(|ending| ending == "rs") && !path.ends_with("telemetry.rs") {
                    let text = std::fs::read_to_string(&path).unwrap();
                    // Tests may make up metrics.
                    all.push_str(text.split("#[cfg(test)]\nmod tests {").next().unwrap());
                }
            }
        }
        let mut code = String::new();
        sources(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut code);
        let squeezed: String = code.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut names = std::collections::BTreeSet::new();
        for made in ["counter!(", "gauge!(", "histogram!("] {
            for (at, _) in squeezed.match_indices(made) {
                let described = squeezed[..at].ends_with("describe_");
                let name = squeezed[at + made.len()..].trim_start().split([',', ')']).next().unwrap().trim();
                let name = name.rsplit("::").next().unwrap();
                names.insert((name.to_owned(), described));
            }
        }
        let missing: Vec<_> =
            names.iter().filter(|(name, described)| !described && !names.contains(&(name.clone(), true))).collect();
        assert!(names.len() > 30, "{names:?}");
        assert!(missing.is_empty(), "without describe_…!: {missing:?}");
    }

    #[test]
    fn a_histogram_has_the_buckets_of_its_unit() {
        let recorder = recorder().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            metrics::histogram!("worker_request_seconds").record(0.3);
            metrics::histogram!("part_bytes").record(2_000.0);
        });
        let text = handle.render();
        assert!(text.contains("worker_request_seconds_bucket{le=\"0.5\"} 1"), "{text}");
        assert!(text.contains("worker_request_seconds_bucket{le=\"0.25\"} 0"), "{text}");
        assert!(text.contains("part_bytes_bucket{le=\"16000\"} 1"), "{text}");
    }
}
