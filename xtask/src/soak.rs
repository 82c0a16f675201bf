//! Pods that come and go at random, for a time.

use std::time::{Duration, SystemTime};

use clap::Args;

use crate::products::{Products, Profile};
use crate::shell;
use crate::{Chores, packages, say, suite};

/// How long, how much, and which.
#[derive(Args)]
pub struct Soak {
    /// Starts no more pods after this time, e.g. 90s or 10m.
    #[arg(long, default_value = "10m", value_parser = humantime::parse_duration)]
    time: Duration,
    /// Pods altogether, if the time is enough for them.
    #[arg(long, default_value_t = 200)]
    rounds: u64,
    /// What happens in each round follows from it; even for the older containerd, odd for the newer. Without: the clock's.
    #[arg(long)]
    seed: Option<u64>,
    /// Pods at once.
    #[arg(long, default_value_t = 3)]
    pods: u64,
}

/// Builds what is needed, and soaks.
pub fn run(soak: &Soak) -> Chores {
    packages::for_test()?;
    let variables = suite::prepare()?;
    let clock = || SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
    let seed = soak.seed.unwrap_or_else(clock);
    say(&format!("soaking for {}, seed {seed}", humantime::format_duration(soak.time)));
    let program = Products::built(Profile::Quick).program("examples/soak");
    let numbers = [soak.time.as_secs(), soak.rounds, seed, soak.pods];
    let mut command = std::process::Command::new(program);
    command.args(numbers.map(|number| number.to_string())).envs(variables);
    command.envs(suite::newer_programs());
    shell::run(&mut command)
}
