//! `kata-ctl`: the operator's tool. It runs pods without containerd, and looks into them.
//!
//! ```text
//!   command ─▶ image   (verified, unpacked layers: the crate kata-oci)
//!           ─▶ bundle  (config.json)
//!           ─▶ pod     (owner process, its socket, streams) ── nothing here knows virtual machines
//! ```

mod amount;
mod bundle;
mod cli;
mod colour;
mod command;
mod failure;
mod measure;
mod monitor;
mod output;
mod pod;
#[cfg(feature = "registry")]
mod progress;
mod start;
mod table;

use std::process::ExitCode;
use std::time::Instant;

use clap::FromArgMatches;
use kata_config::deprecation::Policy;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command};
use command::Outcome;
use failure::{Failure, chain};

/// What is told of without being asked; KATA_LOG asks for other things.
const LOG: &str = "warn,oci_client=error,ttrpc=off";

fn main() -> ExitCode {
    let began = Instant::now();
    let parsed = cli::help::command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    colour::decide(cli.color);
    log();
    // `run` and `exec` hand on other programs' exit codes; their own failures must be told from those.
    let hands_on_codes = matches!(cli.command, Command::Run(_) | Command::Exec(_));
    let outcome = execute(cli, began);
    pod::restore();
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            if let Some(error) = &failure.error {
                eprintln!("kata-ctl: {}", chain(&**error));
            }
            let usual = || match &failure.error {
                _ if hands_on_codes => failure::OURS,
                Some(error) if pod::is_unknown(&**error) => failure::NO_SUCH,
                _ => failure::FAILED,
            };
            ExitCode::from(failure.code.unwrap_or_else(usual))
        }
    }
}

fn execute(cli: Cli, began: Instant) -> Outcome {
    let Cli { command, deprecated, .. } = cli;
    // The pod's owner reads the configuration: the policy is one of its settings.
    let policy = deprecated.map(Policy::assignment);
    match command {
        Command::Logs(args) => command::logs::run(&args),
        Command::Console(args) => command::logs::console(&args),
        Command::Image(command) => command::image::run(command),
        Command::Check(mut args) => {
            args.set.extend(policy);
            command::check::run(&args)
        }
        Command::Config(command) => command::config::run(&command, policy.as_deref()),
        Command::Deprecations(command) => command::deprecations::run(&command, deprecated),
        Command::Env(args) => command::env::run(&args),
        Command::Factory(mut command) => {
            command.args_mut().set.extend(policy);
            command::factory::run(&command)
        }
        Command::Version(args) => command::version::run(&args),
        Command::Bundle(args) => on_runtime(command::bundle::run(&args)),
        Command::Completion(args) => command::manual::completion(&args),
        Command::Man(args) => command::manual::man(&args),
        Command::Run(mut args) => {
            args.set.extend(policy);
            on_runtime(command::run::run(args, began))
        }
        Command::List(args) => on_runtime(command::list::run(&args)),
        Command::Ps(args) => on_runtime(command::ps::run(&args)),
        Command::Inspect(args) => on_runtime(command::inspect::run(&args)),
        Command::Top(args) => on_runtime(command::top::run(&args)),
        Command::Stats(args) => on_runtime(command::stats::run(&args)),
        Command::Events(args) => on_runtime(command::events::run(&args)),
        Command::Evidence(args) => on_runtime(command::evidence::run(&args)),
        Command::Exec(args) => on_runtime(command::exec::run(&args)),
        Command::Cp(args) => on_runtime(command::cp::run(&args)),
        Command::Kill(args) => on_runtime(command::kill::run(&args)),
        Command::Rm(args) => on_runtime(command::rm::run(&args)),
        Command::Measure(mut args) => {
            args.set.extend(policy);
            command::measure::run(&args)
        }
        Command::Metrics(args) => on_runtime(command::metrics::run(&args)),
        Command::Monitor(args) => on_runtime(command::monitor::run(&args)),
        Command::Analyze(args) => on_runtime(command::analyze::run(&args)),
        Command::Iptables(command) => on_runtime(command::guest::iptables(&command)),
        Command::Policy(command) => on_runtime(command::policy::run(&command)),
        Command::Initdata(command) => command::initdata::run(&command),
        Command::Volume(command) => on_runtime(command::guest::volume(&command)),
    }
}

fn on_runtime(work: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(Failure::from)?;
    let outcome = runtime.block_on(work);
    // What still waits, for a stream or a pod, serves nobody.
    runtime.shutdown_background();
    outcome
}

fn usage(error: &clap::Error) -> ExitCode {
    // What cannot be printed cannot be told.
    let _ = error.print();
    // Options may stand before the verb.
    let verbs = cli::help::command();
    let verb = std::env::args().skip(1).find(|word| verbs.find_subcommand(word).is_some());
    let hands_on_codes = verb.is_some_and(|word| word == "run" || word == "exec");
    match (error.use_stderr(), hands_on_codes) {
        (false, _) => ExitCode::SUCCESS,
        (true, true) => ExitCode::from(failure::OURS),
        (true, false) => ExitCode::from(2),
    }
}

fn log() {
    let filter = EnvFilter::try_from_env("KATA_LOG").unwrap_or_else(|_| EnvFilter::new(LOG));
    let format = tracing_subscriber::fmt().without_time().with_target(false).with_ansi(false);
    format.with_env_filter(filter).with_writer(std::io::stderr).init();
}
