//! The services and the life of a pod, over its real socket, with a fake virtual machine behind it.

mod agent;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    CheckpointTaskRequest, ConnectRequest, CreateTaskRequest, CreateTaskResponse, KillRequest, StartRequest,
    StateRequest, StateResponse, Status, WaitRequest,
};
use containerd_shim_protos::shim_async::TaskClient;
use kata_api::control::{DestroyRequest, EvidenceRequest, InspectRequest};
use kata_api::control_ttrpc::ControlClient;
use kata_config::{Artefacts, Config};
use kata_hypervisor::fake::FakeVm;
use kata_hypervisor::{Accelerator, Choice, DriverKind};
use kata_sandbox::{SandboxSpec, State};
use protobuf::Message;
use tokio::task::JoinHandle;
use ttrpc::Code;
use ttrpc::asynchronous::{Client, Server};

use crate::ground::Ground;
use crate::life::LifeError;
use crate::owner::Pod;
use agent::FakeAgent;

const CONFIG_JSON: &str = r#"{
    "ociVersion": "1.1.0",
    "process": { "cwd": "/", "user": { "uid": 0, "gid": 0 }, "args": ["true"], "env": ["PATH=/bin"] },
    "root": { "path": "rootfs" },
    "linux": { "namespaces": [ { "type": "mount" }, { "type": "pid" }, { "type": "ipc" } ] }
}"#;

/// A pod under test, and everything that it stands on.
struct Live {
    dir: tempfile::TempDir,
    ground: Ground,
    agent: FakeAgent,
    life: JoinHandle<Result<(), LifeError>>,
    _agent_server: Server,
    _server: Server,
}

#[derive(Default)]
struct Setting {
    rm: bool,
    client: Option<i32>,
    boot_fails: bool,
}

/// Whether pods can be made here; says why not.
fn able() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        kata_testkit::skip("sharing files with a pod needs root");
    }
    root
}

impl Live {
    async fn new(setting: Setting) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ground = Ground { run_dir: dir.path().join("run/p"), state_dir: dir.path().join("state/p") };
        let listener = ground.claim("p").unwrap();
        let agent = FakeAgent::new();
        let (agent_server, socket) = agent.serve(dir.path()).await;
        let mut vm = FakeVm::new().forward(kata_api::ports::AGENT, socket);
        if setting.boot_fails {
            vm = vm.boot_fails("it is broken");
        }
        let pod = Pod { ground: ground.clone(), rm: setting.rm, client: setting.client };
        let (life, server) = pod.serve(spec(dir.path(), &ground), Box::new(vm), listener).await.unwrap();
        let life = tokio::spawn(life.run());
        Self { dir, ground, agent, life, _agent_server: agent_server, _server: server }
    }

    async fn client(&self) -> Client {
        Client::connect(&format!("unix://{}", self.ground.socket().display())).await.unwrap()
    }

    async fn task(&self) -> TaskClient {
        TaskClient::new(self.client().await)
    }

    async fn control(&self) -> ControlClient {
        ControlClient::new(self.client().await)
    }

    /// A bundle on disk, as a request to create it.
    fn create_request(&self) -> CreateTaskRequest {
        let bundle = self.dir.path().join("bundle");
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        std::fs::write(bundle.join("config.json"), CONFIG_JSON).unwrap();
        CreateTaskRequest {
            id: "p".into(),
            bundle: bundle.display().to_string(),
            ..CreateTaskRequest::default()
        }
    }

    async fn run_container(&self, task: &TaskClient) -> CreateTaskResponse {
        let created = task.create(bound(), &self.create_request()).await.unwrap();
        let start = StartRequest { id: "p".into(), ..StartRequest::default() };
        assert_eq!(task.start(bound(), &start).await.unwrap().pid, created.pid);
        created
    }

    /// Waits for the pod's end; how long it took is the answer.
    async fn over(self) -> (Duration, Ground, tempfile::TempDir) {
        let start = Instant::now();
        tokio::time::timeout(Duration::from_secs(20), self.life).await.unwrap().unwrap().unwrap();
        (start.elapsed(), self.ground, self.dir)
    }
}

fn spec(dir: &Path, ground: &Ground) -> SandboxSpec {
    let mut config = Config::default();
    config.hypervisor.qemu.kernel = Some("/boot/vmlinuz".into());
    config.hypervisor.qemu.initrd = Some("/boot/initrd".into());
    SandboxSpec {
        id: "p".to_owned(),
        hostname: None,
        config,
        artefacts: Artefacts {
            vmm: "/usr/bin/qemu-system-x86_64".into(),
            kata_vmm: "/usr/bin/kata-vmm".into(),
            virtiofsd: Some(daemon(dir)),
            guest_image: None,
        },
        run_dir: ground.run_dir.clone(),
        started: Instant::now(),
        choice: Choice {
            driver: DriverKind::Qemu,
            accelerator: Accelerator::Tcg,
            reason: "a test".to_owned(),
        },
        network: None,
        resources: kata_sandbox::ResourceSpec::default(),
    }
}

/// Stands in for the virtio-fs daemon, which has nothing to do without a guest.
pub(crate) fn daemon(dir: &Path) -> PathBuf {
    let path = dir.join("daemon");
    std::fs::write(&path, "#!/bin/sh\nexec /bin/sleep 600\n").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn bound() -> ttrpc::context::Context {
    ttrpc::context::with_duration(Duration::from_secs(10))
}

fn wait_request() -> WaitRequest {
    WaitRequest { id: "p".into(), ..WaitRequest::default() }
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("not a status: {other}"),
    }
}

#[tokio::test]
async fn the_end_of_the_container_is_the_end_of_the_pod() {
    if !able() {
        return;
    }
    let live = Live::new(Setting::default()).await;
    let task = live.task().await;
    assert_eq!(live.run_container(&task).await.pid, std::process::id());
    live.agent.exit(7);
    let exit = task.wait(bound(), &wait_request()).await.unwrap();
    assert_eq!(exit.exit_status, 7);
    assert!(exit.exited_at.seconds > 0);
    drop(task);
    let (took, ground, _dir) = live.over().await;
    assert!(took < Duration::from_secs(8), "the owner lingered for {took:?} though its client was told");
    let state = State::load(&ground.run_dir).unwrap();
    assert_eq!((state.state.as_str(), state.containers[0].exit_code), ("stopped", Some(7)));
    assert!(!ground.socket().exists());
}

/// As a pager does: it shows the first screen and reads on when a key is pressed.
#[tokio::test]
async fn a_client_that_stands_still_gets_all_output_later() {
    const OUTPUT: usize = 1 << 20;
    if !able() {
        return;
    }
    let live = Live::new(Setting::default()).await;
    live.agent.write(OUTPUT);
    let fifo = live.dir.path().join("stdout");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
    let reader = std::fs::File::from(rustix::fs::open(&fifo, flags, rustix::fs::Mode::empty()).unwrap());
    let task = live.task().await;
    let create = CreateTaskRequest { stdout: fifo.display().to_string(), ..live.create_request() };
    task.create(bound(), &create).await.unwrap();
    task.start(bound(), &StartRequest { id: "p".into(), ..StartRequest::default() }).await.unwrap();
    live.agent.exit(0);
    task.wait(bound(), &wait_request()).await.unwrap();
    // Longer than a teardown waits for anybody.
    tokio::time::sleep(Duration::from_secs(6)).await;
    rustix::io::ioctl_fionbio(&reader, false).unwrap();
    let read = tokio::task::spawn_blocking(move || {
        let mut all = Vec::new();
        std::io::Read::read_to_end(&mut { reader }, &mut all).unwrap();
        all.len()
    });
    assert_eq!(read.await.unwrap(), OUTPUT);
    drop(task);
    live.over().await;
}

#[tokio::test]
async fn a_client_that_comes_a_moment_late_is_still_told() {
    if !able() {
        return;
    }
    let live = Live::new(Setting::default()).await;
    let task = live.task().await;
    live.run_container(&task).await;
    drop(task);
    live.agent.exit(3);
    tokio::time::sleep(Duration::from_millis(600)).await;
    let late = live.task().await;
    assert_eq!(late.wait(bound(), &wait_request()).await.unwrap().exit_status, 3);
    let pod = live.control().await.inspect(bound(), &InspectRequest::new()).await.unwrap();
    assert_eq!((pod.state.as_str(), pod.containers[0].exit_code), ("stopped", 3));
    drop(late);
    let (took, ..) = live.over().await;
    assert!(took < Duration::from_secs(8), "{took:?}");
}

#[tokio::test]
async fn rm_leaves_nothing() {
    if !able() {
        return;
    }
    let live = Live::new(Setting { rm: true, ..Setting::default() }).await;
    std::fs::create_dir_all(live.ground.state_dir.join("upper")).unwrap();
    let task = live.task().await;
    live.run_container(&task).await;
    let kill = KillRequest { id: "p".into(), signal: 15, ..KillRequest::default() };
    task.kill(bound(), &kill).await.unwrap();
    assert_eq!(task.wait(bound(), &wait_request()).await.unwrap().exit_status, 143);
    drop(task);
    let (_, ground, _dir) = live.over().await;
    assert!(!ground.run_dir.exists() && !ground.state_dir.exists());
}

#[tokio::test]
async fn destroy_answers_when_nothing_is_left() {
    if !able() {
        return;
    }
    let live = Live::new(Setting::default()).await;
    let task = live.task().await;
    live.run_container(&task).await;
    let control = live.control().await;
    control.destroy(bound(), &DestroyRequest::new()).await.unwrap();
    assert!(!live.ground.run_dir.exists());
    control.destroy(bound(), &DestroyRequest::new()).await.unwrap();
    // The name is free from here on: what another pod makes under it is not this owner's to take.
    let next = live.ground.claim("p").unwrap();
    drop((task, control));
    let (_, ground, _dir) = live.over().await;
    assert!(ground.socket().exists());
    drop(next);
}

#[tokio::test]
async fn a_pod_whose_client_dies_before_the_first_container_is_gone() {
    if !able() {
        return;
    }
    let mut client = std::process::Command::new("/bin/sleep").arg("600").spawn().unwrap();
    let live = Live::new(Setting { client: i32::try_from(client.id()).ok(), ..Setting::default() }).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!live.life.is_finished());
    client.kill().unwrap();
    client.wait().unwrap();
    let (took, ground, _dir) = live.over().await;
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(!ground.run_dir.exists());
}

#[tokio::test]
async fn a_pod_outlives_its_client_once_a_container_runs() {
    if !able() {
        return;
    }
    let mut client = std::process::Command::new("/bin/sleep").arg("600").spawn().unwrap();
    let live = Live::new(Setting { client: i32::try_from(client.id()).ok(), ..Setting::default() }).await;
    let task = live.task().await;
    live.run_container(&task).await;
    client.kill().unwrap();
    client.wait().unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!live.life.is_finished());
    live.control().await.destroy(bound(), &DestroyRequest::new()).await.unwrap();
}

#[tokio::test]
async fn a_failed_boot_reaches_the_client_with_its_cause() {
    if !able() {
        return;
    }
    let live = Live::new(Setting { boot_fails: true, ..Setting::default() }).await;
    // The pod is over before anybody asks, and waits to be asked.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let task = live.task().await;
    let (code, message) = code(task.create(bound(), &live.create_request()).await);
    assert_eq!(code, Code::UNAVAILABLE);
    assert!(message.contains("it is broken"), "{message}");
    drop(task);
    let (took, ..) = live.over().await;
    assert!(took < Duration::from_secs(8), "{took:?}");
}

#[tokio::test]
async fn refusals_carry_the_code_of_their_kind() {
    if !able() {
        return;
    }
    let live = Live::new(Setting::default()).await;
    let task = live.task().await;
    let checkpoint = task.checkpoint(bound(), &CheckpointTaskRequest::new()).await;
    assert_eq!(code(checkpoint), (Code::UNIMPLEMENTED, "checkpoint is not supported".to_owned()));
    let state = StateRequest { id: "nobody".into(), ..StateRequest::default() };
    assert_eq!(code(task.state(bound(), &state).await).0, Code::NOT_FOUND);
    let mut create = live.create_request();
    create.bundle = "/nonexistent".into();
    let (refused, message) = code(task.create(bound(), &create).await);
    assert_eq!(refused, Code::INVALID_ARGUMENT);
    assert!(message.contains("/nonexistent/config.json"), "{message}");
    create.bundle = "relative".into();
    assert_eq!(code(task.create(bound(), &create).await).0, Code::INVALID_ARGUMENT);
    live.control().await.destroy(bound(), &DestroyRequest::new()).await.unwrap();
}

#[tokio::test]
async fn evidence_from_an_agent_that_gives_none_is_refused_by_name() {
    if !able() {
        return;
    }
    let live = Live::new(Setting::default()).await;
    let task = live.task().await;
    live.run_container(&task).await;
    let control = live.control().await;
    let (code, text) = code(control.evidence(bound(), &EvidenceRequest::new()).await);
    assert!(code == Code::UNIMPLEMENTED && text.contains("does not support GetEvidence"), "{code:?} {text}");
    control.destroy(bound(), &DestroyRequest::new()).await.unwrap();
}

#[tokio::test]
async fn the_second_version_of_the_task_service_is_the_same_service() {
    if !able() {
        return;
    }
    let live = Live::new(Setting::default()).await;
    let client = live.client().await;
    live.run_container(&TaskClient::new(client.clone())).await;
    let state = StateRequest { id: "p".into(), ..StateRequest::default() };
    let mut request = ttrpc::Request::new();
    request.service = "containerd.task.v2.Task".to_owned();
    request.method = "State".to_owned();
    request.payload = state.write_to_bytes().unwrap();
    let response = client.request(request).await.unwrap();
    let state = StateResponse::parse_from_bytes(&response.payload).unwrap();
    assert_eq!(state.status.enum_value(), Ok(Status::RUNNING));
    let connected = TaskClient::new(client.clone()).connect(bound(), &ConnectRequest::new()).await.unwrap();
    assert_eq!(connected.shim_pid, std::process::id());
    live.control().await.destroy(bound(), &DestroyRequest::new()).await.unwrap();
}
