//! The project's chores, each a sub-command; the Makefile only names them.
//!
//! ```text
//!  run ──▶ packages ──▶ products ──▶ demo
//!  test ─▶ packages ──▶ products ──▶ nextest, skips counted ──▶ lab test
//!  lab ──▶ Debian, QEMU ──▶ a command, the tests or the bench where there is KVM
//!  soak ─▶ packages ──▶ products ──▶ pods at random, until the time is over
//!  lint ─▶ fmt, clippy, cargo-deny, crate directions, deprecations, generated files
//!  docs ─▶ what is generated of the code
//! ```

mod bench;
mod demo;
mod deprecations;
mod directions;
mod docs;
mod lab;
mod lint;
mod names;
mod packages;
mod products;
mod shell;
mod soak;
mod suite;
mod unpacked;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use shell::ChoreError;

/// `cargo xtask`: the project's chores.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Set the machine up, build what is needed, and run a first container in a virtual machine.
    Run,
    /// Build everything and run every test, with real virtual machines.
    Test {
        /// Only unit tests: no machine is booted.
        #[arg(long)]
        unit: bool,
        /// Passed on to the test runner, e.g. a part of a test's name.
        filter: Vec<String>,
    },
    /// Start, load, kill and delete pods at random, and report what they leave and what grows.
    Soak(soak::Soak),
    /// Formatting, clippy, licences and sources of dependencies, directions between crates.
    Lint,
    /// Who may import whom.
    DepsCheck,
    /// Write the pages, man pages and schemas that are made of the code.
    Docs,
    /// Build what `run` does and the services image beside it, see docs/guest-services-image.md.
    ServicesImage {
        /// Where the guest's kernel comes from: source (tuned, some minutes to build once) or debian.
        #[arg(long, default_value = "debian")]
        kernel: String,
    },
    /// Measure the budgets and write the table of docs/performance.md.
    Bench {
        /// Runs of each measurement.
        #[arg(long, default_value_t = 10)]
        runs: usize,
        /// Where the guest's kernel comes from: source (tuned, some minutes to build once) or debian.
        #[arg(long, default_value = "source")]
        kernel: String,
        /// Print only; leave the document as it is.
        #[arg(long)]
        dry_run: bool,
    },
    /// What `lab bench` runs in the lab.
    // stays: nobody else runs it
    #[command(hide = true)]
    BenchInLab {
        /// Runs of each measurement.
        runs: usize,
    },
    /// A machine with KVM, emulated: make it, and run things in it.
    #[command(subcommand)]
    Lab(lab::Lab),
}

fn main() -> ExitCode {
    let result = match Cli::parse().chore {
        Chore::Run => demo::run(),
        Chore::Test { unit, filter } => suite::run(unit, &filter),
        Chore::Soak(soak) => soak::run(&soak),
        Chore::Lint => lint::run(),
        Chore::DepsCheck => directions::check(),
        Chore::Docs => docs::write(),
        Chore::ServicesImage { kernel } => services_image(&kernel),
        Chore::Bench { runs, kernel, dry_run } => bench::run(runs, &kernel, dry_run),
        Chore::BenchInLab { runs } => bench::run_in_lab(runs),
        Chore::Lab(chore) => return lab::run(chore),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {}", shell::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn services_image(kernel: &str) -> Chores {
    packages::for_services_image()?;
    let products = products::build(products::Profile::Quick, kernel)?;
    products::build_services_image(&products, kernel).map(|image| say(&format!("made {}", image.display())))
}

/// Says what goes on, so that nobody has to guess during a long step.
fn say(text: &str) {
    eprintln!("==> {text}");
}

pub(crate) type Chores<T = ()> = Result<T, ChoreError>;
