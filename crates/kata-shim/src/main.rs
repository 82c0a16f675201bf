//! The owner process of a pod: containerd's Task API onto the sandbox core, nothing else.
//!
//! ```text
//!   kata-ctl ─┐                    ┌─ task      containerd.task.v2.Task and v3.Task ─┐
//!             ├─ pod.sock ─ ttrpc ─┤                                                 ├─▶ kata_sandbox::Sandbox
//!   kata-ctl ─┘   (connections)    └─ control   kata.control.v1.Control ─────────────┘          │ events
//!                                          │ requests                                           ▼
//!                                          └───────────────────────────────────▶ life: when the pod ends, and
//!                                                                                 when this process may go
//! ```

mod cli;
mod connections;
mod control;
mod convert;
mod delete;
mod fault;
mod ground;
mod host;
mod life;
mod metrics;
mod owner;
mod task;
mod trace;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use crate::cli::{Cli, Verb};

fn main() -> ExitCode {
    let started = Instant::now();
    match Cli::parse().verb {
        Verb::Pod(args) => {
            trace::close_inherited();
            cli::exit(owner::run(&args, started), |error| error.exit_code())
        }
        Verb::Delete(args) => cli::exit(delete::run(&args.id), |_| cli::FAILED),
        Verb::Host(args) => cli::exit(host::run(&args), |_| cli::FAILED),
    }
}

#[cfg(test)]
mod tests;
