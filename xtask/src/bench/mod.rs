//! The budgets, measured on whole processes: ratios within one run, so that the machine's speed cancels out.
//!
//! ```text
//!  bare boot ─┐
//!             ├─ in turn, n times ─▶ ratio ─▶ row ─▶ docs/performance.md
//!  first pod ─┘
//! ```

mod boot;
mod containerd;
mod exec;
mod memory;
mod table;
mod transfer;

use std::process::Command;
use std::time::{Duration, Instant};

use crate::products::{self, Profile};
use crate::shell::{self, at, tree};
use crate::{Chores, demo, packages, say};

/// What every measurement needs.
struct Bench {
    products: products::Products,
    image: String,
    runs: usize,
}

impl Bench {
    fn ctl(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.products.program("kata-ctl"));
        command.args(args);
        command
    }
}

/// Measures all rows and, unless it is a dry run, writes the table.
pub fn run(runs: usize, kernel: &str, dry_run: bool) -> Chores {
    packages::for_run()?;
    let products = products::build(Profile::Release, kernel, false)?;
    let image = format!("oci:{}:latest", demo::busybox_image()?.display());
    let bench = Bench { products, image, runs };
    let mut rows = Vec::new();
    say("start: first output byte against a bare boot");
    let (start, bare_boot) = boot::measure(&bench)?;
    rows.extend(start);
    say("containerd, beside runc");
    rows.extend(containerd::measure(&bench, bare_boot)?);
    say("exec");
    rows.extend(exec::measure(&bench)?);
    say("memory");
    rows.extend(memory::measure(&bench)?);
    say("transfer");
    rows.extend(transfer::measure(&bench)?);

    let text = table::render(&rows, &bench)?;
    println!("{text}");
    if !dry_run {
        let path = tree().join("docs/performance.md");
        let page = std::fs::read_to_string(&path).map_err(at("read", &path))?;
        std::fs::write(&path, table::insert(&page, &text)?).map_err(at("write", &path))?;
    }
    Ok(())
}

/// How long a command takes to its end.
fn timed(command: &mut Command) -> Chores<Duration> {
    let begin = Instant::now();
    shell::run(command)?;
    Ok(begin.elapsed())
}
