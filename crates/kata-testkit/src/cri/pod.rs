//! Pods: what is asked for, and what can be done with one that runs.

use std::path::PathBuf;

use super::{Client, ContainerPlan, Cri, EnumOrUnknown, Status, api};

/// A pod to be. What has no word here is set with [`Self::with`].
pub struct PodPlan<'a> {
    cri: &'a Cri,
    handler: String,
    config: api::PodSandboxConfig,
}

impl<'a> PodPlan<'a> {
    pub(super) fn new(cri: &'a Cri, name: &str) -> Self {
        let logs = cri.host().scratch("logs").join(name);
        std::fs::create_dir_all(&logs).unwrap();
        let mut config = api::PodSandboxConfig::new();
        let metadata = config.metadata.mut_or_insert_default();
        metadata.name = name.to_owned();
        metadata.uid = format!("uid-of-{name}");
        metadata.namespace = "default".to_owned();
        config.hostname = name.to_owned();
        config.log_directory = logs.to_str().unwrap().to_owned();
        config.linux.mut_or_insert_default().cgroup_parent = cri.cgroup();
        Self { cri, handler: "kata".to_owned(), config }
    }

    /// Changes what is asked for as the protocol has it.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut api::PodSandboxConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Another handler than `kata`.
    #[must_use]
    pub fn handler(mut self, name: &str) -> Self {
        name.clone_into(&mut self.handler);
        self
    }

    /// Its host name; without, its own name.
    #[must_use]
    pub fn hostname(self, name: &str) -> Self {
        self.with(|config| name.clone_into(&mut config.hostname))
    }

    /// An annotation.
    #[must_use]
    pub fn annotation(self, key: &str, value: &str) -> Self {
        self.with(|config| drop(config.annotations.insert(key.to_owned(), value.to_owned())))
    }

    /// A label.
    #[must_use]
    pub fn label(self, key: &str, value: &str) -> Self {
        self.with(|config| drop(config.labels.insert(key.to_owned(), value.to_owned())))
    }

    /// A kernel parameter of its namespaces.
    #[must_use]
    pub fn sysctl(self, key: &str, value: &str) -> Self {
        self.with(|config| {
            let linux = config.linux.mut_or_insert_default();
            linux.sysctls.insert(key.to_owned(), value.to_owned());
        })
    }

    /// A port of the host that leads to a port of the pod.
    #[must_use]
    pub fn port(self, host: u16, container: u16) -> Self {
        self.with(|config| {
            let mapping = api::PortMapping {
                host_port: host.into(),
                container_port: container.into(),
                ..Default::default()
            };
            config.port_mappings.push(mapping);
        })
    }

    /// Who shares its namespaces: see [`api::NamespaceOption`].
    #[must_use]
    pub fn namespaces(self, change: impl FnOnce(&mut api::NamespaceOption)) -> Self {
        self.with(|config| {
            let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            change(security.namespace_options.mut_or_insert_default());
        })
    }

    /// One pid namespace for all its containers.
    #[must_use]
    pub fn shared_pids(self) -> Self {
        self.namespaces(|options| options.pid = EnumOrUnknown::new(api::NamespaceMode::NAMESPACE_POD))
    }

    /// Starts it, or says how that failed.
    pub fn try_run(mut self) -> Result<Pod<'a>, Status> {
        let linux = self.config.linux.mut_or_insert_default();
        let security = linux.security_context.mut_or_insert_default();
        if security.namespace_options.is_none() {
            // As a kubelet has it, unless the pod asks for something else.
            security.namespace_options.mut_or_insert_default().pid =
                EnumOrUnknown::new(api::NamespaceMode::NAMESPACE_CONTAINER);
        }
        let mut request = api::RunPodSandboxRequest::new();
        request.config = Some(self.config.clone()).into();
        request.runtime_handler = self.handler;
        let answer: api::RunPodSandboxResponse = self.cri.client().runtime("RunPodSandbox", request)?;
        Ok(Pod { cri: self.cri, id: answer.pod_sandbox_id, config: self.config })
    }

    /// Starts it.
    #[track_caller]
    pub fn run(self) -> Pod<'a> {
        self.try_run().unwrap_or_else(|status| panic!("RunPodSandbox: {}", status.message()))
    }
}

/// A pod that was started.
pub struct Pod<'a> {
    cri: &'a Cri,
    id: String,
    config: api::PodSandboxConfig,
}

impl<'a> Pod<'a> {
    /// Its id, which is that of its first container as well.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn client(&self) -> &'a Client {
        self.cri.client()
    }

    /// The CRI that it was made by.
    pub fn cri(&self) -> &'a Cri {
        self.cri
    }

    /// What was asked for.
    pub fn config(&self) -> &api::PodSandboxConfig {
        &self.config
    }

    /// Where its containers' logs are.
    pub fn logs(&self) -> PathBuf {
        self.config.log_directory.clone().into()
    }

    /// A container to be.
    pub fn container(&self, name: &str) -> ContainerPlan<'_> {
        ContainerPlan::new(self, name)
    }

    /// What the runtime says of it.
    #[track_caller]
    pub fn status(&self) -> api::PodSandboxStatus {
        let mut request = api::PodSandboxStatusRequest::new();
        self.id.clone_into(&mut request.pod_sandbox_id);
        let answer: api::PodSandboxStatusResponse =
            self.client().runtime("PodSandboxStatus", request).unwrap();
        answer.status.unwrap()
    }

    /// Whether it runs, as far as the runtime knows.
    pub fn is_ready(&self) -> bool {
        self.status().state == EnumOrUnknown::new(api::PodSandboxState::SANDBOX_READY)
    }

    /// Its first address.
    pub fn address(&self) -> String {
        self.status().network.ip.clone()
    }

    /// Its figures; only newer versions have them.
    pub fn stats(&self) -> Result<api::PodSandboxStats, Status> {
        let mut request = api::PodSandboxStatsRequest::new();
        self.id.clone_into(&mut request.pod_sandbox_id);
        let answer: api::PodSandboxStatsResponse = self.client().runtime("PodSandboxStats", request)?;
        Ok(answer.stats.unwrap_or_default())
    }

    /// Stops it and what runs in it, or says how that failed.
    pub fn try_stop(&self) -> Result<(), Status> {
        let mut request = api::StopPodSandboxRequest::new();
        self.id.clone_into(&mut request.pod_sandbox_id);
        self.client().runtime::<_, api::Nothing>("StopPodSandbox", request).map(drop)
    }

    /// Stops it and what runs in it.
    #[track_caller]
    pub fn stop(&self) {
        self.try_stop().unwrap_or_else(|status| panic!("StopPodSandbox: {}", status.message()));
    }

    /// Stops it and removes it with all its containers.
    #[track_caller]
    pub fn remove(&self) {
        self.stop();
        let mut request = api::RemovePodSandboxRequest::new();
        self.id.clone_into(&mut request.pod_sandbox_id);
        let removed = self.client().runtime::<_, api::Nothing>("RemovePodSandbox", request);
        removed.unwrap_or_else(|status| panic!("RemovePodSandbox: {}", status.message()));
    }
}
