//! What was measured, as a table and as JSON.

use serde_json::{json, Value};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// A kind of number: whether more is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Rates.
    More,
    /// Times and memory.
    Less,
}

/// One number.
#[derive(Clone, Debug)]
pub struct Metric {
    /// What was measured.
    pub name: String,
    /// The unit of `value`.
    pub unit: &'static str,
    /// Whether more is better.
    pub better: Better,
    /// The number.
    pub value: f64,
    /// Whether it says how fast something is, and belongs in the mean of ratios.
    pub is_speed: bool,
}

impl Metric {
    /// So many things in so many seconds.
    pub fn rate(name: &str, unit: &'static str, count: f64, seconds: f64) -> Metric {
        let value = count / seconds.max(1e-9);
        Metric { name: name.to_owned(), unit, better: Better::More, value, is_speed: true }
    }

    /// A duration, in the unit given.
    pub fn time(name: &str, unit: &'static str, value: f64) -> Metric {
        Metric { name: name.to_owned(), unit, better: Better::Less, value, is_speed: true }
    }

    /// Memory of a server.
    pub fn memory(name: String, bytes: u64) -> Metric {
        let value = bytes as f64 / f64::from(1 << 20);
        Metric { name, unit: "MiB", better: Better::Less, value, is_speed: false }
    }
}

/// The samples of one metric.
pub struct Row {
    /// What was measured.
    pub name: String,
    /// Its unit.
    pub unit: &'static str,
    /// Whether more is better.
    pub better: Better,
    /// Whether it belongs in the mean of ratios.
    pub is_speed: bool,
    /// Samples by subject.
    pub samples: BTreeMap<String, Vec<f64>>,
}

impl Row {
    /// The median of a subject's samples.
    pub fn median(&self, subject: &str) -> Option<f64> {
        median(self.samples.get(subject)?)
    }

    /// How many times better than `reference` a subject is; below one it is worse.
    pub fn ratio(&self, subject: &str, reference: &str) -> Option<f64> {
        let (own, other) = (self.median(subject)?, self.median(reference)?);
        let ratio = match self.better {
            Better::More => own / other,
            Better::Less => other / own,
        };
        (ratio.is_finite() && ratio > 0.0).then_some(ratio)
    }
}

/// All that was measured.
pub struct Results {
    /// Subjects, in the order of the columns.
    pub subjects: Vec<String>,
    /// Metrics, in the order in which they were measured.
    pub rows: Vec<Row>,
    /// What did not work.
    pub failures: Vec<String>,
}

impl Results {
    /// Nothing measured yet.
    pub fn new(subjects: Vec<String>) -> Results {
        Results { subjects, rows: Vec::new(), failures: Vec::new() }
    }

    /// Adds a sample.
    pub fn add(&mut self, subject: &str, metric: Metric) {
        let Metric { name, unit, better, value, is_speed } = metric;
        let at = self.rows.iter().position(|row| row.name == name).unwrap_or_else(|| {
            self.rows.push(Row { name, unit, better, is_speed, samples: BTreeMap::new() });
            self.rows.len() - 1
        });
        self.rows[at].samples.entry(subject.to_owned()).or_default().push(value);
    }

    /// The geometric mean of a subject's ratios to `reference`, and of how many.
    pub fn mean_ratio(&self, subject: &str, reference: &str) -> Option<(f64, usize)> {
        let rows = self.rows.iter().filter(|row| row.is_speed);
        let logs: Vec<f64> =
            rows.filter_map(|row| row.ratio(subject, reference)).map(f64::ln).collect();
        let count = logs.len();
        (count > 0).then(|| ((logs.iter().sum::<f64>() / count as f64).exp(), count))
    }
}

fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        return sorted.get(middle).copied();
    }
    let pair = sorted.get(middle.checked_sub(1)?..=middle)?;
    Some((pair[0] + pair[1]) / 2.0)
}

/// The medians, with the ratio to `reference` behind each; above one is better.
pub fn table(results: &Results, reference: &str) -> String {
    let mut out = format!("{:<30} {:>8}", "", "");
    for subject in &results.subjects {
        let _ = write!(out, " {subject:>17}");
    }
    out.push('\n');
    for row in &results.rows {
        let _ = write!(out, "{:<30} {:>8}", row.name, row.unit);
        for subject in &results.subjects {
            let cell = row.median(subject).map_or_else(String::new, |value| {
                let ratio = row.ratio(subject, reference).filter(|_| subject != reference);
                let ratio = ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}x"));
                format!("{} {ratio:>6}", number(value))
            });
            let _ = write!(out, " {cell:>17}");
        }
        out.push('\n');
    }
    let _ = write!(out, "{:<30} {:>8}", "geometric mean of ratios", "");
    for subject in &results.subjects {
        let mean = results.mean_ratio(subject, reference);
        let cell = mean.map_or_else(String::new, |(mean, count)| format!("{mean:.2}x of {count}"));
        let _ = write!(out, " {cell:>17}");
    }
    out.push('\n');
    let _ = writeln!(out, "N.NNx: how many times better than {reference}; below 1 is worse");
    out
}

/// A number with three digits that mean something.
pub fn number(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// Everything, for later comparisons.
pub fn json(results: &Results, rounds: usize, quick: bool) -> String {
    let rows: Vec<Value> = results
        .rows
        .iter()
        .map(|row| {
            let medians: BTreeMap<&String, Option<f64>> =
                row.samples.keys().map(|subject| (subject, row.median(subject))).collect();
            json!({
                "metric": row.name,
                "unit": row.unit,
                "more_is_better": row.better == Better::More,
                "median": medians,
                "samples": row.samples,
            })
        })
        .collect();
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let all = json!({
        "rounds": rounds,
        "quick": quick,
        "kernel": read("/proc/sys/kernel/osrelease"),
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "subjects": results.subjects,
        "metrics": rows,
        "failures": results.failures,
    });
    format!("{all:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        let mut results = Results::new(vec!["a".into(), "b".into()]);
        for (a, b) in [(1.0, 2.0), (9.0, 2.0), (4.0, 2.0)] {
            results.add("a", Metric::rate("rate", "/s", a, 1.0));
            results.add("b", Metric::rate("rate", "/s", b, 1.0));
            results.add("a", Metric::time("time", "s", 3.0));
            results.add("b", Metric::time("time", "s", 6.0));
            results.add("a", Metric::memory("memory".into(), 1 << 30));
            results.add("b", Metric::memory("memory".into(), 1 << 20));
        }
        results
    }

    #[test]
    fn ratios_are_of_medians_and_above_one_when_better() {
        let results = results();
        assert_eq!(results.rows[0].ratio("a", "b"), Some(2.0));
        assert_eq!(results.rows[1].ratio("a", "b"), Some(2.0));
        assert_eq!(results.rows[2].ratio("b", "a"), Some(1024.0));
    }

    #[test]
    fn the_mean_leaves_out_what_is_not_a_speed() {
        let (mean, count) = results().mean_ratio("a", "b").unwrap();
        assert!((mean - 2.0).abs() < 1e-9 && count == 2, "{mean} of {count}");
    }

    #[test]
    fn an_even_number_of_samples_has_the_mean_of_the_middle_ones_as_median() {
        assert_eq!(median(&[1.0, 9.0, 3.0, 5.0]), Some(4.0));
        assert_eq!(median(&[]), None);
    }
}
