//! The owner process of a pod: containerd's Task API onto the sandbox core, nothing else.
//!
//! ```text
//!   containerd ─┐                    ┌─ task      containerd.task.v2.Task and v3.Task ─┐
//!               ├─ pod.sock ─ ttrpc ─┤                                                 ├─▶ slot ─▶ kata_sandbox::Sandbox
//!   kata-ctl ───┘   (connections)    └─ control   kata.control.v1.Control ─────────────┘                  │ events
//!   monitors ─── shim-monitor.sock ─ HTTP ─▶ management ─▶ slot               │                           │
//!                                            │ reins                                                      ▼
//!                                            └───────────────────────▶ life: when the pod ends, and when this process may go
//! ```
//!
//! `kata-ctl run` starts the owner of a standalone pod ([`owner`], [`life`]); containerd calls the same program its own way
//! ([`containerd`]).

mod chronicle;
mod cli;
mod connections;
mod containerd;
mod control;
mod convert;
mod delete;
mod fault;
mod ground;
mod host;
mod life;
mod management;
mod measured;
mod metrics;
mod owner;
mod plan;
mod reins;
mod services;
mod slot;
mod spans;
mod starts;
mod task;
mod template;
mod trace;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use crate::cli::{Cli, Verb};
use crate::containerd::invocation::{self, Invocation, InvocationError};
use crate::containerd::{bootstrap, cleanup, info, serve};

fn main() -> ExitCode {
    let started = Instant::now();
    if let Some(call) = Invocation::parse(std::env::args_os().skip(1).collect()) {
        return for_containerd(call);
    }
    match Cli::parse().verb {
        Verb::Pod(args) => {
            trace::close_inherited();
            cli::exit(owner::run(&args, started), |error| error.exit_code())
        }
        Verb::Delete(args) => cli::exit(delete::run(&args.id), |_| cli::FAILED),
        Verb::Host(args) => cli::exit(host::run(&args), |_| cli::FAILED),
        Verb::Template(verb) => {
            trace::close_inherited();
            cli::exit(template::run(&verb, started), |_| cli::FAILED)
        }
        Verb::Measured(sources) => cli::exit(measured::run(&sources), |_| cli::FAILED),
        Verb::Serve(args) => {
            trace::close_inherited();
            cli::exit(serve::run(&args, started), |_| cli::FAILED)
        }
    }
}

/// containerd's calls: what they answer goes to standard output, and nothing else goes anywhere.
fn for_containerd(call: Result<Invocation, InvocationError>) -> ExitCode {
    let call = match call {
        Ok(call) => call,
        Err(error) => return cli::exit(Err(error), |_| cli::WRONG_COMMAND),
    };
    match call.verb {
        invocation::Verb::Start => cli::exit(bootstrap::run(&call), |_| cli::FAILED),
        invocation::Verb::Delete => cli::exit(cleanup::run(&call), |_| cli::FAILED),
        invocation::Verb::Info => cli::exit(info::run(), |_| cli::FAILED),
        invocation::Verb::Version => {
            println!("{}", info::version());
            ExitCode::SUCCESS
        }
    }
}

#[cfg(test)]
mod tests;
