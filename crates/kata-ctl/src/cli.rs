//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use kata_config::deprecation::{Policy, Stage};
use kata_image::build::KernelSource;

use crate::amount::{Cpus, Memory};
use crate::pod::signal_number;

/// Run containers in virtual machines of their own, and look into them
#[derive(Debug, Parser)]
#[command(name = "kata-ctl", version, arg_required_else_help = true, disable_help_subcommand = true)]
pub struct Cli {
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
    /// Show, check and explain the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Tell what is deprecated or removed, and find uses of it
    #[command(subcommand)]
    Deprecations(DeprecationsCommand),
    /// Build the guest image that pods boot
    #[command(subcommand)]
    Image(ImageCommand),
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

/// `config`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Show settings and where they come from
    Show(ConfigShowArgs),
    /// Tell everything that is wrong with a configuration
    Validate(ConfigValidateArgs),
    /// Tell all about a setting or an annotation
    Explain(ConfigExplainArgs),
    /// Tell where two configurations differ in effect
    Diff(ConfigDiffArgs),
    /// Make a file for this version from one of upstream's
    Migrate(ConfigMigrateArgs),
}

/// Which configuration is meant.
#[derive(Clone, Debug, Args)]
pub struct ConfigSources {
    /// Configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Change one setting of the configuration (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// `config show`
#[derive(Debug, Args)]
pub struct ConfigShowArgs {
    /// Show the settings that are nowhere written, too, and only what is acted on
    #[arg(long)]
    pub effective: bool,
    /// Show where each value comes from
    #[arg(long)]
    pub origin: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The configuration.
    #[command(flatten)]
    pub sources: ConfigSources,
}

/// `config validate`
#[derive(Debug, Args)]
#[command(after_help = "Exit code: 0 if a pod can be made with it, 1 if not.")]
pub struct ConfigValidateArgs {
    /// Name every setting that makes no difference, too
    #[arg(long)]
    pub notes: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The file [default: the one that pods are made with]
    pub file: Option<PathBuf>,
}

/// `config explain`
#[derive(Debug, Args)]
pub struct ConfigExplainArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// A key's path, its last part, or an annotation
    #[arg(value_name = "KEY|ANNOTATION")]
    pub name: String,
}

/// `config diff`
#[derive(Debug, Args)]
pub struct ConfigDiffArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// A file to compare with the defaults, or with B [default: the one that pods are made with]
    #[arg(value_name = "A")]
    pub first: Option<PathBuf>,
    /// A file to compare A with
    #[arg(value_name = "B")]
    pub second: Option<PathBuf>,
}

/// `config migrate`
#[derive(Debug, Args)]
#[command(after_help = "What is not in the new file is told on standard error.\n\
    Exit code: 0 if pods are as before, 1 if the file asks for what this version does not do.")]
pub struct ConfigMigrateArgs {
    /// Where to write the new file [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Print the account as JSON
    #[arg(long, requires = "output")]
    pub json: bool,
    /// Upstream's file
    #[arg(value_name = "UPSTREAM.toml")]
    pub file: PathBuf,
}

/// `deprecations`
#[derive(Debug, Subcommand)]
pub enum DeprecationsCommand {
    /// List what is deprecated or removed
    List {
        /// Only what is in this stage, e.g. deprecated or removed
        #[arg(long, value_parser = stage)]
        stage: Option<Stage>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show everything about one of them
    Show {
        /// Its id, e.g. D0004
        id: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Find uses in files and commands
    #[command(
        subcommand,
        after_help = "Exit code: 0 for none, 10 for uses that warn, 11 for uses that are off by default, 12 for uses that are \
            removed or, with --deprecated=reject, deprecated; the highest counts. 1 if it cannot be told."
    )]
    Check(UseIn),
}

/// `deprecations check`
#[derive(Debug, Subcommand)]
pub enum UseIn {
    /// In a configuration file and the config.d beside it
    Config(UseInFile),
    /// In values of the Helm chart (YAML)
    Values(UseInFile),
    /// In Kubernetes manifests (YAML): annotations, runtime classes, commands, kustomizations
    Manifest(UseInFile),
    /// In a command and its arguments
    CommandLine {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The command
        #[arg(value_name = "WORD", trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        words: Vec<String>,
    },
}

/// `deprecations check config`, `values`, `manifest`
#[derive(Debug, Args)]
pub struct UseInFile {
    /// The file; - is the standard input, but for config
    pub file: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

fn stage(word: &str) -> Result<Stage, String> {
    let words: Vec<&str> = Stage::ALL.iter().map(|stage| stage.as_str()).collect();
    let found = Stage::ALL.iter().find(|stage| stage.as_str() == word);
    found.copied().ok_or_else(|| format!("not one of {}", words.join(", ")))
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
    fn help_of_run_fits_a_screen() {
        let help = Cli::command().find_subcommand_mut("run").unwrap().render_help().to_string();
        assert!(help.lines().count() <= 50, "{} lines:\n{help}", help.lines().count());
    }
}
