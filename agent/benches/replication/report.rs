//! Medians and spread of the rounds, and what they say about the aims.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// What the rounds gave, by row and figure.
#[derive(Debug, Default)]
pub(crate) struct Rounds(BTreeMap<String, BTreeMap<&'static str, Vec<f64>>>);

/// One figure over all rounds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { median, min, max })
    }
}

impl Rounds {
    pub(crate) fn add(&mut self, row: &str, figure: &'static str, value: f64) {
        let row = self.0.entry(row.to_owned()).or_default();
        row.entry(figure).or_default().push(value);
    }

    fn spread(&self, row: &str, figure: &str) -> Option<Spread> {
        Spread::of(self.0.get(row)?.get(figure)?)
    }

    pub(crate) fn table(&self) -> Value {
        let rows = self.0.iter().map(|(row, figures)| {
            let figures = figures.iter().filter_map(|(figure, values)| {
                let Spread { median, min, max } = Spread::of(values)?;
                let all = values.iter().copied().map(rounded).collect::<Vec<_>>();
                let spread = json!({ "median": rounded(median), "min": rounded(min), "max": rounded(max), "all": all });
                Some(((*figure).to_owned(), spread))
            });
            (row.clone(), Value::Object(figures.collect()))
        });
        Value::Object(rows.collect())
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// Row, figure, the aim for ours/etcd, and whether it is a largest or a smallest one.
const AIMS: [(&str, &str, f64, bool); 10] = [
    ("1 client", "p50_ms", 1.1, true),
    ("1 client", "p99_ms", f64::NAN, true),
    ("1 client", "cpu_us_per_write", f64::NAN, true),
    ("64 clients", "cpu_us_per_write", 0.25, true),
    ("256 clients", "cpu_us_per_write", f64::NAN, true),
    ("64 clients", "writes_per_second", 2.0, false),
    ("256 clients", "writes_per_second", 4.0, false),
    ("64 clients", "syncs_per_1000_writes", 0.1, true),
    ("after the run", "resident_mib_per_member", 0.5, true),
    (
        "after the run",
        "resident_mib_counted_per_process",
        f64::NAN,
        true,
    ),
];

/// Medians of ours by medians of etcd's, beside the aims.
pub(crate) fn ratios(ours: &Rounds, etcd: &Rounds) -> Value {
    let mut all = Map::new();
    for (row, figure, aim, is_largest) in AIMS {
        let pair = ours.spread(row, figure).zip(etcd.spread(row, figure));
        let Some((ours, etcd)) = pair else { continue };
        let ratio = ours.median / etcd.median;
        let mut entry = json!({ "ratio": rounded(ratio) });
        if !aim.is_nan() {
            entry["aim"] = json!(format!("{} {aim}", if is_largest { "<=" } else { ">=" }));
            entry["met"] = json!(if is_largest { ratio <= aim } else { ratio >= aim });
        }
        all.insert(format!("{row}: {figure}"), entry);
    }
    Value::Object(all)
}

/// Whether idle members are quiet enough.
pub(crate) fn idle(ours: &Rounds) -> Value {
    let met = |figure| {
        ours.spread("idle", figure)
            .is_some_and(|spread| spread.median <= 1.0)
    };
    json!({
        "syncs_per_second_per_member <= 1": met("syncs_per_second_per_member"),
        "cpu_percent_per_member <= 1": met("cpu_percent_per_member"),
    })
}
