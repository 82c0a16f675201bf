//! `policy`: which requests of the host a guest serves.
//!
//! ```text
//!   Kubernetes manifest ─┐
//!   OCI bundle ──────────┼─▶ Container (what may be created) ─▶ Rego ─▶ people read it ─▶ initdata, image, SetPolicy
//!   kata-ctl run's words ┘                                       │
//!                                    requests as JSON ─▶ kata-policy: the engine that the agent has
//! ```

#[cfg(feature = "policy")]
mod answer;
mod container;
mod manifest;
mod notes;
mod rego;
mod volumes;

use std::path::{Path, PathBuf};

use kata_oci::Interrupt;

use super::Outcome;
use super::guest::{content, set_policy};
use super::run::Plan;
use crate::bundle;
use crate::cli::{PolicyCommand, PolicyGenerateArgs, RunArgs};
use crate::failure::Failure;
use crate::output;
use container::Container;

/// Why no policy can be written.
#[derive(Debug, thiserror::Error)]
enum GenerateError {
    #[error("{file} is not YAML")]
    Yaml {
        file: String,
        #[source]
        source: Box<serde_saphyr::Error>,
    },
    #[error("{file} has no pod and nothing that makes pods")]
    NoPod { file: String },
    #[error("{file} has {count} pods, {names}: a policy is for one, so give one alone", count = .names.len(), names = .names.join(", "))]
    Pods { file: String, names: Vec<String> },
    #[error("{of}: {what}")]
    Part { of: String, what: &'static str },
    #[error("give one file")]
    Files,
}

/// Why no policy can be asked.
#[cfg(not(feature = "policy"))]
#[derive(Debug, thiserror::Error)]
#[error("this program was built without the engine of policies; build kata-ctl with its feature `policy`")]
struct NoEngine;

/// Does what is asked.
pub async fn run(command: &PolicyCommand) -> Outcome {
    match command {
        PolicyCommand::Generate(args) => generate(args).await,
        #[cfg(feature = "policy")]
        PolicyCommand::Test(args) => answer::test(args),
        #[cfg(feature = "policy")]
        PolicyCommand::Explain(args) => answer::explain(args),
        #[cfg(not(feature = "policy"))]
        PolicyCommand::Test(_) | PolicyCommand::Explain(_) => Err(NoEngine.into()),
        PolicyCommand::Set(args) => set_policy(&args.name, &args.file).await,
    }
}

async fn generate(args: &PolicyGenerateArgs) -> Outcome {
    let (source, containers) = containers(args).await?;
    // Nobody could pull what has no name, and what `run` runs is the host's.
    let host_rootfs = args.host_rootfs || args.run || containers.iter().any(|it| it.images.is_empty());
    let (exec, logs, forward) = (args.allow_exec, !args.deny_logs, args.allow_forward);
    let wishes = rego::Wishes { exec, logs, forward, host_rootfs };
    output::print(&rego::policy(&source, &containers, wishes)?)?;
    Ok(0)
}

/// What the policy is for: in words, and the containers.
async fn containers(args: &PolicyGenerateArgs) -> Result<(String, Vec<Container>), Failure> {
    if let Some(dir) = &args.bundle {
        let spec = bundle::read(dir)?;
        return Ok((format!("the bundle {}", dir.display()), vec![Container::of_spec(&spec)]));
    }
    if args.run {
        let words = ["kata-ctl"].into_iter().chain(args.words.iter().map(String::as_str));
        // Its own message is the help that somebody needs here.
        let run = <RunWords as clap::Parser>::try_parse_from(words)
            .map_err(|error| Failure::text(error.render().to_string().trim().to_owned()))?;
        return Ok((format!("kata-ctl run {}", args.words.join(" ")), vec![of_run(run.args).await?]));
    }
    let [file] = args.words.as_slice() else { return Err(GenerateError::Files.into()) };
    let name = named(Path::new(file));
    let text = String::from_utf8_lossy(&content(&PathBuf::from(file))?).into_owned();
    let containers = manifest::containers(&name, &text)?;
    Ok((name, containers))
}

/// The words of `run`, by themselves.
#[derive(Debug, clap::Parser)]
struct RunWords {
    #[command(flatten)]
    args: RunArgs,
}

/// Fetches the image, whose entry point and variables the container would have.
async fn of_run(args: RunArgs) -> Result<Container, Failure> {
    let plan = Plan::make(args)?;
    let root = plan.root(&Interrupt::default()).await?;
    let spec = bundle::spec(&plan.pod.bundle(), &plan.request, root.defaults(), &root.stack(&plan.pod))?;
    let mut container = Container::of_spec(&spec);
    container.stdin = plan.interactive;
    Ok(container)
}

fn named(file: &Path) -> String {
    if file == Path::new("-") { "standard input".to_owned() } else { file.display().to_string() }
}

#[cfg(test)]
#[cfg(feature = "policy")]
mod tests;
