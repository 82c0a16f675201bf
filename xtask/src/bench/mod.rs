//! The budgets, measured on whole processes: ratios within one run, so that the machine's speed cancels out.
//!
//! ```text
//!  bare boot ─┐
//!             ├─ in turn, n times ─▶ ratio ─▶ row ─▶ docs/performance.md
//!  first pod ─┘                              and a picture
//! ```

mod beside_runc;
mod boot;
mod builtin;
mod containerd;
mod cri;
mod exec;
mod memory;
mod plot;
mod services;
mod table;
mod template;
mod transfer;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use crate::products::{self, Products, Profile};
use crate::shell::{self, ChoreError, at, cargo, tree};
use crate::{Chores, demo, packages, say};
use table::Row;
pub use table::commit;

/// What every measurement needs, built already: measuring wants neither a compiler nor a network.
struct Bench {
    products: Products,
    image: String,
    runs: usize,
    accelerator: Accelerator,
}

/// What runs the bare machine that pods are compared with: the same as runs the pods.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Accelerator {
    Tcg,
    Kvm,
}

/// Beside the page: how starts at once grow with their number.
const PICTURE: &str = "performance-starts.svg";
/// The kernel that is compiled here, tuned for pods.
pub const COMPILED_KERNEL: &str = "source";
/// Name of the variable with the commit measured, where git is not at hand.
pub const COMMIT: &str = "KATA_BENCH_COMMIT";

impl Bench {
    fn ctl(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.products.program("kata-ctl"));
        command.args(args);
        command
    }

    /// Runs an example of kata-testkit, which [`prepare`] has built, and reads what it prints.
    fn example<T: DeserializeOwned>(&self, name: &'static str, args: &[&str]) -> Chores<T> {
        self.example_on(None, name, args)
    }

    /// The same with pods of a driver; without, of the one that is chosen by itself.
    fn example_on<T: DeserializeOwned>(
        &self,
        driver: Option<&str>,
        name: &'static str,
        args: &[&str],
    ) -> Chores<T> {
        let program = tree().join("target").join(Profile::Quick.name()).join("examples").join(name);
        let text = shell::output(
            Command::new(program)
                .args(args)
                .env("KATA_TEST_PROGRAMS", &self.products.dir)
                .env("KATA_TEST_IMAGE", tree().join("target/images/busybox"))
                .env("KATA_TEST_CONTAINERD", Path::new("/usr/bin/containerd"))
                .envs(driver.map(|driver| ("KATA_TEST_HYPERVISOR", driver))),
        )?;
        serde_json::from_str(&text).map_err(|source| ChoreError::Json { what: name, source })
    }
}

/// Builds what is measured.
pub fn prepare(kernel: &str) -> Chores {
    packages::for_bench()?;
    if kernel == COMPILED_KERNEL {
        packages::for_kernel()?;
    }
    let products = products::build(Profile::Release, kernel)?;
    demo::busybox_image()?;
    boot::prepare(&products)?;
    beside_runc::prepare()?;
    shell::run(
        cargo()
            .args(["build", "--quiet", "--profile", Profile::Quick.name(), "-p", "kata-testkit"])
            .arg("--examples"),
    )
}

fn bench(runs: usize, accelerator: Accelerator) -> Chores<Bench> {
    let products = Products::built(Profile::Release);
    let image = format!("oci:{}:latest", demo::busybox_image()?.display());
    Ok(Bench { products, image, runs, accelerator })
}

/// Measures starts and networks, with KVM and what [`prepare`] has built, and prints the table: for the lab.
pub fn run_in_lab(runs: usize) -> Chores {
    let bench = bench(runs, Accelerator::Kvm)?;
    let mut rows = starts(&bench, &[1])?;
    say("the built-in VMM, beside QEMU's microvm");
    rows.extend(builtin::measure(&bench)?);
    say("copies of one machine");
    rows.extend(template::measure(&bench)?);
    for driver in ["qemu", "builtin"] {
        say(&format!("network with {driver}, beside runc"));
        rows.extend(beside_runc::NETWORK.measure_on(&bench, Some(driver))?);
    }
    println!("{}", table::render(&rows, &bench)?);
    Ok(())
}

/// Rows of starting a pod, by `kata-ctl` and by `ctr`; `parallel` says how many at once.
fn starts(bench: &Bench, parallel: &[usize]) -> Chores<Vec<Row>> {
    say("start: first output byte against a bare boot");
    let (mut rows, bare_boot) = boot::measure(bench)?;
    say("containerd, beside runc");
    rows.extend(containerd::measure(bench, bare_boot, parallel)?);
    Ok(rows)
}

/// Measures all rows and, unless it is a dry run, writes the table.
pub fn run(runs: usize, kernel: &str, dry_run: bool) -> Chores {
    prepare(kernel)?;
    let bench = bench(runs, Accelerator::Tcg)?;
    products::build_services_image(&bench.products, kernel)?;
    let mut rows = starts(&bench, &[1, 5, 10])?;
    say("the services image, beside the lean one");
    rows.extend(services::measure(&bench)?);
    say("exec");
    rows.extend(exec::measure(&bench)?);
    say("memory");
    rows.extend(memory::measure(&bench)?);
    say("transfer");
    rows.extend(transfer::measure(&bench)?);
    say("storage, beside runc");
    rows.extend(beside_runc::STORAGE.measure(&bench)?);
    say("network, beside runc");
    rows.extend(beside_runc::NETWORK.measure(&bench)?);
    say("pods under the CRI, beside runc");
    let (of_cri, picture) = cri::measure(&bench, &[1, 5, 10, 20])?;
    rows.extend(of_cri);

    let text = table::render(&rows, &bench)?;
    println!("{text}");
    if !dry_run {
        let path = tree().join("docs/performance.md");
        let page = std::fs::read_to_string(&path).map_err(at("read", &path))?;
        std::fs::write(&path, table::insert(&page, &text)?).map_err(at("write", &path))?;
        let path = path.with_file_name(PICTURE);
        std::fs::write(&path, picture).map_err(at("write", &path))?;
    }
    Ok(())
}

/// How long a command takes to its end.
fn timed(command: &mut Command) -> Chores<Duration> {
    let begin = Instant::now();
    shell::run(command)?;
    Ok(begin.elapsed())
}
