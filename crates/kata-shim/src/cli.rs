//! The command line, and the exit codes.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use kata_config::Sources;

use crate::fault::chain;

/// Exit code of every failure without a code of its own.
pub(crate) const FAILED: u8 = 1;
/// Exit code for a wrong command line, as clap's.
pub(crate) const WRONG_COMMAND: u8 = 2;
/// Exit code of `pod` where the name is taken.
pub(crate) const EXISTS: u8 = 3;

/// The owner process of a Kata pod.
#[derive(Debug, Parser)]
#[command(name = "containerd-shim-kata-v2", version, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Own a pod: boot its virtual machine and serve `RUN_DIR/ID/pod.sock` until the pod is over
    Pod(PodArgs),
    /// End a pod whatever became of its owner, and remove all it has on the host
    Delete(DeleteArgs),
    /// Tell what this host can run pods with
    Host(HostArgs),
    /// Make, look at or remove the machines that pods start as copies of; answers with JSON
    #[command(subcommand)]
    Template(TemplateVerb),
    /// Tell what hardware measures of a pod's machine before the guest runs; answers with JSON
    Measured(SourceArgs),
    /// Own a pod for containerd, whose `start` runs this
    // stays: nobody else runs it
    #[command(hide = true)]
    Serve(ServeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct PodArgs {
    /// Name of the pod
    #[arg(long, value_parser = pod_id)]
    pub(crate) id: String,
    #[command(flatten)]
    pub(crate) sources: SourceArgs,
    /// Remove the pod's directories when it is over
    #[arg(long)]
    pub(crate) rm: bool,
    /// End the pod if this process ends before the first container has started
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) client_pid: Option<i32>,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Name of the pod
    #[arg(long, value_parser = pod_id)]
    pub(crate) id: String,
    /// containerd's namespace
    #[arg(long)]
    pub(crate) namespace: String,
    /// Socket that takes events
    #[arg(long)]
    pub(crate) events: String,
    /// Bundle of the pod's first container, with the FIFO of containerd's log
    #[arg(long)]
    pub(crate) bundle: PathBuf,
    /// Network namespace of the pod, if it is there already
    #[arg(long)]
    pub(crate) netns: Option<PathBuf>,
    /// Wait for containerd's sandbox API to make the pod, and to name its network namespace
    #[arg(long)]
    pub(crate) sandboxer: bool,
    /// Configuration file for a pod that the sandbox API makes
    #[arg(long)]
    pub(crate) config: Option<PathBuf>,
    /// Log more
    #[arg(long)]
    pub(crate) debug: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// Name of the pod
    #[arg(long, value_parser = pod_id)]
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    #[command(flatten)]
    pub(crate) sources: SourceArgs,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TemplateVerb {
    /// Boot a machine and keep it
    Make(SourceArgs),
    /// Tell what is kept, and whether pods can start from it
    Status(TemplateStatusArgs),
    /// Remove all that is kept
    Destroy(SourceArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TemplateStatusArgs {
    #[command(flatten)]
    pub(crate) sources: SourceArgs,
    /// Read all of its content
    #[arg(long)]
    pub(crate) verify: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SourceArgs {
    /// Configuration file instead of the one at a well-known place
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override one setting, e.g. hypervisor.qemu.default_memory=256
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

impl SourceArgs {
    pub(crate) fn sources(&self) -> Sources {
        Sources { file: self.config.clone(), overrides: self.overrides.clone(), ..Sources::default() }
    }
}

/// The names that [`kata_sandbox`] takes too. They become directory names and, in the guest, a host name.
pub(crate) fn pod_id(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    let good = text.len() <= 76
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(allowed);
    if good {
        Ok(text.to_owned())
    } else {
        Err("must be 1 to 76 characters of [A-Za-z0-9_.-] and begin with a letter or digit".to_owned())
    }
}

/// Ends a verb: a failure is told on stderr with all its causes.
pub(crate) fn exit<E: Error>(result: Result<(), E>, code: impl Fn(&E) -> u8) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-kata-v2: {}", chain(&error));
            ExitCode::from(code(&error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("shim").chain(line.split_whitespace()))
    }

    #[test]
    fn a_pod_takes_every_flag() {
        let cli = parse("pod --id p1 --config /c.toml --set a.b=1 --set c=d --rm --client-pid 7").unwrap();
        let Verb::Pod(args) = cli.verb else { panic!("not the pod verb") };
        assert_eq!((args.id.as_str(), args.rm, args.client_pid), ("p1", true, Some(7)));
        assert_eq!(args.sources.config, Some("/c.toml".into()));
        assert_eq!(args.sources.overrides, ["a.b=1", "c=d"]);
    }

    #[test]
    fn a_name_that_is_no_file_name_is_refused() {
        for id in ["", "../x", ".hidden", "a/b", "-x", "ä", &"a".repeat(77)] {
            assert!(pod_id(id).is_err(), "{id:?}");
        }
        assert_eq!(pod_id(&"a".repeat(76)).unwrap().len(), 76);
        assert_eq!(pod_id("a").unwrap(), "a");
    }

    #[test]
    fn a_verb_is_needed_and_pids_are_positive() {
        assert!(parse("").is_err());
        assert!(parse("pod").is_err());
        assert!(parse("pod --id x --client-pid 0").is_err());
        assert!(parse("delete --id x").is_ok());
        assert!(parse("host --json").is_ok());
        assert!(parse("template status --verify --set a.b=1").is_ok());
    }
}
