//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use kata_image::build::KernelSource;

use crate::amount::{Cpus, Memory};
use crate::pod::signal_number;

/// Run containers in virtual machines of their own, and look into them
#[derive(Debug, Parser)]
#[command(name = "kata-ctl", version, arg_required_else_help = true, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in a new pod
    Run(RunArgs),
    /// List pods
    Ps(PsArgs),
    /// Run a further command in a running pod
    Exec(ExecArgs),
    /// Send a signal to a pod's main process
    Kill(KillArgs),
    /// Remove pods that have ended
    Rm(RmArgs),
    /// Show the output of a detached pod
    Logs(LogsArgs),
    /// Tell whether this host can run pods, and how well
    Check(CheckArgs),
    /// Build the guest image that pods boot
    #[command(subcommand)]
    Image(ImageCommand),
    /// Print a pod's metrics
    Metrics(MetricsArgs),
    /// Serve the metrics of all pods, and a status page
    Monitor(MonitorArgs),
    /// Tell where the time of a start went
    Analyze(AnalyzeArgs),
    /// Read or replace the packet filter of a pod's guest
    #[command(subcommand)]
    Iptables(IptablesCommand),
    /// Set the policy of a pod's agent
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Look at and resize volumes of a running pod
    #[command(subcommand)]
    Volume(VolumeCommand),
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
    #[arg(value_name = "IMAGE [COMMAND", trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub words: Vec<String>,

    /// Memory of the virtual machine, e.g. 256M or 1G
    #[arg(short, long, value_name = "SIZE", help_heading = "Virtual machine")]
    pub memory: Option<Memory>,
    /// Processors of the virtual machine
    #[arg(long, value_name = "N", help_heading = "Virtual machine")]
    pub cpus: Option<Cpus>,
    /// Virtual machine monitor: auto or qemu
    #[arg(long, value_name = "NAME", value_parser = ["auto", "qemu"], help_heading = "Virtual machine")]
    pub hypervisor: Option<String>,
    /// Change one setting of the configuration (repeatable)
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Virtual machine")]
    pub set: Vec<String>,
    /// Configuration file
    #[arg(long, value_name = "FILE", help_heading = "Virtual machine")]
    pub config: Option<PathBuf>,

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

/// `ps`
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Show pods that have ended, too
    #[arg(short, long)]
    pub all: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `exec`
#[derive(Debug, Args)]
#[command(override_usage = "kata-ctl exec [OPTIONS] NAME COMMAND...")]
pub struct ExecArgs {
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
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub command: Vec<String>,
}

/// `kill`
#[derive(Debug, Args)]
pub struct KillArgs {
    /// The signal, by name or number
    #[arg(short, long, default_value = "KILL", value_parser = signal_number)]
    pub signal: u32,
    /// Name of the pod
    pub name: String,
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

/// `logs`
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on until the pod has ended
    #[arg(short, long)]
    pub follow: bool,
    /// Name of the pod
    pub name: String,
}

/// `check`
#[derive(Debug, Args)]
pub struct CheckArgs {
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

/// `image`
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Build the guest image from a kernel and the agent
    Build(BuildArgs),
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
}

/// `metrics`
#[derive(Debug, Args)]
pub struct MetricsArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Name of the pod
    pub name: String,
}

/// `monitor`
#[derive(Debug, Args)]
#[command(
    after_help = "Paths: / (status page), /metrics[?filter_family=PREFIX], /sandboxes, /agent-url?sandbox=NAME, \
        /api/sandboxes (JSON).\nRoot alone can read what pods tell: run it as root."
)]
pub struct MonitorArgs {
    /// Where to listen
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8090")]
    pub listen: SocketAddr,
}

/// `analyze`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(
    override_usage = "kata-ctl analyze [OPTIONS] <POD|FILE|--last>\n       kata-ctl analyze compare [--json] A B"
)]
pub struct AnalyzeArgs {
    /// Compare two starts
    #[command(subcommand)]
    pub command: Option<AnalyzeCommand>,
    /// Print JSON, which can be saved and analysed later
    #[arg(long)]
    pub json: bool,
    /// Draw the start into this file; - is the standard output
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// The last start of this host, of whichever pod
    #[arg(long, conflicts_with = "pod")]
    pub last: bool,
    /// Name of a pod, running or not, or a file with a saved start
    #[arg(value_name = "POD|FILE", required_unless_present = "last")]
    pub pod: Option<String>,
}

/// `analyze …`
#[derive(Debug, Subcommand)]
pub enum AnalyzeCommand {
    /// Tell how two starts differ, stage by stage
    Compare(CompareArgs),
}

/// `analyze compare`
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The first: a pod, or a file with a saved start
    pub a: String,
    /// The second
    pub b: String,
}

/// `iptables`
#[derive(Debug, Subcommand)]
pub enum IptablesCommand {
    /// Print the rules, as iptables-save does
    Get(IptablesGetArgs),
    /// Replace the rules, as iptables-restore does
    Set(IptablesSetArgs),
}

/// `iptables get`
#[derive(Debug, Args)]
pub struct IptablesGetArgs {
    /// Those for IPv6
    #[arg(long)]
    pub v6: bool,
    /// Name of the pod
    pub name: String,
}

/// `iptables set`
#[derive(Debug, Args)]
pub struct IptablesSetArgs {
    /// Those for IPv6
    #[arg(long)]
    pub v6: bool,
    /// Name of the pod
    pub name: String,
    /// File with the rules; - is the standard input
    pub file: PathBuf,
}

/// `policy`
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Give the agent a policy
    Set(PolicySetArgs),
}

/// `policy set`
#[derive(Debug, Args)]
pub struct PolicySetArgs {
    /// Name of the pod
    pub name: String,
    /// File with the policy; - is the standard input
    pub file: PathBuf,
}

/// `volume`
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Tell how full a volume is
    Stats(VolumeStatsArgs),
    /// Have the guest take note of a volume's new size
    Resize(VolumeResizeArgs),
}

/// `volume stats`
#[derive(Debug, Args)]
pub struct VolumeStatsArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Name of the pod
    pub name: String,
    /// Where the volume is in the guest
    pub path: String,
}

/// `volume resize`
#[derive(Debug, Args)]
pub struct VolumeResizeArgs {
    /// Name of the pod
    pub name: String,
    /// Where the volume is in the guest
    pub path: String,
    /// Its size
    #[arg(value_name = "BYTES")]
    pub size: u64,
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
        Cli::command().debug_assert();
    }

    #[test]
    fn what_follows_the_image_belongs_to_the_command() {
        let args = run("--rm -it -m 256M --cpus 2 -e A=1 -e B oci:x sh -c -e --rm").unwrap();
        assert!(args.rm && args.interactive && args.tty && !args.detach);
        assert_eq!(args.words, ["oci:x", "sh", "-c", "-e", "--rm"]);
        assert_eq!(args.env, ["A=1", "B"]);
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
