//! Where the services find their pod: there from the start, or launched by the first container that is created.

use containerd_shim_protos::api::CreateTaskRequest;
use kata_sandbox::Sandbox;
use oci_spec::runtime::Spec;
use tokio::sync::OnceCell;

use crate::chronicle::Chronicle;
use crate::containerd::launch::Launcher;

/// The place of one pod.
pub(crate) struct Slot {
    sandbox: OnceCell<Sandbox>,
    launcher: Option<Launcher>,
    chronicle: Chronicle,
}

impl Slot {
    /// A pod that is there.
    pub(crate) fn taken(sandbox: Sandbox) -> Self {
        let chronicle = Chronicle::new();
        chronicle.record(sandbox.events());
        Self { sandbox: OnceCell::new_with(Some(sandbox)), launcher: None, chronicle }
    }

    /// A pod that `launcher` will make.
    pub(crate) fn waiting(launcher: Launcher) -> Self {
        Self { sandbox: OnceCell::new(), launcher: Some(launcher), chronicle: Chronicle::new() }
    }

    /// One that stays empty.
    #[cfg(test)]
    pub(crate) fn empty() -> Self {
        Self { sandbox: OnceCell::new(), launcher: None, chronicle: Chronicle::new() }
    }

    pub(crate) fn get(&self) -> Option<&Sandbox> {
        self.sandbox.get()
    }

    /// What has happened in the pod.
    pub(crate) fn chronicle(&self) -> &Chronicle {
        &self.chronicle
    }

    /// The pod for a container that is being created. Where that fails, the next one may try again.
    pub(crate) async fn for_create(
        &self,
        request: &CreateTaskRequest,
        spec: &Spec,
    ) -> ttrpc::Result<&Sandbox> {
        let launch = async || match &self.launcher {
            Some(launcher) => {
                let sandbox = launcher.launch(request, spec).await?;
                self.chronicle.record(sandbox.events());
                Ok(sandbox)
            }
            // Made with its pod inside.
            None => Err(crate::fault::no_container()),
        };
        self.sandbox.get_or_try_init(launch).await
    }

    /// Whether clients go and come back while the pod lives, as containerd does when it is restarted.
    pub(crate) fn lasting(&self) -> bool {
        self.launcher.is_some()
    }
}
