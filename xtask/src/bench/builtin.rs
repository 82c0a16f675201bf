//! The built-in VMM, where there is KVM: beside QEMU's smallest machine, and what a pod adds to it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::Bench;
use super::boot::{BareBoot, first_byte};
use super::table::{Row, row};
use crate::Chores;
use crate::shell::{self, ChoreError, at};

const POD: &str = "bench-builtin";
/// QEMU's machine without PCI, with what its guest cannot do without.
const MICROVM: &str = "microvm,memory-backend=mem,acpi=on,rtc=on,isa-serial=off";

/// Rows of the built-in VMM's boot, of a pod's start on it, and of its memory.
pub fn measure(bench: &Bench) -> Chores<Vec<Row>> {
    let bare = BareBoot::of(bench);
    let [mut ours, mut qemus, mut ratios, mut starts, mut pod_ratios] = [const { Vec::new() }; 5];
    // One of each to warm the page cache.
    for run in 0..=bench.runs {
        let own = boot(bench, &bare)?;
        let qemu = bare.boot(MICROVM, "")?;
        let start = first_byte(bench, &["--hypervisor", "builtin"])?;
        if run > 0 {
            ours.push(own * 1e3);
            qemus.push(qemu * 1e3);
            ratios.push(own / qemu);
            starts.push(start * 1e3);
            pod_ratios.push(start / own);
        }
    }
    Ok(vec![
        row("built-in VMM: bare boot ÷ QEMU microvm's", "", ratios, Some(0.8)),
        row("built-in VMM: bare boot to an init that resets", "ms", ours, None),
        row("QEMU microvm: the same", "ms", qemus, None),
        row("built-in VMM: `kata-ctl run` to first byte ÷ its bare boot", "", pod_ratios, Some(1.30)),
        row("built-in VMM: `kata-ctl run` to first byte", "ms", starts, None),
        row("built-in VMM: private memory beyond the guest's", "MiB", vec![private(bench)?], Some(5.0)),
    ])
}

/// Seconds from exec of the VMM to its end.
fn boot(bench: &Bench, bare: &BareBoot) -> Chores<f64> {
    let program = bench.products.program("kata-vmm");
    let begin = Instant::now();
    let status = Command::new("timeout")
        .arg("30")
        .arg(&program)
        .args(["boot", "--no-console", "--memory", "256", "--kernel"])
        .arg(&bare.kernel)
        .arg("--initrd")
        .arg(&bare.initrd)
        .args(["--append", "quiet panic=0 reboot=t rdinit=/bare-init"])
        .stdin(Stdio::null())
        .status()
        .map_err(at("start", Path::new("timeout")))?;
    match status.success() {
        true => Ok(begin.elapsed().as_secs_f64()),
        false => {
            Err(ChoreError::Found(format!("the built-in VMM's bare boot did not reach its init: {status}")))
        }
    }
}

/// MiB that the VMM of a pod has to itself, without the guest's memory.
fn private(bench: &Bench) -> Chores<f64> {
    let image = bench.image.as_str();
    let run =
        ["run", "-d", "--hypervisor", "builtin", "--name", POD, "--memory", "128M", image, "sleep", "1000"];
    shell::run(bench.ctl(&run).stdout(Stdio::null()))?;
    let found = shell::output(Command::new("pgrep").args(["-x", "kata-vmm"]));
    let private = found.and_then(|pids| {
        let pid = pids.lines().next().unwrap_or_default();
        let path = Path::new("/proc").join(pid).join("smaps");
        std::fs::read_to_string(&path).map(|maps| private_beyond(&maps)).map_err(at("read", &path))
    });
    shell::run(bench.ctl(&["rm", "-f", POD]).stdout(Stdio::null()))?;
    private
}

/// MiB of the private pages of all mappings but the guest's memory, from a `/proc/PID/smaps`.
fn private_beyond(maps: &str) -> f64 {
    let (mut guest, mut kib) = (false, 0.0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Private_Clean:" | "Private_Dirty:") if !guest => {
                kib += words.next().and_then(|number| number.parse::<f64>().ok()).unwrap_or(0.0);
            }
            // The line that a mapping begins with.
            Some(first) if first.contains('-') => guest = line.contains("/memfd:guest-ram"),
            _ => {}
        }
    }
    kib / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_the_guest_does_not_count_as_the_monitors() {
        let maps = "\
            7f00-7f01 rw-s 00000000 00:01 5 /memfd:guest-ram (deleted)\n\
            Private_Dirty:    4096 kB\n\
            7f01-7f02 rw-p 00000000 00:00 0 [heap]\n\
            Private_Clean:     512 kB\n\
            Private_Dirty:     512 kB\n\
            Shared_Clean:     2048 kB\n";
        assert!((private_beyond(maps) - 1.0).abs() < 1e-9);
    }
}
