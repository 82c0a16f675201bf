//! The command line of verbs about the host, and of those for support.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use clap_complete::Shell;

/// `check`
#[derive(Debug, Default, Args)]
#[command(
    after_help = "Exit code: 0 if pods can run; 1 if not, or with --strict if anything could be better."
)]
pub struct CheckArgs {
    /// Warnings fail, too
    #[arg(long)]
    pub strict: bool,
    /// What kind of host this is meant to be
    #[arg(long, value_enum, default_value_t, value_name = "NAME")]
    pub profile: Profile,
    /// A newer list of known-bad versions; FILE.minisig is its signature
    #[arg(long, value_name = "FILE")]
    pub known_bad: Option<PathBuf>,
    /// The key that has to have signed it [default: /etc/kata-containers/known-bad.pub]
    #[arg(long, value_name = "FILE", requires = "known_bad")]
    pub known_bad_key: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Change one setting of the configuration (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// A kind of host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// Any machine
    #[default]
    Default,
    /// NVIDIA Jetson
    Jetson,
}

/// `env`
#[derive(Debug, Args)]
pub struct EnvArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// `factory`
#[derive(Debug, Subcommand)]
pub enum FactoryCommand {
    /// Boot a machine and keep it, for pods to start from
    Init(FactoryArgs),
    /// Tell what is kept, and whether pods of this configuration start from it
    #[command(after_help = "Exit code: 0 if pods can start from one; 1 if not.")]
    Status(FactoryStatusArgs),
    /// Remove all that is kept; pods that run go on
    Destroy(FactoryArgs),
}

impl FactoryCommand {
    /// What all of them take.
    pub fn args_mut(&mut self) -> &mut FactoryArgs {
        match self {
            Self::Init(args) | Self::Destroy(args) => args,
            Self::Status(args) => &mut args.common,
        }
    }
}

/// `factory init`, `factory destroy`
#[derive(Debug, Args)]
pub struct FactoryArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Virtual machine monitor; only builtin has templates
    #[arg(long, value_name = "NAME", value_parser = ["auto", "builtin", "qemu"])]
    pub hypervisor: Option<String>,
    /// Change one setting of the configuration (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// `factory status`
#[derive(Debug, Args)]
pub struct FactoryStatusArgs {
    /// Read all of it, and compare it with what was written
    #[arg(long)]
    pub verify: bool,
    #[command(flatten)]
    pub common: FactoryArgs,
}

/// `version`
#[derive(Debug, Args)]
pub struct VersionArgs {
    /// Of all parts: owner, monitor, file server, agent, guest kernel, QEMU
    #[arg(short, long)]
    pub all: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `bundle`
#[derive(Debug, Args)]
#[command(
    after_help = "Holds what this host is, what `check` finds, the configuration, and of each pod state, log, leak record, \
    events and container specifications, but nothing that containers have written. Values of variables, tokens, passwords, \
    keys and credentials are replaced by [redacted]; look through it all the same before you hand it on."
)]
pub struct BundleArgs {
    /// Name of the pod; without one, all
    pub pod: Option<String>,
    /// Where to write the archive, a gzipped tar; - is the standard output
    #[arg(short, long, value_name = "FILE.tar.gz")]
    pub output: PathBuf,
    /// Configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// `completion`
#[derive(Debug, Args)]
#[command(
    after_help = "For bash: kata-ctl completion bash > /usr/share/bash-completion/completions/kata-ctl"
)]
pub struct CompletionArgs {
    /// The shell
    pub shell: Shell,
}

/// `man`
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Directory for the pages, one for each verb; without it the main page is printed
    pub dir: Option<PathBuf>,
}
