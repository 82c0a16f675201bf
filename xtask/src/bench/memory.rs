//! What a pod costs in memory, on the host and in the guest.

use std::process::{Command, Stdio};

use super::Bench;
use super::table::{Row, row};
use crate::Chores;
use crate::shell::{self, ChoreError};

const POD: &str = "bench-memory";

/// Host processes of a pod and the resident memory they may have, in MiB.
const HOST: &[(&str, &str, Option<f64>)] = &[
    ("containerd-shim-kata-v2", "owner", Some(10.0)),
    ("kata-virtiofsd", "kata-virtiofsd, both processes", Some(10.0)),
    ("kata-vmm", "kata-vmm vsock", Some(3.0)),
    ("qemu-system", "QEMU, the guest's included", None),
];

/// Rows of memory.
pub fn measure(bench: &Bench) -> Chores<Vec<Row>> {
    let image = bench.image.as_str();
    shell::run(
        bench
            .ctl(&["run", "-d", "--name", POD, "--memory", "128M", image, "sleep", "1000"])
            .stdout(Stdio::null()),
    )?;
    let rows = with_pod(bench);
    shell::run(bench.ctl(&["rm", "-f", POD]).stdout(Stdio::null()))?;
    rows
}

fn with_pod(bench: &Bench) -> Chores<Vec<Row>> {
    for _ in 0..10 {
        shell::run(&mut bench.ctl(&["exec", POD, "true"]))?;
    }
    let mut rows = Vec::new();
    let mut whole = 0.0;
    for (program, name, budget) in HOST {
        let pids = processes(program)?;
        let proportional = mib(&pids, "smaps_rollup", "Pss:");
        whole += proportional;
        rows.push(row(
            format!("resident memory: {name}"),
            "MiB",
            vec![mib(&pids, "status", "VmRSS:")],
            *budget,
        ));
        rows.push(row(format!("proportional memory: {name}"), "MiB", vec![proportional], None));
    }
    rows.push(row("proportional memory of a pod (PSS, 128 MiB machine, idle)", "MiB", vec![whole], None));
    let meminfo = shell::output(&mut bench.ctl(&["exec", POD, "cat", "/proc/meminfo"]))?;
    let field = |name: &str| meminfo.lines().find_map(|line| line.strip_prefix(name)).and_then(kib);
    match (field("MemTotal:"), field("MemAvailable:")) {
        (Some(total), Some(available)) => {
            rows.push(row(
                "guest memory used at idle (128 MiB machine)",
                "MiB",
                vec![(total - available) / 1024.0],
                Some(26.0),
            ));
        }
        _ => return Err(ChoreError::Found("the guest's /proc/meminfo is not as expected".to_owned())),
    }
    Ok(rows)
}

fn kib(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

/// The processes of a program that belong to the pod.
fn processes(program: &str) -> Chores<Vec<String>> {
    let found = shell::output(Command::new("pgrep").args(["-f", &format!("{program}.*{POD}")]))?;
    Ok(found.lines().map(str::to_owned).collect())
}

/// The sum of a field of a file in /proc, in KiB there.
fn mib(pids: &[String], file: &str, field: &str) -> f64 {
    let total: f64 = pids
        .iter()
        .filter_map(|pid| std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok())
        .filter_map(|text| text.lines().find_map(|line| line.strip_prefix(field)).and_then(kib))
        .sum();
    total / 1024.0
}
