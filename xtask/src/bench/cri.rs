//! Pods under the CRI with a network, beside runc's: one, and many at once.

use serde::Deserialize;

use super::Bench;
use super::plot;
use super::table::{Row, row};
use crate::Chores;

/// Milliseconds, printed by the example `cri-start` of kata-testkit.
#[derive(Deserialize)]
struct Figures {
    kata: Vec<f64>,
    runc: Vec<f64>,
    parallel: Vec<Pair>,
}

#[derive(Deserialize)]
struct Pair {
    kata: f64,
    runc: f64,
}

/// Rows of the CRI, and how the time of starts at once grows with their number, as a picture; `pods` says how many.
pub fn measure(bench: &Bench, pods: &[usize]) -> Chores<(Vec<Row>, String)> {
    let numbers: Vec<String> = [&[bench.runs], pods].concat().iter().map(ToString::to_string).collect();
    let figures: Figures =
        bench.example("cri-start", &numbers.iter().map(String::as_str).collect::<Vec<_>>())?;
    let mut rows = vec![
        row("pod and container under the CRI with CNI, until it is started", "ms", figures.kata, None),
        row("the same with runc", "ms", figures.runc, None),
    ];
    let (mut kata, mut runc) = (Vec::new(), Vec::new());
    for (count, pair) in pods.iter().zip(figures.parallel) {
        rows.push(row(
            format!("{count} such pods at once, until the last is started"),
            "ms",
            vec![pair.kata],
            None,
        ));
        kata.push((*count, pair.kata / 1e3));
        runc.push((*count, pair.runc / 1e3));
    }
    let picture = plot::lines(
        "Starts at once",
        "pods",
        "seconds until the last is started",
        &[("kata", &kata), ("runc", &runc)],
    )?;
    Ok((rows, picture))
}
