//! What containers do with files and networks, beside the same under runc.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use super::Bench;
use super::table::{Row, row};
use crate::Chores;
use crate::shell::{self, ChoreError, at, tree};

/// A comparison, measured by an example of kata-testkit.
pub struct Comparison {
    example: &'static str,
    unit: &'static str,
    /// What a ratio is called.
    ratio: &'static str,
    /// The example's names for what it measures, and what they are.
    kinds: &'static [(&'static str, &'static str)],
}

/// A container's work on files of the host.
pub const STORAGE: Comparison = Comparison {
    example: "storage-ratios",
    unit: "ms",
    ratio: "÷ the same with runc",
    kinds: &[
        ("read", "128 MiB read from a volume"),
        ("write", "128 MiB written to a volume and flushed"),
        ("small", "16 MiB written to a volume, 4 KiB at a time"),
        ("files", "500 files of a volume made, listed and removed"),
    ],
};

/// What goes through a pod's network.
pub const NETWORK: Comparison = Comparison {
    example: "network-ratios",
    unit: "Gbit/s",
    ratio: "÷ the same with runc (more is better)",
    kinds: &[
        ("to_host", "TCP from a pod to its host"),
        ("from_host", "TCP from the host to a pod"),
        ("between", "TCP between two pods"),
    ],
};

/// Where [`prepare`] puts iperf3.
fn iperf() -> PathBuf {
    tree().join("target/bench/iperf")
}

/// Copies iperf3 with all that it needs to where containers can be given it, and the lab has it too.
pub fn prepare() -> Chores {
    let dir = iperf();
    std::fs::create_dir_all(&dir).map_err(at("create", &dir))?;
    let program = Path::new("/usr/bin/iperf3");
    let copy =
        |from: &Path, name: &str| std::fs::copy(from, dir.join(name)).map(drop).map_err(at("copy", from));
    copy(program, "iperf3")?;
    let needs = shell::output(Command::new("ldd").arg(program))?;
    for library in needs.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new) {
        let name = library.file_name().unwrap_or_default().to_string_lossy();
        copy(library, if name.starts_with("ld-") { "loader" } else { &name })?;
    }
    Ok(())
}

/// Samples of one kind, as the examples print them.
#[derive(Deserialize)]
struct Figures {
    kata: Vec<f64>,
    runc: Vec<f64>,
    /// Ours without the host's vhost-net, where there is one.
    #[serde(default)]
    without: Vec<f64>,
}

impl Comparison {
    /// Its rows: of each kind the ratio, and the figure itself.
    pub fn measure(&self, bench: &Bench) -> Chores<Vec<Row>> {
        self.measure_on(bench, None)
    }

    /// The same with pods of a driver, which then is named in the rows.
    pub fn measure_on(&self, bench: &Bench, driver: Option<&str>) -> Chores<Vec<Row>> {
        let on = driver.map_or_else(String::new, |driver| format!("{driver}: "));
        let mut figures: BTreeMap<String, Figures> =
            bench.example_on(driver, self.example, &[&bench.runs.to_string(), &iperf().to_string_lossy()])?;
        let mut rows = Vec::new();
        for (kind, what) in self.kinds {
            let Figures { kata, runc, without } = figures
                .remove(*kind)
                .ok_or_else(|| ChoreError::Found(format!("{} measured no {kind:?}", self.example)))?;
            let beside = |ours: &[f64]| ours.iter().zip(&runc).map(|(ours, runc)| ours / runc).collect();
            rows.push(row(format!("{on}{what} {}", self.ratio), "", beside(&kata), None));
            rows.push(row(format!("{on}{what}"), self.unit, kata, None));
            if !without.is_empty() {
                let what = format!("{on}{what}, without vhost-net");
                rows.push(row(format!("{what} {}", self.ratio), "", beside(&without), None));
                rows.push(row(what, self.unit, without, None));
            }
        }
        Ok(rows)
    }
}
