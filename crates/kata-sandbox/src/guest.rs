//! What can be asked of a pod's guest as a whole, beside its containers.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kata_api::csi::VolumeStatsResponse;
use kata_api::evidence::GetEvidenceResponse;

use crate::agent_client::{Agent, AgentError};
use crate::error::SandboxError;
use crate::storage::direct;

/// Bound on the guest's figures: who scrapes many pods does not wait for one that hangs.
const SCRAPE: Duration = Duration::from_secs(2);

/// The guest of a pod that runs. See [`Sandbox::guest`](crate::Sandbox::guest).
#[derive(Clone, Debug)]
pub struct Guest(Agent);

impl Guest {
    pub(crate) fn new(agent: Agent) -> Self {
        Self(agent)
    }

    /// The guest's figures in Prometheus' text format. A guest may write anything: the text is not checked.
    ///
    /// # Errors
    /// The agent has none, or does not answer within 2 seconds.
    pub async fn metrics(&self) -> Result<String, SandboxError> {
        told("read its metrics", self.0.metrics(SCRAPE).await)
    }

    /// The guest's packet filter, as `iptables-save` or `ip6tables-save` writes it.
    ///
    /// # Errors
    /// `Unimplemented` where the guest has no such program.
    pub async fn iptables(&self, ipv6: bool) -> Result<Vec<u8>, SandboxError> {
        told("read its packet filter", self.0.iptables(ipv6).await)
    }

    /// Replaces the guest's packet filter. The answer is what the guest says.
    ///
    /// # Errors
    /// As for [`iptables`](Self::iptables), and rules that are refused.
    pub async fn set_iptables(&self, ipv6: bool, rules: Vec<u8>) -> Result<Vec<u8>, SandboxError> {
        told("change its packet filter", self.0.set_iptables(ipv6, rules).await)
    }

    /// Space and files of the volume that the guest has at `path`, or of the direct volume that is called so on the host.
    ///
    /// # Errors
    /// `NotFound` where there is none.
    pub async fn volume_stats(&self, path: &str) -> Result<VolumeStatsResponse, SandboxError> {
        told("read the volume's statistics", self.0.volume_stats(&in_guest(path)).await)
    }

    /// Has the guest take note that the volume at `path`, which is as for [`volume_stats`](Self::volume_stats), has grown to
    /// `bytes`.
    ///
    /// # Errors
    /// The agent's.
    pub async fn resize_volume(&self, path: &str, bytes: u64) -> Result<(), SandboxError> {
        told("resize the volume", self.0.resize_volume(&in_guest(path), bytes).await)
    }

    /// What the machine's hardware says of it, with `report_data` in what it signs. Nobody here verifies it.
    ///
    /// # Errors
    /// `Unimplemented` where there is no hardware that reports, or the guest's kernel does not speak to it.
    pub async fn evidence(&self, report_data: Vec<u8>) -> Result<GetEvidenceResponse, SandboxError> {
        told("have the hardware report", self.0.evidence(report_data).await)
    }

    /// Gives the agent the policy that it checks requests by.
    ///
    /// # Errors
    /// `Unimplemented` where the agent checks none.
    pub async fn set_policy(&self, policy: String) -> Result<(), SandboxError> {
        told("take a policy", self.0.set_policy(policy).await)
    }
}

/// What a direct volume is called in the guest; any other path is one there.
fn in_guest(path: &str) -> String {
    match direct::find(Path::new(path)) {
        Ok(Some(volume)) => volume.in_guest().display().to_string(),
        Ok(None) | Err(_) => path.to_owned(),
    }
}

fn told<T>(action: &'static str, answer: Result<T, AgentError>) -> Result<T, SandboxError> {
    answer.map_err(|error| SandboxError::Guest { action, source: Arc::new(error) })
}
