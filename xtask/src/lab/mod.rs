//! The lab: a machine with KVM, cgroup v2 and vhost, whatever this one has. QEMU emulates a processor with SVM, so the
//! Debian in it has a `/dev/kvm` that boots stock kernels.
//!
//! ```text
//!  xtask ──── frames over virtio-serial ────▶ lab-init, PID 1 ──▶ the command ──▶ QEMU with nested KVM ──▶ pod
//!    ├── QEMU (TCG, -cpu EPYC,+svm) ─────────────┘   │    │
//!    ├── kata-virtiofsd ── Debian tree, read-only ◀──┘    │  a tmpfs over it takes what is written, for as long
//!    └── kata-virtiofsd ── source tree ◀──────────────────┘  as the machine runs
//! ```
//!
//! All three are tied to xtask's life, and nothing is mounted here: a lab that is killed leaves nothing behind.

mod child;
mod debian;
mod machine;
mod session;
mod suite;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use lab_init::Start;

use crate::shell::{self, ChoreError, at, tree};
use crate::{Chores, bench, products};

/// What the lab itself failing is told apart from the command's own status by, as `docker run` has it.
const LAB_FAILED: u8 = 125;

/// What measuring may take, in seconds.
const TIME_OF_BENCH: u64 = 3600;
/// Processors of a machine. With two, its kernel panics within minutes of nested machines: it patches its own code when
/// the first of them starts and when the last ends, and QEMU has the other processor run into the breakpoint of that.
const CPUS: u32 = 1;
/// Its memory in MiB.
const MEMORY: u32 = 4096;

/// The lab's chores.
#[derive(Subcommand)]
pub enum Lab {
    /// Make the Debian that the lab boots, if it is not there yet.
    Build {
        /// Make it anew, with today's packages.
        #[arg(long)]
        again: bool,
    },
    /// Run a command in the lab. Its status is this one's; 124 when the time is over, 125 when the lab fails.
    Run {
        #[command(flatten)]
        options: Options,
        /// NAME=VALUE in the command's environment.
        #[arg(long, short)]
        env: Vec<String>,
        /// The command and its arguments.
        #[arg(required = true, last = true)]
        command: Vec<String>,
    },
    /// A shell in the lab.
    Shell {
        #[command(flatten)]
        options: Options,
    },
    /// Run the tests in the lab that need what it has, with a few of the others; report and skips are shown.
    Test {
        /// Every test that boots machines: an hour or two.
        #[arg(long)]
        all: bool,
        /// Give the lab an IOMMU and a drive: for the tests that pass a device of the host on.
        #[arg(long)]
        iommu: bool,
        /// Passed on to the test runner, e.g. a part of a test's name; instead of the choice of the lab.
        filter: Vec<String>,
    },
    /// Measure starts and networks under nested KVM, beside runc and a bare machine, and print the table.
    Bench {
        /// Runs of each measurement.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Where the guest's kernel comes from: source (tuned, some minutes to build once) or debian.
        #[arg(long, default_value = "source")]
        kernel: String,
    },
}

/// How a machine is made.
#[derive(Args, Clone)]
pub struct Options {
    /// Kill everything after this many seconds.
    #[arg(long, default_value_t = 1200)]
    timeout: u64,
    /// Its processors.
    #[arg(long, default_value_t = CPUS)]
    cpus: u32,
    /// Its memory in MiB. The host gives what is used of it.
    #[arg(long, default_value_t = MEMORY)]
    memory: u32,
    /// Boot systemd, and run the command as a service.
    #[arg(long)]
    systemd: bool,
    /// Give it an IOMMU, and a drive behind it that a guest can have for itself.
    #[arg(long)]
    iommu: bool,
    /// Show the machine's console, with all that the kernel says, on standard error.
    #[arg(long)]
    console: bool,
    /// Serve the trees by this kata-virtiofsd, instead of building one.
    #[arg(long)]
    file_server: Option<PathBuf>,
}

/// The short suite, after the others of `make test`.
pub fn test() -> Chores {
    match suite::run(false, false, &[])? {
        0 => Ok(()),
        status => Err(ChoreError::Found(format!("the tests in the lab failed: status {status}"))),
    }
}

/// Makes the Debian that the lab boots, if it is not there yet: a download for the most part.
pub fn make_debian() -> Chores {
    debian::build(false).map(drop)
}

/// Makes and builds all that `lab run` needs beside a file server, so that it takes no longer than a boot.
pub fn make(file_server: &Path) -> Chores {
    prepare(Some(file_server)).map(drop)
}

/// Does one of them.
pub fn run(chore: Lab) -> ExitCode {
    let result = match chore {
        Lab::Build { again } => debian::build(again).map(|_| 0),
        Lab::Run { options, env, command } => {
            prepare(options.file_server.as_deref()).and_then(|lab| lab.run(&options, env, command))
        }
        Lab::Shell { options } => prepare(options.file_server.as_deref()).and_then(|lab| lab.shell(&options)),
        Lab::Test { all, iommu, filter } => suite::run(all, iommu, &filter),
        Lab::Bench { runs, kernel } => measure(runs, &kernel),
    };
    let status = result.unwrap_or_else(|error| {
        eprintln!("xtask lab: {}", shell::chain(&error));
        LAB_FAILED
    });
    ExitCode::from(status)
}

/// All that a machine is made of.
struct Prepared {
    debian: debian::Debian,
    initrd: File,
    file_server: PathBuf,
}

/// Builds here and measures there: this program is run in the lab too.
fn measure(runs: usize, kernel: &str) -> Chores<u8> {
    bench::prepare(kernel)?;
    let program = std::env::current_exe().map_err(at("find", Path::new("this program")))?;
    let commit = format!("{}={}", bench::COMMIT, bench::commit()?.trim());
    let command = vec![program.to_string_lossy().into_owned(), "bench-in-lab".to_owned(), runs.to_string()];
    prepare(None)?.run(&Options::with_timeout(TIME_OF_BENCH), vec![commit], command)
}

/// What a machine needs, with this file server or one that is built for it.
fn prepare(file_server: Option<&Path>) -> Chores<Prepared> {
    let debian = debian::build(false)?;
    let file_server = match file_server {
        Some(program) => program.to_owned(),
        None => products::build_file_server()?,
    };
    let initrd = machine::initrd(&products::build_lab_init()?)?;
    Ok(Prepared { debian, initrd, file_server })
}

impl Options {
    /// As by default, but for the time.
    fn with_timeout(timeout: u64) -> Self {
        Self {
            timeout,
            cpus: CPUS,
            memory: MEMORY,
            systemd: false,
            iommu: false,
            console: false,
            file_server: None,
        }
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

impl Prepared {
    /// Runs a command on our standard streams; answers its status.
    fn run(&self, options: &Options, environment: Vec<String>, command: Vec<String>) -> Chores<u8> {
        let machine = machine::Machine::start(self, options)?;
        let start = Start { directory: here(), terminal: None, environment, command };
        session::converse(machine, start, options)
    }

    /// A shell on our terminal, if that is one.
    fn shell(&self, options: &Options) -> Chores<u8> {
        let machine = machine::Machine::start(self, options)?;
        let term = std::env::var("TERM").unwrap_or_else(|_| "linux".to_owned());
        let start = Start {
            directory: here(),
            terminal: session::terminal_size(),
            environment: vec![format!("TERM={term}")],
            command: vec!["bash".to_owned()],
        };
        session::converse(machine, start, options)
    }
}

/// Where the command begins: here if that is in the source tree, which has the same path in the lab.
fn here() -> String {
    let here = std::env::current_dir().unwrap_or_default();
    let directory = if here.starts_with(tree()) { here } else { tree() };
    directory.to_string_lossy().into_owned()
}
