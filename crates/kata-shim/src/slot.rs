//! Where the services find their pod: there from the start, or launched by the first container that is created, or by
//! containerd's sandbox API.

use std::sync::OnceLock;

use containerd_shim_protos::api::CreateTaskRequest;
use kata_sandbox::Sandbox;
use oci_spec::runtime::Spec;
use tokio::sync::OnceCell;

use crate::chronicle::Chronicle;
use crate::containerd::launch::{Launcher, Wanted};
use crate::containerd::pod_config::PodParts;

/// The place of one pod.
pub(crate) struct Slot {
    sandbox: OnceCell<Sandbox>,
    launcher: Option<Launcher>,
    /// Whether containerd's sandbox API makes the pod.
    sandboxer: bool,
    /// What that API said that the containers need.
    parts: OnceLock<PodParts>,
    chronicle: Chronicle,
}

impl Slot {
    /// A pod that is there.
    pub(crate) fn taken(sandbox: Sandbox) -> Self {
        let chronicle = Chronicle::new();
        chronicle.record(sandbox.events());
        Self { sandbox: OnceCell::new_with(Some(sandbox)), chronicle, ..Self::new(None, false) }
    }

    /// A pod that `launcher` will make: for its first container, or where containerd's sandbox API asks for it.
    pub(crate) fn waiting(launcher: Launcher, sandboxer: bool) -> Self {
        Self::new(Some(launcher), sandboxer)
    }

    /// One that stays empty.
    #[cfg(test)]
    pub(crate) fn empty() -> Self {
        Self::new(None, false)
    }

    fn new(launcher: Option<Launcher>, sandboxer: bool) -> Self {
        let (sandbox, parts) = (OnceCell::new(), OnceLock::new());
        Self { sandbox, launcher, sandboxer, parts, chronicle: Chronicle::new() }
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
        if self.sandboxer {
            return self.get().ok_or_else(|| crate::fault::not_found("the sandbox has not been created yet"));
        }
        self.launched(|| Wanted::by_container(request, spec)).await
    }

    /// The pod that containerd's sandbox API asks for, and what its containers need.
    pub(crate) async fn for_sandbox(&self, wanted: Wanted, parts: PodParts) -> ttrpc::Result<&Sandbox> {
        // Before the first container can come.
        let _ = self.parts.set(parts);
        self.launched(|| Ok(wanted)).await
    }

    async fn launched(&self, wanted: impl FnOnce() -> ttrpc::Result<Wanted>) -> ttrpc::Result<&Sandbox> {
        let launch = async || match &self.launcher {
            Some(launcher) => {
                let sandbox = launcher.launch(wanted()?).await?;
                self.chronicle.record(sandbox.events());
                Ok(sandbox)
            }
            // Made with its pod inside.
            None => Err(crate::fault::no_container()),
        };
        self.sandbox.get_or_try_init(launch).await
    }

    /// What containers need of a pod that has no first one.
    pub(crate) fn parts(&self) -> Option<&PodParts> {
        self.parts.get()
    }

    /// The pod's name, where it has an end of its own to be asked about: containerd's sandbox API made it.
    pub(crate) fn is_sandbox(&self, id: &str) -> bool {
        self.sandboxer && self.launcher.as_ref().is_some_and(|launcher| launcher.id() == id)
    }

    /// Whether the pod lives on when it is empty.
    pub(crate) fn outlives_containers(&self) -> bool {
        self.sandboxer
    }

    /// Whether clients go and come back while the pod lives, as containerd does when it is restarted.
    pub(crate) fn lasting(&self) -> bool {
        self.launcher.is_some()
    }
}
