//! `ctr` with our runtime, beside runc under the same containerd.

use serde::Deserialize;

use super::Bench;
use super::table::{Row, row};
use crate::Chores;

/// Milliseconds, printed by the example `containerd-start` of kata-testkit.
#[derive(Deserialize)]
struct Figures {
    kata: Vec<f64>,
    runc: Vec<f64>,
    kata_exec: Vec<f64>,
    runc_exec: Vec<f64>,
    parallel: Vec<f64>,
}

/// Rows of containerd; `bare_boot` is the median of the same run, in milliseconds; `parallel` says how many pods are
/// started at once, in turn.
pub fn measure(bench: &Bench, bare_boot: f64, parallel: &[usize]) -> Chores<Vec<Row>> {
    let numbers: Vec<String> = [&[bench.runs], parallel].concat().iter().map(ToString::to_string).collect();
    let figures: Figures =
        bench.example("containerd-start", &numbers.iter().map(String::as_str).collect::<Vec<_>>())?;
    let ratios =
        figures.kata.iter().zip(&figures.runc).map(|(kata, runc)| (kata - runc) / bare_boot).collect();
    let mut rows = vec![
        row("`ctr run` minus runc's ÷ bare boot", "", ratios, Some(1.45)),
        row("`ctr run --rm`, client's start to end", "ms", figures.kata, None),
        row("the same with runc", "ms", figures.runc, None),
        row("`ctr task exec`, client's start to end", "ms", figures.kata_exec, None),
        row("the same with runc", "ms", figures.runc_exec, None),
    ];
    for (pods, time) in parallel.iter().zip(figures.parallel) {
        rows.push(row(
            format!("`ctr run --rm` of {pods} at once, until the last has ended"),
            "ms",
            vec![time],
            None,
        ));
    }
    Ok(rows)
}
