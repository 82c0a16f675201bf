//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use kata_config::deprecation::Policy;
use kata_image::build::KernelSource;

use crate::amount::{Cpus, Memory};
use crate::colour::When;
use crate::pod::signal_number;

mod config;
mod deprecations;
pub mod help;
mod host;
mod look;
mod observe;
mod policy;

pub use config::{
    ConfigCommand, ConfigDiffArgs, ConfigExplainArgs, ConfigMigrateArgs, ConfigShowArgs, ConfigSources,
    ConfigValidateArgs,
};
pub use deprecations::{DeprecationsCommand, UseIn, UseInFile};
pub use host::{
    BundleArgs, CheckArgs, CompletionArgs, EnvArgs, FactoryArgs, FactoryCommand, ManArgs, Profile,
    VersionArgs,
};
pub use look::{
    ConsoleArgs, CpArgs, EventsArgs, InspectArgs, ListArgs, LogsArgs, PsArgs, Refresh, SourceName, StatsArgs,
    TopArgs,
};
pub use observe::{
    AnalyzeArgs, AnalyzeCommand, CompareArgs, IptablesCommand, MetricsArgs, MonitorArgs, VolumeCommand,
};
pub use policy::{
    EvidenceArgs, InitdataCommand, InitdataCreateArgs, InitdataShowArgs, MeasureArgs, Measurer,
    PolicyCommand, PolicyGenerateArgs,
};
#[cfg(feature = "policy")]
pub use policy::{PolicyExplainArgs, PolicyTestArgs};

/// Run containers in virtual machines of their own, and look into them
#[derive(Debug, Parser)]
#[command(name = "kata-ctl", version, arg_required_else_help = true, disable_help_subcommand = true)]
pub struct Cli {
    /// Use colour: auto, always or never
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        value_name = "WHEN",
        hide_possible_values = true,
        hide_default_value = true
    )]
    pub color: When,
    /// What becomes of uses of deprecated things: warn, reject or off [env: KATA_DEPRECATED]
    #[arg(long, global = true, value_name = "POLICY", hide_short_help = true, help_heading = "Other")]
    pub deprecated: Option<Policy>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in a new pod
    Run(RunArgs),
    /// List pods, containerd's too
    List(ListArgs),
    /// Run a further command in a pod's container, or a shell in its VM
    Exec(ExecArgs),
    /// Copy files between the host and a container
    Cp(CpArgs),
    /// Send a signal to a pod's main process, or clean up after dead owners
    Kill(KillArgs),
    /// Remove pods that have ended
    Rm(RmArgs),
    /// Everything known about a pod, as JSON
    Inspect(InspectArgs),
    /// List the processes of a pod; without one, list pods
    Ps(PsArgs),
    /// Watch the processes of a pod
    Top(TopArgs),
    /// Watch processor, memory, disk and network use
    Stats(StatsArgs),
    /// Show a pod's output, or the logs of its parts in order of time
    Logs(LogsArgs),
    /// Show what happens in pods
    Events(EventsArgs),
    /// Show what the guest's kernel wrote to its console
    Console(ConsoleArgs),
    /// Tell whether this host can run pods, and how well
    Check(CheckArgs),
    /// Show, check and explain the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Tell what is deprecated or removed, and find uses of it
    #[command(subcommand)]
    Deprecations(DeprecationsCommand),
    /// Tell what this host, its programs and its configuration are
    Env(EnvArgs),
    /// Build, describe and verify the guest image that pods boot
    #[command(subcommand)]
    Image(ImageCommand),
    /// Make, look at or remove the machines that pods start as copies of
    #[command(subcommand)]
    Factory(FactoryCommand),
    /// Tell what hardware will report of a confidential machine
    Measure(MeasureArgs),
    /// Have the hardware of a confidential pod say what runs
    Evidence(EvidenceArgs),
    /// Print a pod's metrics
    Metrics(MetricsArgs),
    /// Serve the metrics of all pods, and a status page
    Monitor(MonitorArgs),
    /// Tell where the time of a start went
    Analyze(AnalyzeArgs),
    /// Read or replace the packet filter of a pod's guest
    #[command(subcommand)]
    Iptables(IptablesCommand),
    /// Write, test and explain policies of agents, or set a pod's
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Make the initdata of a pod, or tell what is in it
    #[command(subcommand)]
    Initdata(InitdataCommand),
    /// Look at and resize volumes of a running pod
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Tell versions
    Version(VersionArgs),
    /// Collect what a bug report needs, without secrets
    Bundle(BundleArgs),
    /// Print the completions of a shell
    Completion(CompletionArgs),
    /// Write the manual pages
    Man(ManArgs),
}

/// `run`
#[derive(Debug, Args)]
#[command(
    override_usage = "kata-ctl run [OPTIONS] IMAGE [COMMAND...]\n       kata-ctl run [OPTIONS] --rootfs DIR COMMAND...",
    after_help = "IMAGE is oci:DIR[:TAG], docker-archive:FILE or a registry reference.\n\
        Exit code: the command's own; 126 if it cannot be executed, 127 if there is none, 125 for any other failure."
)]
pub struct RunArgs {
    /// Remove the pod when it has ended
    #[arg(long)]
    pub rm: bool,
    /// Pass the standard input on
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Print the pod's name and leave it running
    #[arg(short, long, conflicts_with = "interactive")]
    pub detach: bool,
    /// Name of the pod [default: made up]
    #[arg(long)]
    pub name: Option<String>,
    /// Run in this directory instead of an image; changes are made in it
    #[arg(long, value_name = "DIR")]
    pub rootfs: Option<PathBuf>,
    /// Image and command, or the command alone with --rootfs
    // stays: the usage shows it
    #[arg(value_name = "IMAGE [COMMAND", trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub words: Vec<String>,

    /// Memory of the virtual machine, e.g. 256M or 1G
    #[arg(short, long, value_name = "SIZE", help_heading = "Virtual machine")]
    pub memory: Option<Memory>,
    /// Processors of the virtual machine
    #[arg(long, value_name = "N", help_heading = "Virtual machine")]
    pub cpus: Option<Cpus>,
    /// Virtual machine monitor: auto, qemu, builtin, cloud-hypervisor (clh) or firecracker (fc)
    #[arg(long, value_name = "NAME",
        value_parser = ["auto", "qemu", "builtin", "cloud-hypervisor", "clh", "firecracker", "fc"],
        hide_possible_values = true, help_heading = "Virtual machine")]
    pub hypervisor: Option<String>,
    /// Change one setting of the configuration (repeatable)
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Virtual machine")]
    pub set: Vec<String>,
    /// Configuration file
    #[arg(long, value_name = "FILE", help_heading = "Virtual machine")]
    pub config: Option<PathBuf>,
    /// On use of deprecated settings: warn, reject or off [env: KATA_DEPRECATED]
    #[arg(long, value_name = "POLICY", help_heading = "Virtual machine")]
    pub deprecated: Option<Policy>,

    /// Set a variable; without a value, to the one it has here (repeatable)
    #[arg(short, long, value_name = "K[=V]", help_heading = "Container")]
    pub env: Vec<String>,
    /// Show a file or directory of the host in the container (repeatable)
    #[arg(short, long, value_name = "SRC:DST[:ro]", help_heading = "Container")]
    pub volume: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR", help_heading = "Container")]
    pub workdir: Option<String>,
    /// User and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]", help_heading = "Container")]
    pub user: Option<String>,
    /// Make the root file system read-only
    #[arg(long, help_heading = "Container")]
    pub read_only: bool,

    /// Pull over plain HTTP from other machines too
    #[arg(long, help_heading = "Other")]
    pub insecure: bool,
    /// Tell where the time of the start went [env: KATA_TIMING=1]
    #[arg(long, help_heading = "Other")]
    pub timing: bool,
}

/// `exec`
#[derive(Debug, Args)]
#[command(
    override_usage = "kata-ctl exec [OPTIONS] NAME COMMAND...\n       kata-ctl exec --vm NAME [COMMAND...]",
    after_help = "With --vm the command runs beside the containers, in the guest itself, with its errors among its output; \
        without a command there is a shell. The pod needs agent.kata.debug_console_enabled, and an image with a shell.\n\n\
        Exit code: the command's own; 126 if it cannot be executed, 127 if there is none, 125 for any other failure."
)]
pub struct ExecArgs {
    /// In the virtual machine, not in a container
    #[arg(long, conflicts_with_all = ["container", "interactive", "tty", "env", "workdir", "user"])]
    pub vm: bool,
    /// Container of the pod [default: its only one]
    #[arg(short, long, value_name = "ID")]
    pub container: Option<String>,
    /// Pass the standard input on
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Set a variable; without a value, to the one it has here (repeatable)
    #[arg(short, long, value_name = "K[=V]")]
    pub env: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Name of the pod
    pub name: String,
    /// The command
    #[arg(
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true,
        required_unless_present = "vm"
    )]
    pub command: Vec<String>,
}

/// `kill`
#[derive(Debug, Args)]
#[command(
    override_usage = "kata-ctl kill [OPTIONS] NAME\n       kata-ctl kill --reap-orphans [--dry-run] [--json]"
)]
pub struct KillArgs {
    /// End what pods whose owner is dead have left: processes, mounts, files
    #[arg(long, conflicts_with_all = ["name", "signal", "container"])]
    pub reap_orphans: bool,
    /// Only tell what would be reaped
    #[arg(long, requires = "reap_orphans", conflicts_with_all = ["name", "signal", "container"])]
    pub dry_run: bool,
    /// Print JSON
    #[arg(long, requires = "reap_orphans", conflicts_with_all = ["name", "signal", "container"])]
    pub json: bool,
    /// Container of the pod [default: its only one]
    #[arg(short, long, value_name = "ID")]
    pub container: Option<String>,
    /// The signal, by name or number
    #[arg(short, long, default_value = "KILL", value_parser = signal_number)]
    pub signal: u32,
    /// Name of the pod
    #[arg(required_unless_present = "reap_orphans")]
    pub name: Option<String>,
}

/// `rm`
#[derive(Debug, Args)]
pub struct RmArgs {
    /// Remove running pods, too
    #[arg(short, long)]
    pub force: bool,
    /// Names of pods
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// `image`
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Build the guest image from a kernel and the agent
    Build(BuildArgs),
    /// Build an extension image: a disk with further services for images of flavour services
    Extension(ExtensionArgs),
    /// Tell what an image is made of and can do
    Inspect(ImageArgs),
    /// Compare an image's files with the digests of its manifest
    Verify(ImageArgs),
}

/// `image inspect`, `image verify`
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Directory of the image [default: the one that pods boot]
    pub dir: Option<PathBuf>,
}

/// `image build`
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// The kernel: debian (downloaded), source (compiled) or a file
    #[arg(long, default_value = "debian", value_name = "debian|source|FILE")]
    pub kernel: KernelSource,
    /// The agent, a static program [default: kata-agent beside this program]
    #[arg(long, value_name = "PATH")]
    pub agent: Option<PathBuf>,
    /// Where to put the image [default: guest-image beside this program]
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Where to keep kernels for the next time [default: STATE_DIR/guest-kernels]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// lean: the agent alone; services: systemd on a verified disk, with services beside the agent
    #[arg(long, value_enum, default_value_t = Flavour::Lean)]
    pub flavour: Flavour,
    /// What goes into an image of flavour services
    #[command(flatten)]
    pub services: ServicesArgs,
}

/// What an image is to hold beside the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Flavour {
    /// Nothing.
    Lean,
    /// Services.
    Services,
}

/// `image build --flavour services`
#[derive(Debug, Args)]
pub struct ServicesArgs {
    /// The boot layer, a static program [default: kata-guest-init beside this program]
    #[arg(long, value_name = "PATH")]
    pub guest_init: Option<PathBuf>,
    /// The reader of initdata, a static program [default: kata-initdata beside this program]
    #[arg(long, value_name = "PATH")]
    pub initdata: Option<PathBuf>,
    /// The service that pulls images, a static program [default: kata-image-pull beside this program, or none]
    #[arg(long, value_name = "PATH")]
    pub image_pull: Option<PathBuf>,
    /// Directory of the systemd units [default: guest-services beside this program]
    #[arg(long, value_name = "DIR")]
    pub units: Option<PathBuf>,
    /// The suite of Debian that the root is made of
    #[arg(long, value_name = "SUITE", default_value = "trixie")]
    pub suite: String,
    /// The package archive [default: the one that this machine uses]
    #[arg(long, value_name = "URL")]
    pub mirror: Option<String>,
}

/// `image extension`
#[derive(Debug, Args)]
pub struct ExtensionArgs {
    /// Its name: lower-case letters, digits and dashes
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// The directory that it is made of, with etc/kata-extensions/components.toml
    #[arg(long, value_name = "DIR")]
    pub tree: PathBuf,
    /// The file to make
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// The command line as clap lays it out itself.
pub fn plain_command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn run(line: &str) -> Result<RunArgs, clap::Error> {
        let words = ["kata-ctl", "run"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words)?.command {
            Command::Run(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        help::command().debug_assert();
    }

    #[test]
    fn what_follows_the_image_belongs_to_the_command() {
        let args = run("--rm -it -m 256M --cpus 2 -e A=1 -e B oci:x sh -c -e --rm").unwrap();
        assert!(args.rm && args.interactive && args.tty && !args.detach);
        assert_eq!(args.words, ["oci:x", "sh", "-c", "-e", "--rm"]);
        assert_eq!(args.env, ["A=1", "B"]);
    }

    #[test]
    fn what_is_only_to_be_told_never_kills_a_pod() {
        for line in ["kill --dry-run web", "kill --json web", "kill web --reap-orphans", "kill --dry-run"] {
            let words = std::iter::once("kata-ctl").chain(line.split_whitespace());
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
        assert!(Cli::try_parse_from(["kata-ctl", "kill", "--reap-orphans", "--dry-run"]).is_ok());
    }

    #[test]
    fn with_a_rootfs_there_is_no_image() {
        let args = run("--rootfs /r ls -l").unwrap();
        assert_eq!((args.rootfs, args.words), (Some("/r".into()), vec!["ls".to_owned(), "-l".to_owned()]));
    }

    #[test]
    fn a_detached_pod_has_no_input() {
        assert!(run("-d -i oci:x").is_err());
        assert!(run("-d -t oci:x").is_ok());
    }

    #[test]
    fn one_start_is_analysed_or_two_are_compared() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        for good in ["kata-ctl analyze web", "kata-ctl analyze --last --json", "kata-ctl analyze compare a b"]
        {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in ["kata-ctl analyze", "kata-ctl analyze web --last", "kata-ctl analyze compare a"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn help_of_run_fits_a_screen() {
        let help = Cli::command().find_subcommand_mut("run").unwrap().render_help().to_string();
        assert!(help.lines().count() <= 50, "{} lines:\n{help}", help.lines().count());
    }
}
