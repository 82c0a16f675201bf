//! Whose processes a container sees besides its own.
//!
//! Those who make pods name a pid namespace by the pid of a process in it. All processes of a pod have one pid on the
//! host, the owner's, so the path says that something is shared and not with whom:
//!
//! | the pod's first further container | a later one | joins |
//! |---|---|---|
//! | names a pid namespace | names one | the pod's: that of its first container (`shareProcessNamespace`) |
//! | names none | names one | the only other container that runs (`kubectl debug --target`); with several it is refused |
//! | either | names none | nobody |
//!
//! The pod's first container can join nobody: what it names is outside of the machine, and refused.

use kata_api::agent::CreateContainerRequest;
use ttrpc::Code;

use super::Actor;
use crate::agent_client::{Agent, AgentError};
use crate::guest_spec::{self, GuestSpecError};
use crate::pod::{ContainerSpec, Status};
use crate::process_table::ProcessTable;

/// Whose processes a container sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Pids {
    /// Its own.
    Own,
    /// Those of the pod.
    Pod,
    /// Those of the container of this name.
    Of(String),
}

impl Actor {
    /// What the path in a container's specification means.
    pub(super) fn pids(&mut self, container: &ContainerSpec) -> Result<Pids, GuestSpecError> {
        let path = guest_spec::pid_namespace(&container.spec);
        // The pod's first container has the pod's name, and nobody in its machine to share with.
        if container.id == self.pod.id {
            return path.map_or(Ok(Pids::Own), |_| {
                Err(GuestSpecError::Unsupported {
                    field: "linux.namespaces[].path",
                    reason: "the pid namespace is that of another pod or of the host, which virtual machines do not share",
                })
            });
        }
        let shared = *self.shares_pids.get_or_insert_with(|| path.is_some());
        let Some(path) = path else { return Ok(Pids::Own) };
        if shared {
            return Ok(Pids::Pod);
        }
        match others(&mut self.table, &self.pod.id, &container.id).as_slice() {
            [only] => Ok(Pids::Of(only.clone())),
            several => Err(GuestSpecError::AmbiguousPids { path: path.to_owned(), count: several.len() }),
        }
    }
}

/// Containers that run, without the pod's first and this one.
fn others(table: &mut ProcessTable, first: &str, own: &str) -> Vec<String> {
    let runs = |status| matches!(status, Status::Running | Status::Paused);
    let running = table.containers_mut().filter(|(_, container)| runs(container.init.status()));
    running.map(|(id, _)| id.clone()).filter(|id| id != first && id != own).collect()
}

/// Has the container of `request` join the pid namespace of the container `other`.
pub(super) async fn join(
    agent: &Agent,
    other: &str,
    request: &mut CreateContainerRequest,
) -> Result<(), AgentError> {
    let processes = agent.processes(Some(other)).await?;
    let init = processes.iter().find(|process| process.container_pid == 1);
    let init = init.ok_or_else(|| AgentError::Refused {
        code: Code::FAILED_PRECONDITION,
        message: format!("container {other}, whose pid namespace is to be joined, has ended"),
    })?;
    let linux = request.oci.as_mut().and_then(|oci| oci.linux.as_mut());
    for namespace in linux.into_iter().flat_map(|linux| linux.namespaces.iter_mut()) {
        if namespace.type_ == "pid" {
            namespace.path = format!("/proc/{}/ns/pid", init.pid);
        }
    }
    Ok(())
}
