//! Runs once when the guest boots, before its agent: takes the initdata, verifies it and writes it out.
//!
//! It ends with 0 also where the initdata cannot be trusted. Then the agent finds a policy that denies everything, so that the
//! reason reaches the host instead of a guest that does not answer.

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use kata_initdata::guest::{self, Outcome, Places};

/// Takes the pod's initdata from its disk, verifies it and writes its keys to /run/measured-cfg.
#[derive(Parser)]
#[command(version)]
struct Options {}

fn main() -> ExitCode {
    let Options {} = Options::parse();
    tracing_subscriber::fmt().with_writer(std::io::stderr).without_time().init();
    let places = Places::default();
    let error = match guest::process(&places) {
        Ok(Outcome::Absent) => {
            tracing::info!("the machine was given no initdata");
            return ExitCode::SUCCESS;
        }
        Ok(Outcome::Bound { keys, verifiers }) => {
            tracing::info!(keys, verifiers = verifiers.join(","), "the initdata is in place");
            return ExitCode::SUCCESS;
        }
        Err(error) => chain(&error),
    };
    tracing::error!(error, "the initdata is not taken");
    match guest::deny(&places, &error) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = chain(&error), "nor can a policy be left that says so");
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
