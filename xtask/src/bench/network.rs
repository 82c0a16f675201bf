//! What goes through a pod's network, beside the same with runc.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::Bench;
use super::table::{Row, Samples};
use crate::Chores;
use crate::shell::ChoreError;

/// Gbit/s of one way.
#[derive(Deserialize)]
struct Figures {
    kata: Vec<f64>,
    runc: Vec<f64>,
}

/// Ways of the example `network-ratios`, and what they are.
const WAYS: [(&str, &str); 3] = [
    ("to_host", "TCP from a pod to its host"),
    ("from_host", "TCP from the host to a pod"),
    ("between", "TCP between two pods"),
];

/// Rows of the network. A higher ratio is better.
pub fn measure(bench: &Bench) -> Chores<Vec<Row>> {
    let mut figures: BTreeMap<String, Figures> =
        bench.example("network-ratios", &[&bench.runs.to_string()])?;
    let mut rows = Vec::new();
    for (way, what) in WAYS {
        let Figures { kata, runc } = figures
            .remove(way)
            .ok_or_else(|| ChoreError::Found(format!("network-ratios measured no {way:?}")))?;
        let ratios = kata.iter().zip(&runc).map(|(kata, runc)| kata / runc).collect();
        let row =
            |what: String, unit, samples| Row { what, unit, samples: Samples::new(samples), budget: None };
        rows.push(row(format!("{what} ÷ the same with runc (more is better)"), "", ratios));
        rows.push(row(what.to_owned(), "Gbit/s", kata));
    }
    Ok(rows)
}
