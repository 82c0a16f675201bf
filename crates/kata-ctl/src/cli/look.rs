//! The command line of verbs that look into pods.

use std::time::Duration;

use clap::{Args, ValueEnum};

/// `list`, and `ps` without a pod
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Show pods that have ended, too
    #[arg(short, long)]
    pub all: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `inspect`
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Name of the pod
    pub pod: String,
    /// Accepted: the answer is JSON in any case
    // stays: every verb that prints data has it
    #[arg(long, hide = true)]
    pub json: bool,
}

/// `ps`
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Name of the pod; without one, the pods are listed
    pub pod: Option<String>,
    /// The guest's own processes, too; without a pod, pods that have ended
    #[arg(short, long)]
    pub all: bool,
    /// Only this container's processes
    #[arg(short, long, value_name = "ID", requires = "pod")]
    pub container: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// How a table that is drawn again and again is drawn.
#[derive(Debug, Args)]
pub struct Refresh {
    /// Seconds between two looks
    #[arg(long, default_value = "2", value_name = "SECONDS", value_parser = seconds)]
    pub interval: Duration,
    /// Look once: figures by time are of one second
    #[arg(long)]
    pub once: bool,
    /// Print JSON, one document a look
    #[arg(long)]
    pub json: bool,
}

/// `top`
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Name of the pod
    pub pod: String,
    #[command(flatten)]
    pub refresh: Refresh,
}

/// `stats`
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// Name of the pod; without one, all that run
    pub pod: Option<String>,
    #[command(flatten)]
    pub refresh: Refresh,
}

/// `events`
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Name of the pod; without one, all that run
    pub pod: Option<String>,
    /// Stop after what has happened already
    #[arg(long)]
    pub once: bool,
    /// Print JSON, one line an event
    #[arg(long)]
    pub json: bool,
}

/// `console`
#[derive(Debug, Args)]
#[command(after_help = "The console takes no input: for a shell in the guest, see `kata-ctl exec --vm`.")]
pub struct ConsoleArgs {
    /// Name of the pod
    pub pod: String,
    /// Go on until the pod has ended
    #[arg(short, long)]
    pub follow: bool,
    /// Print JSON, one line a line
    #[arg(long)]
    pub json: bool,
}

/// `logs`
#[derive(Debug, Args)]
#[command(
    after_help = "Without --source the container's output, as it is, for a pod that was run with -d.\n\
    With it, lines of these sources in the order of time: owner, vmm (QEMU, vsock and file server), console (the\n\
    guest's kernel), agent; guest is both of the guest's, all is all four. Several are separated by commas."
)]
pub struct LogsArgs {
    /// Go on until the pod has ended
    #[arg(short, long)]
    pub follow: bool,
    /// What to show instead of the container's output
    #[arg(short, long, value_name = "SOURCE", value_delimiter = ',')]
    pub source: Vec<SourceName>,
    /// Print JSON, one line a line
    #[arg(long, requires = "source")]
    pub json: bool,
    /// Name of the pod
    pub name: String,
}

/// A source of log lines, or several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SourceName {
    /// The pod's owner, containerd's shim
    // stays: containerd's users know the owner by this name
    #[value(alias = "shim")]
    Owner,
    /// The virtual machine monitor and its helpers
    Vmm,
    /// The guest kernel's console
    Console,
    /// The guest's agent
    Agent,
    /// console and agent
    Guest,
    /// All of them
    All,
}

/// `cp`
#[derive(Debug, Args)]
#[command(
    after_help = "One of both is POD:PATH. Directories are copied whole; a destination that is a directory gets the source \
    below it. The container needs tar, as nearly all have. What comes out belongs to you, without set-id bits; devices are \
    left out."
)]
pub struct CpArgs {
    /// Container of the pod [default: its only one]
    #[arg(short, long, value_name = "ID")]
    pub container: Option<String>,
    /// What to copy
    #[arg(value_name = "SRC")]
    pub from: String,
    /// Where to
    #[arg(value_name = "DST")]
    pub to: String,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<f64>().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    parsed.map(Duration::from_secs_f64).ok_or_else(|| "expected seconds from 0.1 to 3600".to_owned())
}
