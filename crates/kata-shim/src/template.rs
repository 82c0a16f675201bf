//! `template`: the machines that pods start as copies of. What it answers is JSON, for `kata-ctl factory`.

use std::io;
use std::time::Instant;

use kata_config::{Config, ConfigErrors};
use kata_sandbox::template::{self, TemplateError};
use kata_sandbox::{ResourceSpec, SandboxSpec};
use serde::Serialize;
use serde_json::json;
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{SourceArgs, TemplateStatusArgs, TemplateVerb};
use crate::fault::chain;
use crate::ground::{Ground, GroundError};
use crate::plan::{Plan, PlanError};

#[derive(Debug, Error)]
pub(crate) enum TemplateVerbError {
    #[error(transparent)]
    Plan(PlanError),
    #[error("the configuration cannot be used:\n{0}")]
    Config(ConfigErrors),
    #[error(transparent)]
    Ground(GroundError),
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    #[error(transparent)]
    Template(Box<TemplateError>),
}

impl From<TemplateError> for TemplateVerbError {
    fn from(error: TemplateError) -> Self {
        Self::Template(Box::new(error))
    }
}

/// Does what was asked.
///
/// # Errors
/// Why it could not be done. Of a template that could not be made nothing is left.
pub(crate) fn run(verb: &TemplateVerb, started: Instant) -> Result<(), TemplateVerbError> {
    match verb {
        TemplateVerb::Make(sources) => make(sources, started),
        TemplateVerb::Status(args) => status(args),
        TemplateVerb::Destroy(sources) => destroy(sources),
    }
}

fn status(args: &TemplateStatusArgs) -> Result<(), TemplateVerbError> {
    let Plan { config, artefacts, .. } = plan(&args.sources)?;
    let status = template::status(&config, &artefacts, args.verify)?;
    answer(&status);
    Ok(())
}

fn destroy(sources: &SourceArgs) -> Result<(), TemplateVerbError> {
    // Whatever pods could be made with it, or not.
    let config = Config::load(&sources.sources()).map_err(TemplateVerbError::Config)?;
    let removed = template::destroy(&config)?;
    answer(&json!({ "dir": config.hypervisor.qemu.factory.template_path, "removed": removed }));
    Ok(())
}

fn make(sources: &SourceArgs, started: Instant) -> Result<(), TemplateVerbError> {
    let Plan { config, artefacts, choice } = plan(sources)?;
    let driver = kata_hypervisor::driver(choice.driver);
    let id = format!("template-{}", std::process::id());
    let ground = Ground::of(&id);
    // Nobody is to be told of it: it is no pod.
    drop(ground.claim(&id).map_err(TemplateVerbError::Ground)?);
    ground.close();
    let (kept, files) = (config.clone(), artefacts.clone());
    let spec = SandboxSpec {
        id,
        hostname: None,
        config,
        artefacts,
        run_dir: ground.run_dir.clone(),
        started,
        choice,
        network: None,
        resources: ResourceSpec::default(),
    };
    let made = on_runtime(async {
        match interrupted() {
            Ok(interrupted) => {
                template::make(spec, driver, interrupted).await.map_err(TemplateVerbError::from)
            }
            Err(error) => Err(TemplateVerbError::Runtime(error)),
        }
    });
    let cleared = ground.clear().map_err(TemplateVerbError::Ground);
    if made.is_err()
        && let Err(left) = &cleared
    {
        // It must not hide why there is no template.
        eprintln!("containerd-shim-kata-v2: {}", chain(left));
    }
    made?;
    cleared?;
    answer(&template::status(&kept, &files, false)?);
    Ok(())
}

fn plan(sources: &SourceArgs) -> Result<Plan, TemplateVerbError> {
    Plan::make(&sources.sources()).map_err(TemplateVerbError::Plan)
}

fn on_runtime<T>(work: impl Future<Output = Result<T, TemplateVerbError>>) -> Result<T, TemplateVerbError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(TemplateVerbError::Runtime)?;
    let done = runtime.block_on(work);
    runtime.shutdown_background();
    done
}

/// Resolves when this process is asked to end.
fn interrupted() -> io::Result<impl Future<Output = ()>> {
    let mut signals = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = signals.0.recv() => {}
            _ = signals.1.recv() => {}
        }
    })
}

/// Answers on the standard output.
fn answer(what: &impl Serialize) {
    // These types are written to memory without fail.
    println!("{}", serde_json::to_string_pretty(what).unwrap_or_default());
}
