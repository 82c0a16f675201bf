//! `ctr` with our runtime, beside runc under the same containerd.

use std::path::Path;
use std::process::Command;

use serde::Deserialize;

use super::Bench;
use super::table::{Row, Samples};
use crate::Chores;
use crate::products::Profile;
use crate::shell::{self, ChoreError, cargo, tree};

/// Example of kata-testkit.
const CLIENT: &str = "containerd-start";

/// Milliseconds, printed by the example `containerd-start` of kata-testkit.
#[derive(Deserialize)]
struct Figures {
    kata: Vec<f64>,
    runc: Vec<f64>,
    kata_exec: Vec<f64>,
    runc_exec: Vec<f64>,
    parallel: Vec<f64>,
}

/// Builds the client.
pub fn prepare() -> Chores {
    shell::run(
        cargo()
            .args(["build", "--quiet", "--profile", Profile::Quick.name(), "-p", "kata-testkit"])
            .args(["--example", CLIENT]),
    )
}

/// Rows of containerd; `bare_boot` is the median of the same run, in milliseconds; `parallel` says how many pods are
/// started at once, in turn.
pub fn measure(bench: &Bench, bare_boot: f64, parallel: &[usize]) -> Chores<Vec<Row>> {
    let client = tree().join("target").join(Profile::Quick.name()).join("examples").join(CLIENT);
    let text = shell::output(
        Command::new(client)
            .arg(bench.runs.to_string())
            .args(parallel.iter().map(ToString::to_string))
            .env("KATA_TEST_PROGRAMS", &bench.products.dir)
            .env("KATA_TEST_IMAGE", tree().join("target/images/busybox"))
            .env("KATA_TEST_CONTAINERD", Path::new("/usr/bin/containerd")),
    )?;
    let figures: Figures = serde_json::from_str(&text)
        .map_err(|source| ChoreError::Json { what: "the figures of containerd", source })?;
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
            &format!("`ctr run --rm` of {pods} at once, until the last has ended"),
            "ms",
            vec![time],
            None,
        ));
    }
    Ok(rows)
}

fn row(what: &str, unit: &'static str, samples: Vec<f64>, budget: Option<f64>) -> Row {
    Row { what: what.to_owned(), unit, samples: Samples::new(samples), budget }
}
