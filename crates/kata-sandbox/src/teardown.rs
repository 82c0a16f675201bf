//! The end of a pod: nothing of it stays on the host but its directory with state and logs.
//!
//! The leak record is what counts. The orderly steps before it only give programs the time to deliver what they have;
//! whatever they leave, [`Record::release`] takes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kata_hypervisor::process::{Record, RecordError, Released};
use tokio::task::{JoinHandle, JoinSet};

use crate::agent_client::Agent;
use crate::blocking::blocking;
use crate::error::SandboxError;
use crate::lifecycle::Pod;
use crate::stdio::Streams;

/// Name of the leak record in a pod's directory.
pub(crate) const RECORD: &str = "resources.jsonl";

/// Releases everything that the pod in `run_dir` has on the host, after its owner died. The directory itself stays.
///
/// Must not be called while the owner lives; [`State`](crate::State) tells who that is. Idempotent.
///
/// # Errors
/// Something could not be released, and is named. The rest was.
pub fn release(run_dir: &Path) -> Result<Released, RecordError> {
    Record::release(&run_dir.join(RECORD))
}

/// How long a guest may take to write back and unmount its disks.
const WRITE_BACK: Duration = Duration::from_secs(10);

/// One pod's teardown.
pub(crate) struct Teardown {
    pub(crate) pod: Arc<Pod>,
    /// The boot, if it goes on.
    pub(crate) boot: Option<JoinHandle<()>>,
    /// Work that holds mounts. It was told to end.
    pub(crate) creations: JoinSet<()>,
    /// The agent of a machine that lives and has disks: what the guest has not written yet is to reach them.
    pub(crate) dirty: Option<Agent>,
    /// Streams of processes that ended before: their output is on its way.
    pub(crate) ended: Vec<Streams>,
    /// Streams of processes that end with the machine.
    pub(crate) running: Vec<Streams>,
}

impl Teardown {
    pub(crate) async fn run(mut self) -> Result<(), SandboxError> {
        if let Some(boot) = self.boot.take() {
            boot.abort();
            // It spawns processes: what it does not begin from here on, nobody need end.
            let _ = boot.await;
        }
        crate::lifecycle::drain(self.ended, &self.pod.id).await;
        if let Some(agent) = self.dirty
            && let Err(error) = agent.destroy_sandbox(WRITE_BACK).await
        {
            tracing::warn!(pod = %self.pod.id, %error, "the guest did not write back its disks");
        }
        let stopped = self.pod.vm.stop().await;
        // Their ends in the guest are gone, so these come to their own.
        crate::lifecycle::drain(self.running, &self.pod.id).await;
        while self.creations.join_next().await.is_some() {}
        self.pod.disks.forget_all().await;
        let unplugged = match &self.pod.network {
            Some(network) => network.release().await,
            None => Ok(()),
        };
        self.pod.resources.leave();
        let run_dir = self.pod.run_dir.clone();
        let released = blocking(move || release(&run_dir)).await;
        let failed =
            |error: Box<dyn std::error::Error + Send + Sync>| SandboxError::Teardown(Arc::from(error));
        match released {
            Some(Ok(released)) => tracing::info!(pod = %self.pod.id, ?released, "nothing is left"),
            Some(Err(error)) => return Err(failed(error.into())),
            None => return Err(failed("the release of what the pod had was interrupted".into())),
        }
        unplugged.map_err(|error| failed(error.into()))?;
        // The VMM's processes are in the record as well: a machine that would not stop was killed.
        if let Err(error) = stopped {
            tracing::warn!(pod = %self.pod.id, %error, "the machine was not stopped in order; its processes were killed");
        }
        Ok(())
    }
}
