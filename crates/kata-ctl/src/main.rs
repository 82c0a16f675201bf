//! `kata-ctl`: the operator's tool. It runs pods without containerd, and looks into them.
//!
//! ```text
//!   command ─▶ image   (verified, unpacked layers)
//!           ─▶ bundle  (config.json)
//!           ─▶ pod     (owner process, its socket, streams) ── nothing here knows virtual machines
//! ```

mod amount;
mod bundle;
mod cli;
mod command;
mod failure;
mod image;
mod monitor;
mod pod;
mod start;
mod table;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command, ImageCommand};
use command::Outcome;
use failure::{Failure, chain};

/// What is told of without being asked; KATA_LOG asks for other things.
const LOG: &str = "warn,oci_client=error,ttrpc=off";

fn main() -> ExitCode {
    let began = Instant::now();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    log();
    // `run` and `exec` hand on other programs' exit codes; their own failures must be told from those.
    let ours = if matches!(cli.command, Command::Run(_) | Command::Exec(_)) { failure::OURS } else { 1 };
    let outcome = execute(cli.command, began);
    pod::restore();
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            if let Some(error) = &failure.error {
                eprintln!("kata-ctl: {}", chain(&**error));
            }
            ExitCode::from(failure.code.unwrap_or(ours))
        }
    }
}

fn execute(command: Command, began: Instant) -> Outcome {
    match command {
        Command::Logs(args) => command::logs::run(&args),
        Command::Image(ImageCommand::Build(args)) => command::build::run(args),
        Command::Check(args) => command::check::run(&args),
        Command::Run(args) => on_runtime(command::run::run(args, began)),
        Command::Ps(args) => on_runtime(command::ps::run(&args)),
        Command::Exec(args) => on_runtime(command::exec::run(&args)),
        Command::Kill(args) => on_runtime(command::kill::run(&args)),
        Command::Rm(args) => on_runtime(command::rm::run(&args)),
        Command::Metrics(args) => on_runtime(command::metrics::run(&args)),
        Command::Monitor(args) => on_runtime(command::monitor::run(&args)),
        Command::Analyze(args) => on_runtime(command::analyze::run(&args)),
        Command::Iptables(command) => on_runtime(command::guest::iptables(&command)),
        Command::Policy(command) => on_runtime(command::guest::policy(&command)),
        Command::Volume(command) => on_runtime(command::guest::volume(&command)),
    }
}

fn on_runtime(work: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(Failure::from)?.block_on(work)
}

fn usage(error: &clap::Error) -> ExitCode {
    // What cannot be printed cannot be told.
    let _ = error.print();
    let hands_on_codes = std::env::args().nth(1).is_some_and(|word| word == "run" || word == "exec");
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
