//! An exec, as the agent serves it: against what its path costs with nothing in it.

use std::process::Stdio;

use serde::Deserialize;

use super::Bench;
use super::table::{Row, row};
use crate::Chores;
use crate::shell;

const POD: &str = "bench-exec";

/// Medians in microseconds, printed by the example `exec-latency` of kata-testkit.
#[derive(Deserialize)]
struct Latency {
    exec: f64,
    round_trip: f64,
    fork_exec: f64,
}

/// Rows of exec.
pub fn measure(bench: &Bench) -> Chores<Vec<Row>> {
    shell::run(
        bench.ctl(&["run", "-d", "--name", POD, &bench.image, "sleep", "1000"]).stdout(Stdio::null()),
    )?;
    let found = bench.example("exec-latency", &["/run/kata", POD, &bench.runs.to_string()]);
    shell::run(bench.ctl(&["rm", "-f", POD]).stdout(Stdio::null()))?;
    let found: Latency = found?;
    let path = 2.0 * found.round_trip + found.fork_exec;
    Ok(vec![
        row(
            "exec at the agent to first byte ÷ (2 vsock round trips + fork and exec in the guest)",
            "",
            vec![found.exec / path],
            Some(3.0),
        ),
        row("exec at the agent to first byte", "ms", vec![found.exec / 1e3], None),
        row("vsock round trip", "ms", vec![found.round_trip / 1e3], None),
        row("fork and exec in the guest, by a shell", "ms", vec![found.fork_exec / 1e3], None),
    ])
}
