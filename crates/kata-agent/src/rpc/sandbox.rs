//! Requests about the sandbox: what the containers of the guest share.

use std::path::Path;
use std::sync::Arc;

use kata_api::agent::{CreateSandboxRequest, RemoveContainerRequest};
use kata_api::guest;

use super::agent::{Agent, Sandbox, SandboxParts};
use super::container;
use super::error::RpcError;
use super::hooks::GuestHooks;
use crate::aside;
use crate::container::PodNamespaces;

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Seconds that each container has to go when the sandbox goes.
const REMOVE_WITHIN: u32 = 10;

/// Sets up what containers rely on: name, name servers, modules, namespaces, storages.
///
/// # Errors
/// A second sandbox, also after the first was destroyed, an unsupported part, or the step that failed. Nothing stays mounted then.
pub async fn create(agent: &Arc<Agent>, request: CreateSandboxRequest) -> Result<(), RpcError> {
    {
        let mut sandbox = agent.sandbox();
        agent.check_not_over()?;
        if let Some(sandbox) = sandbox.as_ref() {
            return Err(RpcError::Exists(format!("sandbox {:?}", sandbox.id)));
        }
        *sandbox = Some(Sandbox { id: request.sandbox_id.clone(), made: None });
    }
    let owned = agent.clone();
    aside::whole(format!("creating sandbox {:?}", request.sandbox_id), async move {
        let made = set_up(&owned, request).await;
        let mut sandbox = owned.sandbox();
        match made {
            Ok(parts) => {
                if let Some(sandbox) = sandbox.as_mut() {
                    sandbox.made = Some(parts);
                }
                Ok(())
            }
            Err(error) => {
                *sandbox = None;
                Err(error)
            }
        }
    })
    .await?
}

async fn set_up(agent: &Agent, request: CreateSandboxRequest) -> Result<SandboxParts, RpcError> {
    if !request.hostname.is_empty() {
        let set = rustix::system::sethostname(request.hostname.as_bytes());
        set.map_err(RpcError::system(format!("setting the host name {:?}", request.hostname)))?;
    }
    if !request.dns.is_empty() {
        let path = Path::new(RESOLV_CONF);
        std::fs::create_dir_all("/etc").map_err(RpcError::file("making directory", "/etc"))?;
        std::fs::write(path, resolv_conf(&request.dns)).map_err(RpcError::file("writing", path))?;
    }
    for module in request.kernel_modules {
        let (modules, what) = (agent.modules.clone(), format!("loading kernel module {}", module.name));
        let load = move || modules.require(&module.name, &module.parameters.join(" "));
        aside::within(aside::BOUND, what, load).await??;
    }
    let shared = Path::new(guest::SANDBOX_DIR);
    std::fs::create_dir_all(shared).map_err(RpcError::file("making directory", shared))?;
    // They begin with the host name that was just set.
    let namespaces = Arc::new(PodNamespaces::new()?);
    let hooks = Arc::new(GuestHooks::below(&request.guest_hook_path)?);
    let mounts = agent.storages.add(request.storages).await?;
    Ok(SandboxParts { mounts, namespaces, shares_pids: request.sandbox_pidns, hooks })
}

/// Lines of a resolv.conf as they are; bare addresses become name servers.
fn resolv_conf(lines: &[String]) -> String {
    lines.iter().fold(String::new(), |mut text, line| {
        if line.parse::<std::net::IpAddr>().is_ok() {
            text.push_str("nameserver ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
        text
    })
}

/// Removes all containers and the sandbox's mounts, writes back what is dirty, and lets the agent end. Asked for again it does what
/// is left.
///
/// # Errors
/// The first failure; the rest is undone all the same.
pub async fn destroy(agent: &Arc<Agent>) -> Result<(), RpcError> {
    agent.end();
    let mut result = Ok(());
    for container_id in agent.container_ids() {
        let request = RemoveContainerRequest { container_id, timeout: REMOVE_WITHIN, ..Default::default() };
        match container::remove(agent, &request).await {
            // Another request was quicker.
            Err(RpcError::NoContainer(_)) => {}
            removed => result = result.and(removed),
        }
    }
    let sandbox = agent.sandbox().take();
    if let Some(sandbox) = sandbox {
        tracing::info!(sandbox = sandbox.id, "sandbox destroyed");
        let mounts = sandbox.made.map(|parts| parts.mounts).unwrap_or_default();
        let unmounted = agent.storages.remove(mounts).await.map_err(RpcError::from);
        result = result.and(unmounted);
    }
    result = result.and(agent.storages.remove_kept().await.map_err(RpcError::from));
    // May take as long as the host's disks do.
    let _ = tokio::task::spawn_blocking(rustix::fs::sync).await;
    agent.done.notify_one();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_name_servers_and_lines_stay() {
        let lines =
            ["10.0.0.1", "search a.example b.example", "nameserver ::1", "fe80::1"].map(str::to_owned);
        assert_eq!(
            resolv_conf(&lines),
            "nameserver 10.0.0.1\nsearch a.example b.example\nnameserver ::1\nnameserver fe80::1\n"
        );
    }
}
