//! A pod with a fake machine and a fake agent, and real files, FIFOs, mounts and processes.
#![allow(dead_code, reason = "no test file uses all of it")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kata_api::ports;
use kata_config::{Artefacts, Config};
use kata_hypervisor::fake::FakeVm;
use kata_hypervisor::{Accelerator, Choice, DriverKind};
use kata_sandbox::{
    ContainerSpec, NetworkSpec, ProcessId, ResourceSpec, Sandbox, SandboxError, SandboxSpec, Stdio,
};
use kata_testkit::fake_agent::FakeAgent;
use kata_testkit::leaks;
use oci_spec::runtime::{Process, Spec};

/// A daemon that serves nothing and does not end. Stopped rather than asleep: it has no child that could outlive it.
const IDLE_DAEMON: &str = "while :; do kill -STOP $$; done";

/// One test's world. Nothing of it may be left when it is dropped.
pub struct Rig {
    pub dir: tempfile::TempDir,
    pub vm: FakeVm,
    pub agent: FakeAgent,
    pub config: Config,
    pub network: Option<NetworkSpec>,
    pub resources: ResourceSpec,
    /// What the guest image says that its guests can do.
    pub capabilities: Vec<&'static str>,
    daemon: String,
    announces: bool,
    streams: bool,
}

impl Rig {
    /// `None` where the test cannot run.
    pub async fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            kata_testkit::skip("mounts need root");
            return None;
        }
        let dir = tempfile::Builder::new().prefix("ks-").rand_bytes(5).tempdir_in("/run").unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711)).unwrap();
        let mut config = Config::default();
        config.agent.kata.reconnect_timeout_ms = 10_000;
        config.agent.kata.create_container_timeout = 10;
        Some(Self {
            dir,
            vm: FakeVm::new(),
            agent: FakeAgent::start().await,
            config,
            network: None,
            resources: ResourceSpec::default(),
            capabilities: Vec::new(),
            daemon: IDLE_DAEMON.to_owned(),
            announces: true,
            streams: true,
        })
    }

    /// The daemon is this shell script.
    pub fn daemon(mut self, script: &str) -> Self {
        self.daemon = script.to_owned();
        self
    }

    /// The agent says nothing when it serves.
    pub fn silent(mut self) -> Self {
        self.announces = false;
        self
    }

    /// The agent has no stream port.
    pub fn without_streams(mut self) -> Self {
        self.streams = false;
        self
    }

    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run").join("pod")
    }

    /// What the owner would launch.
    pub fn spec(&self) -> SandboxSpec {
        std::fs::create_dir_all(self.dir.path().join("run")).unwrap();
        let daemon = self.dir.path().join("virtiofsd");
        std::fs::write(&daemon, format!("#!/bin/sh\n{}\n", self.daemon)).unwrap();
        std::fs::set_permissions(&daemon, PermissionsExt::from_mode(0o755)).unwrap();
        SandboxSpec {
            id: "pod".to_owned(),
            hostname: None,
            config: self.config.clone(),
            artefacts: Artefacts {
                vmm: "/bin/true".into(),
                kata_vmm: "/bin/true".into(),
                virtiofsd: Some(daemon),
                guest_image: Some(self.image()),
            },
            run_dir: self.run_dir(),
            started: Instant::now(),
            choice: Choice {
                driver: DriverKind::Qemu,
                accelerator: Accelerator::Tcg,
                reason: "it is a test".to_owned(),
            },
            network: self.network.clone(),
            resources: self.resources.clone(),
        }
    }

    fn image(&self) -> PathBuf {
        let dir = self.dir.path().join("image");
        std::fs::create_dir_all(&dir).unwrap();
        // Only once: a template is of files that have not changed since.
        for file in ["vmlinux", "initrd"].map(|file| dir.join(file)).iter().filter(|file| !file.exists()) {
            std::fs::write(file, "none").unwrap();
        }
        // That of "none": a machine that does not come up has its image looked at.
        let digest = "140bedbf9c3f6d56a9846d2ba7088798683f4da0c248231336e6a05679e4fdfe";
        let manifest = format!(
            r#"{{"version": 1, "kernel": {{"path": "vmlinux", "sha256": "{digest}"}},
                "initrd": {{"path": "initrd", "sha256": "{digest}"}}, "agent": {{"announces": {}}},
                "capabilities": {:?}}}"#,
            self.announces, self.capabilities
        );
        std::fs::write(dir.join("manifest.json"), manifest).unwrap();
        dir
    }

    /// The machine with the agent in it, connected to it, and not announced.
    pub fn guest(&self) -> FakeVm {
        let agent = self.agent.clone();
        if self.streams {
            self.vm
                .clone()
                .on_connect(move |incoming| agent.accept(incoming.port, incoming.peer_port, incoming.stream))
        } else {
            self.vm.clone().forward(ports::AGENT, agent.socket())
        }
    }

    /// Launches a pod whose agent does not report by itself: see [`Self::announce`].
    pub async fn launch(&self) -> Result<Sandbox, SandboxError> {
        Sandbox::launch(self.spec(), Box::new(self.guest())).await
    }

    /// The agent reports, once the machine runs.
    pub async fn announce(&self) {
        let begin = Instant::now();
        while self.vm.with_spec(|_| ()).is_none() {
            assert!(begin.elapsed() < Duration::from_secs(30), "the machine was not booted");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        FakeAgent::announce(self.vm.dial(ports::READY).await.unwrap()).await;
    }

    /// A pod that is ready.
    pub async fn pod(&self) -> Sandbox {
        let sandbox = self.launch().await.unwrap();
        if self.announces {
            self.announce().await;
        }
        sandbox.ready().await.unwrap();
        sandbox
    }

    /// A bundle with a rootfs that has the file `/who`.
    pub fn bundle(&self, id: &str) -> PathBuf {
        let bundle = self.dir.path().join("bundles").join(id);
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        std::fs::write(bundle.join("rootfs/who"), id).unwrap();
        bundle
    }

    /// A container that runs a built-in program of the fake agent.
    pub fn container(&self, id: &str, args: &[&str], stdio: Stdio) -> ContainerSpec {
        let mut spec = Spec::default();
        spec.set_process(Some(process(args)));
        // The defaults are mounts of the guest's own.
        ContainerSpec { id: id.to_owned(), bundle: self.bundle(id), spec, rootfs: Vec::new(), stdio }
    }

    /// Makes a FIFO.
    pub fn fifo(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        path
    }

    /// What of the pod is there: processes, mounts, sockets.
    pub fn traces(&self) -> Vec<String> {
        let (run, nothing) = (self.dir.path().join("none"), Path::new("/nonexistent"));
        let mut traces = leaks::find(self.dir.path(), &run, nothing, &(900_000..1_000_000));
        traces.extend(
            std::fs::read_dir(self.run_dir())
                .into_iter()
                .flatten()
                .map(|entry| entry.unwrap().path())
                .filter(|path| !path.ends_with("state.json"))
                .map(|path| format!("file {}", path.display())),
        );
        let uids = std::fs::read_dir(self.dir.path().join("run/.uids")).into_iter().flatten();
        traces.extend(uids.map(|entry| format!("identity {}", entry.unwrap().path().display())));
        traces
    }

    /// What is mounted below this test's directory.
    pub fn mounts(&self) -> Vec<String> {
        self.traces().into_iter().filter(|trace| trace.starts_with("mount ")).collect()
    }

    /// Nothing of the pod is there. The fake machine's own socket may take a moment.
    pub async fn assert_clean(&self) {
        let begin = Instant::now();
        while !self.traces().is_empty() && begin.elapsed() < Duration::from_secs(20) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(self.traces(), Vec::<String>::new());
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        leaks::clear(self.dir.path(), &(900_000..900_000));
    }
}

pub fn process(args: &[&str]) -> Process {
    let mut process = Process::default();
    process.set_args(Some(args.iter().map(|arg| (*arg).to_owned()).collect()));
    process
}

pub fn init() -> ProcessId {
    ProcessId::init("c")
}

/// Bounds what a test waits for.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(8), what).await.expect("it should not take that long")
}
