//! Requests about processes: exec, signals, and their end.

use std::sync::Arc;

use kata_api::agent::{ExecProcessRequest, SignalProcessRequest};

use super::agent::{Agent, Process};
use super::error::RpcError;
use super::{signal, spec};
use crate::aside;
use crate::container::Spawned;
use crate::stdio::{self, Ports, Withheld};

/// Runs a further process in a container.
///
/// # Errors
/// Unknown container, id taken, what the streams or the engine refuse.
pub async fn exec(
    agent: &Arc<Agent>,
    request: ExecProcessRequest,
    withheld: Withheld,
) -> Result<(), RpcError> {
    if request.string_user.is_some() {
        return Err(RpcError::Unsupported("a user by name"));
    }
    let (id, exec) = (request.container_id, request.exec_id);
    if exec.is_empty() || exec == id {
        return Err(RpcError::Invalid(format!("exec id {exec:?} is the container's own")));
    }
    let wire = request.process.into_option();
    let mut process =
        spec::process(wire.ok_or_else(|| RpcError::Invalid("the request has no process".to_owned()))?)?;
    let container = agent.container(&id)?;
    let slot = container.reserve(&exec)?;
    let ports = Ports { stdin: request.stdin_port, stdout: request.stdout_port, stderr: request.stderr_port };
    let agent = agent.clone();
    // Once the process runs it must be known, whether the caller still waits or not.
    aside::whole(format!("starting {exec:?} in container {id:?}"), async move {
        if let Some(env) = process.env_mut() {
            container.secrets.open_env(env).await?;
        }
        let terminal = process.terminal().unwrap_or(false);
        let (io, stdio) =
            stdio::prepare(&agent.streams, ports, withheld, terminal, agent.settings.pipe_size).await?;
        // The host decides how long its streams took.
        agent.confirm(&id, &container)?;
        let Spawned { pid, terminal } = agent.engine.exec(&id, &process, io).await?;
        let exit = agent.reaper.register(pid);
        tracing::info!(container = id, exec, pid = pid.as_raw_nonzero().get(), "process started");
        let stdio = stdio.attach(&exit, terminal)?;
        slot.fill(Process::new(pid, exit, stdio));
        Ok(())
    })
    .await?
}

/// Sends a signal to one process. SIGKILL without an exec id ends the whole container.
///
/// # Errors
/// Unknown process, bad signal; [`RpcError::State`] for a process that has ended.
pub async fn send_signal(agent: &Agent, request: &SignalProcessRequest) -> Result<(), RpcError> {
    let process = agent.process(&request.container_id, &request.exec_id)?;
    let wanted = signal::of_number(request.signal)?;
    let whole = request.exec_id.is_empty() && wanted == rustix::process::Signal::KILL;
    if process.exit.status().is_some() && !whole {
        return Err(RpcError::State("the process has ended".to_owned()));
    }
    if whole {
        return Ok(agent.engine.signal_all(&request.container_id, wanted).await?);
    }
    signal::send(&process, wanted)
}

/// The exit code of a process, once it has ended.
///
/// # Errors
/// Unknown process.
pub async fn wait(agent: &Agent, container: &str, exec: &str) -> Result<i32, RpcError> {
    Ok(agent.process(container, exec)?.wait().await)
}
