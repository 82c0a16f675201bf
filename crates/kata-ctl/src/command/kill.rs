//! `kill`

use super::Outcome;
use crate::cli::KillArgs;
use crate::pod::{Client, PodDir};

/// Sends the signal to the container's first process.
pub async fn run(args: &KillArgs) -> Outcome {
    let pod = PodDir::alive(&args.name)?;
    Client::connect(&pod).await?.init().kill(args.signal, false).await?;
    Ok(0)
}
