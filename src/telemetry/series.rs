//! Metrics with one label whose series can be removed. The exporter keeps every series that it has seen, so it would
//! show all workers that ever existed.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Mutex, PoisonError},
};

/// The name and the help text of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
}

impl Family {
    #[must_use]
    pub const fn gauge(name: &'static str, help: &'static str) -> Self {
        Self { name, kind: "gauge", help }
    }

    #[must_use]
    pub const fn counter(name: &'static str, help: &'static str) -> Self {
        Self { name, kind: "counter", help }
    }
}

/// Metrics by the value of one label.
#[derive(Debug)]
pub struct Series {
    label: &'static str,
    values: Mutex<BTreeMap<Family, BTreeMap<String, f64>>>,
}

impl Series {
    /// Starts without values.
    #[must_use]
    pub const fn new(label: &'static str) -> Self {
        Self { label, values: Mutex::new(BTreeMap::new()) }
    }

    pub fn set(&self, family: Family, of: &str, value: f64) {
        self.change(family, of, |known| *known = value);
    }

    /// Counts one more of `of`.
    pub fn count(&self, family: Family, of: &str) {
        self.change(family, of, |known| *known += 1.0);
    }

    fn change(&self, family: Family, of: &str, change: impl FnOnce(&mut f64)) {
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        let family = values.entry(family).or_default();
        match family.get_mut(of) {
            Some(known) => change(known),
            None => change(family.entry(of.to_owned()).or_default()),
        }
    }

    /// Removes all values of `of`.
    pub fn remove(&self, of: &str) {
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        for family in values.values_mut() {
            family.remove(of);
        }
    }

    /// Appends the metrics to a page in Prometheus' text format.
    pub fn render(&self, page: &mut String) {
        let values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        for (Family { name, kind, help }, values) in values.iter().filter(|(_, values)| !values.is_empty()) {
            let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (of, value) in values {
                let of = of.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
                let _ = writeln!(page, "{name}{{{}=\"{of}\"}} {value}", self.label);
            }
            page.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_shown_until_it_is_removed() {
        const ONE: Family = Family::gauge("one", "how many");
        const OFTEN: Family = Family::counter("often_total", "how often");
        let series = Series::new("worker");
        let page = || {
            let mut page = String::new();
            series.render(&mut page);
            page
        };
        assert_eq!(page(), "");
        series.set(ONE, "http://b", 1.5);
        series.set(ONE, "a\"\\", 2.0);
        series.set(ONE, "http://b", 3.0);
        assert_eq!(
            page(),
            "# HELP one how many\n# TYPE one gauge\none{worker=\"a\\\"\\\\\"} 2\none{worker=\"http://b\"} 3\n\n"
        );
        series.count(OFTEN, "http://b");
        series.count(OFTEN, "http://b");
        assert!(page().contains("# TYPE often_total counter\noften_total{worker=\"http://b\"} 2\n\n"), "{}", page());
        series.remove("a\"\\");
        assert!(!page().contains("a\\"), "{}", page());
        series.remove("http://b");
        assert_eq!(page(), "", "nothing of it is left, not even its help");
    }
}
