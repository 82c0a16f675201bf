//! An owner under a containerd that only takes events, with a fake machine and a fake agent behind it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, Empty, ExecProcessRequest, ForwardRequest, KillRequest,
    ShutdownRequest, StartRequest, StateRequest, Status, WaitRequest,
};
use containerd_shim_protos::shim_async::{Events, TaskClient, create_events};
use kata_api::control::DestroyRequest;
use kata_api::control_ttrpc::ControlClient;
use kata_api::runtime_options::Options;
use kata_config::{Artefacts, Config};
use kata_hypervisor::fake::FakeVm;
use kata_hypervisor::{Accelerator, Choice, DriverKind, Vm, VmExit};
use kata_testkit::fake_agent::FakeAgent;
use kata_testkit::netns::Netns;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use tokio::task::JoinHandle;
use ttrpc::Code;
use ttrpc::r#async::TtrpcContext;
use ttrpc::asynchronous::{Client, Server};

use super::launch::Prepare;
use super::serve::Owner;
use crate::cli::ServeArgs;
use crate::ground::Ground;
use crate::life::LifeError;
use crate::plan::{Plan, PlanError};
use crate::trace::Level;

const CONFIG_JSON: &str = r#"{
    "ociVersion": "1.1.0",
    "process": { "cwd": "/", "user": { "uid": 0, "gid": 0 }, "args": ["sleep"], "env": ["PATH=/bin"] },
    "root": { "path": "rootfs" },
    "linux": { "namespaces": [ { "type": "mount" }, { "type": "pid" }, { "type": "ipc" }, { "type": "network" } ] }
}"#;

/// containerd's ear: topics and the containers they are about, as they come.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<String>>>);

#[async_trait]
impl Events for Heard {
    async fn forward(&self, _: &TtrpcContext, req: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = req.envelope.unwrap();
        assert_eq!(envelope.namespace, "ns");
        assert!(envelope.event.type_url.starts_with("containerd.events.Task"));
        self.0.lock().unwrap().push(envelope.topic);
        Ok(Empty::new())
    }
}

struct Live {
    dir: tempfile::TempDir,
    ground: Ground,
    vm: FakeVm,
    heard: Heard,
    life: JoinHandle<Result<(), LifeError>>,
    _servers: [Server; 2],
    /// Where the owner is: what is in there becomes the pod's network.
    _netns: Netns,
}

impl Live {
    async fn new() -> Option<Self> {
        Self::with(|vm| vm).await
    }

    /// With a machine that `change` makes. `None` where it cannot be tested.
    async fn with(change: impl FnOnce(FakeVm) -> FakeVm) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            kata_testkit::skip("sharing files with a pod needs root");
            return None;
        }
        let netns = Netns::enter()?;
        let dir = tempfile::tempdir().unwrap();
        let ground = Ground { run_dir: dir.path().join("run/p"), state_dir: dir.path().join("state/p") };
        let listener = ground.claim("p").unwrap();
        let heard = Heard::default();
        let events = dir.path().join("containerd.sock.ttrpc");
        let mut ear = Server::new()
            .bind(&format!("unix://{}", events.display()))
            .unwrap()
            .register_service(create_events(Arc::new(heard.clone())));
        ear.start().await.unwrap();
        let args = ServeArgs {
            id: "p".into(),
            namespace: "ns".into(),
            events: events.display().to_string(),
            bundle: dir.path().join("bundle"),
            netns: None,
            sandboxer: false,
            config: None,
            debug: false,
        };
        let agent = FakeAgent::start().await;
        let vm = FakeVm::new().on_connect({
            let agent = agent.clone();
            move |incoming| agent.accept(incoming.port, incoming.peer_port, incoming.stream)
        });
        let vm = change(vm);
        let prepare = prepare(crate::tests::daemon(dir.path()), vm.clone());
        let owner = Owner {
            args: &args,
            ground: ground.clone(),
            started: Instant::now(),
            level: Level::fixed(),
            runtime_netns: None,
            prepare,
        };
        let (life, server) = owner.serve(listener).await.unwrap();
        let life = tokio::spawn(life.run());
        Some(Self { dir, ground, vm, heard, life, _servers: [ear, server], _netns: netns })
    }

    async fn client(&self) -> Client {
        Client::connect(&format!("unix://{}", self.ground.socket().display())).await.unwrap()
    }

    async fn task(&self) -> TaskClient {
        TaskClient::new(self.client().await)
    }

    fn create_request(&self, id: &str) -> CreateTaskRequest {
        let bundle = self.dir.path().join("bundle").join(id);
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        std::fs::write(bundle.join("config.json"), CONFIG_JSON).unwrap();
        CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            ..CreateTaskRequest::default()
        }
    }

    /// Creates and starts a container.
    async fn run(&self, task: &TaskClient, id: &str) {
        task.create(bound(), &self.create_request(id)).await.unwrap();
        task.start(bound(), &StartRequest { id: id.into(), ..StartRequest::default() }).await.unwrap();
    }

    async fn topics(&self, count: usize) -> Vec<String> {
        let begin = Instant::now();
        while self.heard.0.lock().unwrap().len() < count && begin.elapsed() < Duration::from_secs(5) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.heard.0.lock().unwrap().clone()
    }

    async fn over(self) -> (Ground, Vec<String>) {
        tokio::time::timeout(Duration::from_secs(20), self.life).await.unwrap().unwrap().unwrap();
        let heard = self.heard.0.lock().unwrap().clone();
        (self.ground, heard)
    }
}

fn prepare(daemon: PathBuf, vm: FakeVm) -> Prepare {
    Box::new(move |sources| {
        let mut config = Config::load(sources).map_err(PlanError::Config)?;
        config.hypervisor.qemu.kernel = Some("/boot/vmlinuz".into());
        config.hypervisor.qemu.initrd = Some("/boot/initrd".into());
        let artefacts = Artefacts {
            vmm: "/usr/bin/qemu-system-x86_64".into(),
            kata_vmm: "/usr/bin/kata-vmm".into(),
            virtiofsd: Some(daemon.clone()),
            guest_image: None,
        };
        let (driver, accelerator) = (DriverKind::Qemu, Accelerator::Tcg);
        let choice = Choice { driver, accelerator, reason: "a test".to_owned() };
        Ok((Plan { config, artefacts, choice }, Box::new(vm.clone()) as Box<dyn Vm>))
    })
}

fn bound() -> ttrpc::context::Context {
    ttrpc::context::with_duration(Duration::from_secs(10))
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("not a status: {other}"),
    }
}

fn delete(id: &str, exec: &str) -> DeleteRequest {
    DeleteRequest { id: id.into(), exec_id: exec.into(), ..DeleteRequest::default() }
}

#[tokio::test]
async fn containerd_hears_of_everything_in_its_order() {
    let Some(live) = Live::new().await else { return };
    let task = live.task().await;
    live.run(&task, "p").await;
    let process = r#"{"cwd":"/","user":{"uid":0,"gid":0},"args":["exit","0"]}"#;
    let exec = ExecProcessRequest {
        id: "p".into(),
        exec_id: "e".into(),
        spec: Some(Any { value: process.into(), ..Any::default() }).into(),
        ..ExecProcessRequest::default()
    };
    task.exec(bound(), &exec).await.unwrap();
    let start = StartRequest { id: "p".into(), exec_id: "e".into(), ..StartRequest::default() };
    task.start(bound(), &start).await.unwrap();
    let wait = WaitRequest { id: "p".into(), exec_id: "e".into(), ..WaitRequest::default() };
    task.wait(bound(), &wait).await.unwrap();
    task.delete(bound(), &delete("p", "e")).await.unwrap();
    let kill = KillRequest { id: "p".into(), signal: 9, ..KillRequest::default() };
    task.kill(bound(), &kill).await.unwrap();
    task.wait(bound(), &WaitRequest { id: "p".into(), ..WaitRequest::default() }).await.unwrap();
    task.delete(bound(), &delete("p", "")).await.unwrap();
    task.shutdown(bound(), &ShutdownRequest::new()).await.unwrap();
    assert!(!live.ground.run_dir.exists(), "whoever was answered finds nothing left");
    drop(task);
    let (_, topics) = live.over().await;
    let expected = ["create", "start", "exec-added", "exec-started", "exit", "exit", "delete"];
    assert_eq!(topics, expected.map(|topic| format!("/tasks/{topic}")));
}

#[tokio::test]
async fn the_machine_goes_with_the_first_container_and_the_owner_stays_to_be_asked() {
    let Some(live) = Live::new().await else { return };
    let task = live.task().await;
    live.run(&task, "p").await;
    live.run(&task, "second").await;
    let kill = KillRequest { id: "p".into(), signal: 15, ..KillRequest::default() };
    task.kill(bound(), &kill).await.unwrap();
    let wait = |id: &str| WaitRequest { id: id.into(), ..WaitRequest::default() };
    assert_eq!(task.wait(bound(), &wait("p")).await.unwrap().exit_status, 143);
    assert_eq!(task.wait(bound(), &wait("second")).await.unwrap().exit_status, 137);
    tokio::time::timeout(Duration::from_secs(5), live.vm.exited()).await.unwrap();
    let state = StateRequest { id: "second".into(), ..StateRequest::default() };
    let state = task.state(bound(), &state).await.unwrap();
    assert_eq!(state.status.enum_value(), Ok(Status::STOPPED));
    // The pod still has containers, so this is no end.
    task.shutdown(bound(), &ShutdownRequest::new()).await.unwrap();
    for id in ["second", "p"] {
        task.delete(bound(), &delete(id, "")).await.unwrap();
    }
    task.shutdown(bound(), &ShutdownRequest::new()).await.unwrap();
    drop(task);
    let (ground, _) = live.over().await;
    assert!(!ground.run_dir.exists());
}

#[tokio::test]
async fn death_of_the_machine_ends_every_process_for_containerd() {
    let Some(live) = Live::new().await else { return };
    let task = live.task().await;
    live.run(&task, "p").await;
    live.vm.end(VmExit::Signal(9));
    assert_eq!(live.topics(3).await, ["/tasks/create", "/tasks/start", "/tasks/exit"]);
    let (refused, message) = code(task.create(bound(), &live.create_request("q")).await);
    assert_eq!(refused, Code::UNAVAILABLE);
    assert!(message.contains("the VMM was killed by signal 9"), "{message}");
    let deleted = task.delete(bound(), &delete("p", "")).await.unwrap();
    assert_eq!(deleted.exit_status, 255);
    task.shutdown(bound(), &ShutdownRequest::new()).await.unwrap();
    drop(task);
    live.over().await;
}

#[tokio::test]
async fn of_two_creations_of_one_name_one_is_told_and_a_failed_one_has_no_exit() {
    let Some(live) = Live::new().await else { return };
    let task = live.task().await;
    let request = live.create_request("p");
    let (one, other) = tokio::join!(task.create(bound(), &request), task.create(bound(), &request));
    let refused = if one.is_ok() { other } else { one };
    assert_eq!(code(refused).0, Code::ALREADY_EXISTS);
    assert_eq!(live.topics(1).await, ["/tasks/create"]);
    task.delete(bound(), &delete("p", "")).await.unwrap();
    task.shutdown(bound(), &ShutdownRequest::new()).await.unwrap();
    drop(task);
    assert_eq!(live.over().await.1, ["/tasks/create", "/tasks/exit", "/tasks/delete"]);

    let Some(live) = Live::with(|vm| vm.boot_fails("it is broken")).await else { return };
    let task = live.task().await;
    let (_, message) = code(task.create(bound(), &live.create_request("p")).await);
    assert!(message.contains("it is broken"), "{message}");
    let now = ShutdownRequest { now: true, ..ShutdownRequest::default() };
    task.shutdown(bound(), &now).await.unwrap();
    drop(task);
    assert_eq!(live.over().await.1, [""; 0]);
}

#[tokio::test]
async fn without_a_container_there_is_nothing_to_ask_and_an_end_on_request() {
    let Some(live) = Live::new().await else { return };
    let task = live.task().await;
    let state = StateRequest { id: "p".into(), ..StateRequest::default() };
    assert_eq!(code(task.state(bound(), &state).await).0, Code::NOT_FOUND);
    assert_eq!(code(task.delete(bound(), &delete("p", "")).await).0, Code::NOT_FOUND);
    task.shutdown(bound(), &ShutdownRequest::new()).await.unwrap();
    drop(task);
    let (ground, topics) = live.over().await;
    assert!(!ground.run_dir.exists() && topics.is_empty());
}

#[tokio::test]
async fn a_configuration_that_cannot_be_used_is_told_to_the_creator() {
    let Some(live) = Live::new().await else { return };
    let task = live.task().await;
    let file = live.dir.path().join("bad.toml");
    std::fs::write(&file, "[runtime]\nlog_levle = \"info\"\n").unwrap();
    let options = Options { config_path: file.display().to_string(), ..Options::default() };
    let any = Any {
        type_url: "runtimeoptions.v1.Options".to_owned(),
        value: options.write_to_bytes().unwrap(),
        ..Any::default()
    };
    let create = CreateTaskRequest { options: Some(any).into(), ..live.create_request("p") };
    let (refused, message) = code(task.create(bound(), &create).await);
    assert_eq!(refused, Code::INVALID_ARGUMENT);
    assert!(message.contains("bad.toml") && message.contains("log_level"), "{message}");
    // The next may have better ones.
    live.run(&task, "p").await;
    let control = ControlClient::new(live.client().await);
    control.destroy(bound(), &DestroyRequest::new()).await.unwrap();
    assert!(!live.ground.run_dir.exists());
    drop((task, control));
    let (_, topics) = live.over().await;
    assert_eq!(topics, ["/tasks/create", "/tasks/start", "/tasks/exit"]);
}
