//! A container's work on files of the host, beside the same work under runc.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::Bench;
use super::table::{Row, Samples};
use crate::Chores;
use crate::shell::ChoreError;

/// Milliseconds of one kind of work.
#[derive(Deserialize)]
struct Figures {
    kata: Vec<f64>,
    runc: Vec<f64>,
}

/// Kinds of work of the example `storage-ratios`, and what they are.
const WORK: [(&str, &str); 4] = [
    ("read", "128 MiB read from a volume"),
    ("write", "128 MiB written to a volume and flushed"),
    ("small", "16 MiB written to a volume, 4 KiB at a time"),
    ("files", "500 files of a volume made, listed and removed"),
];

/// Rows of storage.
pub fn measure(bench: &Bench) -> Chores<Vec<Row>> {
    let mut figures: BTreeMap<String, Figures> =
        bench.example("storage-ratios", &[&bench.runs.to_string()])?;
    let mut rows = Vec::new();
    for (kind, what) in WORK {
        let Figures { kata, runc } = figures
            .remove(kind)
            .ok_or_else(|| ChoreError::Found(format!("storage-ratios measured no {kind:?}")))?;
        let ratios = kata.iter().zip(&runc).map(|(kata, runc)| kata / runc).collect();
        let row =
            |what: String, unit, samples| Row { what, unit, samples: Samples::new(samples), budget: None };
        rows.push(row(format!("{what} ÷ the same with runc"), "", ratios));
        rows.push(row(what.to_owned(), "ms", kata));
    }
    Ok(rows)
}
