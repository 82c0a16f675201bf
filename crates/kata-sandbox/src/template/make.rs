//! Makes a template: a machine as every pod's, up to the point where pods differ.

use std::time::{Duration, Instant, SystemTime};

use kata_hypervisor::Vm;
use tokio::task::JoinSet;

use super::store::{About, Entry, Store};
use super::{Ingredients, TemplateError};
use crate::boot::{self, Guest};
use crate::error::chain;
use crate::lifecycle::Pod;
use crate::pod::SandboxSpec;
use crate::process_table::millis;
use crate::sandbox;
use crate::teardown::Teardown;

/// Bound on the agent's answer, once it has said that it serves.
const ANSWER: Duration = Duration::from_secs(10);

/// Boots a machine without network or containers, writes it to files once its agent serves, and ends it. Templates that no pod can
/// start from any more are removed. The answer is what is known of the new one. When `given_up` resolves, everything is undone.
///
/// # Errors
/// There is no template then, and nothing else is left.
pub async fn make(
    spec: SandboxSpec,
    vm: Box<dyn Vm>,
    given_up: impl Future<Output = ()>,
) -> Result<About, TemplateError> {
    if !vm.capabilities().snapshot {
        return Err(TemplateError::Unsupported(spec.choice.driver.to_string()));
    }
    if let Some(key) = super::excluded(&spec.config) {
        return Err(TemplateError::Excluded(key));
    }
    let store = Store::of(&spec.config);
    let (size, _) = crate::resources::template_size(&spec.config);
    store.prepare(size.memory_mib)?;
    let begun = Instant::now();
    let (pod, ready) =
        sandbox::begin(SandboxSpec { network: None, ..spec }, vm).map_err(TemplateError::Launch)?;
    let made = tokio::select! {
        made = write(&pod, ready, &store, begun) => made,
        () = given_up => Err(TemplateError::GivenUp),
    };
    let teardown = Teardown {
        pod,
        boot: None,
        creations: JoinSet::new(),
        dirty: None,
        ended: Vec::new(),
        running: Vec::new(),
    };
    let undone = teardown.run().await.map_err(TemplateError::Launch);
    made.and_then(|about| undone.map(|()| about))
}

async fn write(
    pod: &Pod,
    ready: tokio::net::UnixListener,
    store: &Store,
    begun: Instant,
) -> Result<About, TemplateError> {
    let guest = Guest::find(&pod.config, &pod.artefacts).map_err(TemplateError::Guest)?;
    let (size, growth) = crate::resources::template_size(&pod.config);
    let ingredients = Ingredients::of(&pod.config, &pod.artefacts, &guest, size, growth)?;
    let up = boot::for_template(pod, &ready, guest, size, growth).await.map_err(TemplateError::Boot)?;
    if !up.agent.answers(ANSWER).await {
        return Err(TemplateError::Silent);
    }
    let (agent_version, guest_kernel) = (up.agent_version, up.guest_kernel);
    let announced = up.agent.is_ours();
    // What starts from here has connections of its own.
    drop(up.agent);
    let failed = TemplateError::Snapshot;
    pod.vm.pause().await.map_err(failed)?;
    let (fresh, files) = store.begin()?;
    pod.vm.snapshot(files).await.map_err(failed)?;
    pod.vm.stop().await.map_err(failed)?;
    let (memory, state) = fresh.sums()?;
    let about = About {
        format: About::FORMAT,
        ingredients,
        made_at_ms: millis(SystemTime::now()),
        took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        agent_version,
        guest_kernel,
        announced,
        memory,
        state,
    };
    fresh.finish(&about)?;
    let now = &about.ingredients;
    let stale = |entry: &Entry| entry.about.as_ref().is_none_or(|other| other.ingredients.are_gone(now));
    if let Err(error) = store.clear(stale) {
        tracing::warn!(error = chain(&error), "templates that nothing starts from any more are left");
    }
    Ok(about)
}
