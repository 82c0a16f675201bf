//! Bytes through a container's streams and files.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use super::table::{Row, row};
use super::{Bench, boot, timed};
use crate::Chores;
use crate::shell::{self, at, tree};

const POD: &str = "bench-transfer";
const MIB: u64 = 100;

/// Rows of transfer.
pub fn measure(bench: &Bench) -> Chores<Vec<Row>> {
    let dir = tree().join("target/bench");
    std::fs::create_dir_all(&dir).map_err(at("create", &dir))?;
    let file = dir.join("data");
    let bytes = vec![b'k'; usize::try_from(MIB << 20).unwrap_or(usize::MAX)];
    std::fs::write(&file, bytes).map_err(at("write", &file))?;
    let volume = format!("{}:/data:ro", dir.display());
    shell::run(
        bench
            .ctl(&["run", "-d", "--name", POD, "-v", &volume, &bench.image, "sleep", "1000"])
            .stdout(Stdio::null()),
    )?;
    let rows = with_pod(bench, &file);
    shell::run(bench.ctl(&["rm", "-f", POD]).stdout(Stdio::null()))?;
    rows
}

fn with_pod(bench: &Bench, file: &Path) -> Chores<Vec<Row>> {
    let (mut stream, mut shared, mut host, mut exec) = (vec![], vec![], vec![], vec![]);
    for _ in 0..bench.runs {
        exec.push(boot::whole(bench, &["exec", POD, "true"])? * 1e3);
        let input = File::open(file).map_err(at("open", file))?;
        stream.push(
            timed(bench.ctl(&["exec", "-i", POD, "cat"]).stdin(input).stdout(Stdio::null()))?.as_secs_f64(),
        );
        // A cold guest reads: each run drops what the last one left.
        shared.push(boot::whole(
            bench,
            &["exec", POD, "dd", "if=/data/data", "of=/dev/null", "bs=1M", "status=none"],
        )?);
        host.push(
            timed(Command::new("dd").arg(format!("if={}", file.display())).args([
                "of=/dev/null",
                "bs=1M",
                "status=none",
            ]))?
            .as_secs_f64(),
        );
    }
    let seconds = "s";
    Ok(vec![
        row("`kata-ctl exec true`", "ms", exec, None),
        row(format!("{MIB} MiB through stdin, cat and stdout"), seconds, stream, None),
        row(format!("{MIB} MiB read over virtio-fs, exec included"), seconds, shared, None),
        row(format!("{MIB} MiB read on the host"), seconds, host, None),
    ])
}
