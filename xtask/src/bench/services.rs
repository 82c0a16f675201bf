//! What a guest with systemd takes longer than the lean one.

use super::Bench;
use super::boot::first_byte;
use super::table::{Row, row};
use crate::Chores;

/// Rows of a pod's start in either guest, one after the other.
pub fn measure(bench: &Bench) -> Chores<Vec<Row>> {
    let image = format!("hypervisor.qemu.image={}", bench.products.dir.join("services-image").display());
    let [mut ratios, mut starts] = [const { Vec::new() }; 2];
    // One of each to warm the page cache.
    for run in 0..=bench.runs {
        let lean = first_byte(bench, &["--hypervisor", "qemu"])?;
        let start = first_byte(bench, &["--hypervisor", "qemu", "--set", &image])?;
        if run > 0 {
            ratios.push(start / lean);
            starts.push(start * 1e3);
        }
    }
    Ok(vec![
        row(
            "services image: `kata-ctl run` to first byte ÷ the same on the lean image",
            "",
            ratios,
            Some(2.5),
        ),
        row("services image: `kata-ctl run` to first byte", "ms", starts, None),
    ])
}
