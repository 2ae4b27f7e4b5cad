//! Gauges with one label whose series can be taken away again. The exporter keeps every series that it has once seen: in a
//! fleet that comes and goes it would show the ghosts of all workers that ever were.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Mutex, PoisonError},
};

/// What a gauge is called and what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gauge {
    /// Its name.
    pub name: &'static str,
    /// Its help.
    pub help: &'static str,
}

/// Gauges by the value of one label.
#[derive(Debug)]
pub struct Series {
    label: &'static str,
    values: Mutex<BTreeMap<Gauge, BTreeMap<String, f64>>>,
}

impl Series {
    /// None yet.
    #[must_use]
    pub const fn new(label: &'static str) -> Self {
        Self { label, values: Mutex::new(BTreeMap::new()) }
    }

    /// Sets the gauge of `of`.
    pub fn set(&self, gauge: Gauge, of: &str, value: f64) {
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        let gauge = values.entry(gauge).or_default();
        match gauge.get_mut(of) {
            Some(known) => *known = value,
            None => drop(gauge.insert(of.to_owned(), value)),
        }
    }

    /// Takes all gauges of `of` away.
    pub fn remove(&self, of: &str) {
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        for gauge in values.values_mut() {
            gauge.remove(of);
        }
    }

    /// Adds them to a page in Prometheus' text format.
    pub fn render(&self, page: &mut String) {
        let values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        for (gauge, values) in values.iter().filter(|(_, values)| !values.is_empty()) {
            let _ = writeln!(page, "# HELP {} {}\n# TYPE {} gauge", gauge.name, gauge.help, gauge.name);
            for (of, value) in values {
                let of = of.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
                let _ = writeln!(page, "{}{{{}=\"{of}\"}} {value}", gauge.name, self.label);
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
        const ONE: Gauge = Gauge { name: "one", help: "how many" };
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
        series.remove("a\"\\");
        assert!(!page().contains("a\\"), "{}", page());
        series.remove("http://b");
        assert_eq!(page(), "", "nothing of it is left, not even its help");
    }
}
