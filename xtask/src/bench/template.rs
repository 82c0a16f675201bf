//! Pods of the built-in VMM that start as copies of one machine, where there is KVM.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::Deserialize;

use super::Bench;
use super::boot::first_byte;
use super::table::{Row, row};
use crate::Chores;
use crate::shell::{self, at};

const POD: &str = "bench-template";
/// Programs of pods, by the first 15 bytes of their names, which is what the kernel tells.
const PROGRAMS: &str = "containerd-shim|kata-virtiofsd|kata-vmm";

/// Rows of a copy's start and of what it takes of the host's memory.
pub fn measure(bench: &Bench) -> Chores<Vec<Row>> {
    let dir = std::env::temp_dir().join(format!("{POD}-{}", std::process::id()));
    let path = format!("hypervisor.qemu.factory.template_path={}", dir.display());
    let factory = |verb: &str| {
        let memory = "hypervisor.qemu.default_memory=256";
        let words = ["factory", verb, "--hypervisor", "builtin", "--set", memory, "--set", path.as_str()];
        shell::run(bench.ctl(&words).stdout(Stdio::null()))
    };
    factory("init")?;
    let enable = "hypervisor.qemu.factory.enable_template=true";
    let copied = ["--hypervisor", "builtin", "--set", enable, "--set", path.as_str()];
    let rows = starts(bench, &copied).and_then(|mut rows| {
        rows.push(memory_of_a_second(bench, &copied)?);
        Ok(rows)
    });
    // Also of a measurement that failed nothing is left.
    factory("destroy")?;
    std::fs::remove_dir_all(&dir).map_err(at("remove", &dir))?;
    rows
}

/// What a start from a template takes of a start without, each of them one after the other.
fn starts(bench: &Bench, copied: &[&str]) -> Chores<Vec<Row>> {
    let found: Found = bench.example_on(Some("builtin"), "template-start", &[&bench.runs.to_string()])?;
    let mut rows = vec![
        found
            .alone
            .row("template: the machine's start until its agent serves ÷ the same without", Some(0.25)),
        found.shared.row("template, with a share: the same", None),
    ];
    let cold = ["--hypervisor", "builtin"];
    let [mut ratios, mut starts] = [const { Vec::new() }; 2];
    // One of each to warm the page cache.
    for run in 0..=bench.runs {
        let start = first_byte(bench, copied)?;
        let ratio = start / first_byte(bench, &cold)?;
        if run > 0 {
            ratios.push(ratio);
            starts.push(start * 1e3);
        }
    }
    rows.push(row(
        "template, with a share: `kata-ctl run` to first byte ÷ the same without",
        "",
        ratios,
        None,
    ));
    rows.push(row("template, with a share: `kata-ctl run` to first byte", "ms", starts, None));
    Ok(rows)
}

/// What the example prints.
#[derive(Deserialize)]
struct Found {
    shared: Times,
    alone: Times,
}

/// Milliseconds of starts, in pairs.
#[derive(Deserialize)]
struct Times {
    copied: Vec<f64>,
    cold: Vec<f64>,
}

impl Times {
    fn row(&self, what: &'static str, budget: Option<f64>) -> Row {
        row(
            what,
            "",
            self.copied.iter().zip(&self.cold).map(|(copied, cold)| copied / cold).collect(),
            budget,
        )
    }
}

/// What all pods take more when there is a second one.
fn memory_of_a_second(bench: &Bench, copied: &[&str]) -> Chores<Row> {
    let names = [1, 2].map(|number| format!("{POD}-{number}"));
    let run = |name: &String| {
        let begin = ["run", "-d", "--name", name, "--memory", "256M"];
        let words = [&begin, copied, &[&bench.image, "sleep", "1000"]].concat();
        shell::run(bench.ctl(&words).stdout(Stdio::null()))?;
        proportional()
    };
    let taken = run(&names[0]).and_then(|one| Ok(run(&names[1])? - one));
    for name in &names {
        shell::run(bench.ctl(&["rm", "-f", name]).stdout(Stdio::null()))?;
    }
    let what = "memory of a second pod from one template, with a share (PSS, 256 MiB machine)";
    Ok(row(what, "MiB", vec![taken?], None))
}

/// MiB of all processes of all pods, pages that several of them have counted once.
fn proportional() -> Chores<f64> {
    let pids = shell::output(Command::new("pgrep").args(["-x", PROGRAMS]))?;
    let pss = |pid: &str| {
        let path = Path::new("/proc").join(pid).join("smaps_rollup");
        let text = std::fs::read_to_string(&path).map_err(at("read", &path))?;
        let kib =
            text.lines().find_map(|line| line.strip_prefix("Pss:")?.split_whitespace().next()?.parse().ok());
        Ok(kib.unwrap_or(f64::NAN) / 1024.0)
    };
    pids.lines().map(pss).sum()
}
