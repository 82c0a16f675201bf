//! A host that sends requests twice, late, or in another order: over a real connection, with and without a policy before the
//! services.

use std::future::Future;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use kata_agent::cmdline::Settings;
use kata_agent::modules::Modules;
use kata_agent::rpc::guard::Guard;
use kata_agent::rpc::{Agent, services};
use kata_agent::services::Services;
use kata_api::agent as wire;
use kata_api::agent_ttrpc::AgentServiceClient;
use kata_api::oci;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use ttrpc::Code;
use ttrpc::r#async::{Client, Server};
use ttrpc::context::Context;

use crate::world::{World, with_world};

/// All that these tests ask for.
#[cfg(feature = "policy")]
const ALLOWED: [&str; 9] = [
    "CreateSandboxRequest",
    "DestroySandboxRequest",
    "CreateContainerRequest",
    "StartContainerRequest",
    "RemoveContainerRequest",
    "ExecProcessRequest",
    "SignalProcessRequest",
    "WaitProcessRequest",
    "StatsContainerRequest",
];

/// An agent with the real engine, and its host.
struct Guest {
    world: Arc<World>,
    agent: Arc<Agent>,
    client: AgentServiceClient,
    _server: Server,
    _dir: tempfile::TempDir,
}

/// Runs `test` in a guest without a policy, then in one with.
fn with_guests<F: Future<Output = ()>>(test: impl Fn(Guest) -> F) {
    if rustix::process::geteuid().is_root() {
        leave_the_machine();
    }
    let test = &test;
    with_world(|world| async move { test(Guest::boot(&world).await).await });
    #[cfg(feature = "policy")]
    with_world(|world| async move {
        let guest = Guest::boot(&world).await;
        guest.set_policy().await;
        test(guest).await;
    });
}

/// This thread, and those that it starts: the agent writes below `/run`, and could give the machine another name.
fn leave_the_machine() {
    // SAFETY: the table of files stays shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWUTS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
}

fn context() -> Context {
    ttrpc::context::with_timeout(20_000_000_000)
}

fn sh(script: &str) -> oci::Process {
    let args = ["/bin/sh", "-c", script].map(str::to_owned).into();
    oci::Process { args, env: vec!["PATH=/bin".into()], cwd: "/".into(), ..Default::default() }
}

#[track_caller]
fn code<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> Code {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        other => panic!("not a status: {other:?}"),
    }
}

impl Guest {
    async fn boot(world: &Arc<World>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (settings, reaper) = (Settings::default(), world.reaper.clone());
        let of_guest = Services::new(dir.path(), &settings, reaper.clone());
        let engine = world.engine.clone();
        let agent = Arc::new(Agent::new(engine, reaper, Arc::new(Modules::default()), of_guest, settings));
        let served = Arc::new(Guard::boot()).before(services(&agent));
        let address = format!("unix://{}", dir.path().join("agent.sock").display());
        let mut server = Server::new().bind(&address).unwrap().register_service(served);
        server.start().await.unwrap();
        let client = AgentServiceClient::new(Client::connect(&address).await.unwrap());
        Self { world: world.clone(), agent, client, _server: server, _dir: dir }
    }

    #[cfg(feature = "policy")]
    async fn set_policy(&self) {
        let rules = ALLOWED.map(|name| format!("{name} := true\n")).concat();
        let policy = format!("package agent_policy\n{rules}");
        let request = wire::SetPolicyRequest { policy, ..Default::default() };
        self.client.set_policy(context(), &request).await.unwrap();
        let asked = self.client.stats_container(context(), &wire::StatsContainerRequest::new()).await;
        assert_eq!(code(asked), Code::NOT_FOUND);
        assert_eq!(code(self.client.set_policy(context(), &request).await), Code::PERMISSION_DENIED);
    }

    async fn create_sandbox(&self, id: &str, hostname: &str) -> ttrpc::Result<wire::Empty> {
        let (sandbox_id, hostname) = (id.to_owned(), hostname.to_owned());
        let request = wire::CreateSandboxRequest { sandbox_id, hostname, ..Default::default() };
        self.client.create_sandbox(context(), &request).await
    }

    async fn destroy_sandbox(&self) -> ttrpc::Result<wire::Empty> {
        self.client.destroy_sandbox(context(), &wire::DestroySandboxRequest::new()).await
    }

    async fn create(&self, id: &str, script: &str) -> ttrpc::Result<wire::Empty> {
        let mut request = wire::CreateContainerRequest { container_id: id.into(), ..Default::default() };
        let spec = request.oci.mut_or_insert_default();
        spec.root.mut_or_insert_default().path = self.world.root().to_str().unwrap().to_owned();
        spec.process = Some(sh(script)).into();
        let own = |kind: &str| oci::LinuxNamespace { type_: kind.into(), ..Default::default() };
        spec.linux.mut_or_insert_default().namespaces = ["pid", "ipc", "uts", "mount"].map(own).into();
        self.client.create_container(context(), &request).await
    }

    async fn start(&self, id: &str) -> ttrpc::Result<wire::Empty> {
        let request = wire::StartContainerRequest { container_id: id.into(), ..Default::default() };
        self.client.start_container(context(), &request).await
    }

    async fn remove(&self, id: &str) -> ttrpc::Result<wire::Empty> {
        let request =
            wire::RemoveContainerRequest { container_id: id.into(), timeout: 10, ..Default::default() };
        self.client.remove_container(context(), &request).await
    }

    async fn exec(&self, id: &str, exec: &str, script: &str, stdout_port: u32) -> ttrpc::Result<wire::Empty> {
        let request = wire::ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process: Some(sh(script)).into(),
            stdout_port,
            ..Default::default()
        };
        self.client.exec_process(context(), &request).await
    }

    async fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<i32> {
        let request =
            wire::WaitProcessRequest { container_id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.client.wait_process(context(), &request).await.map(|response| response.status)
    }

    async fn run(&self, id: &str) {
        self.create(id, "exec sleep 1000").await.unwrap();
        self.start(id).await.unwrap();
    }

    /// That the container of this id runs, and a process in it too.
    async fn assert_goes_on(&self, id: &str) {
        self.exec(id, "asked", "exit 7", 0).await.unwrap();
        assert_eq!(self.wait(id, "asked").await.unwrap(), 7);
    }
}

#[test]
fn container_that_is_made_twice_exists_already_and_the_first_goes_on() {
    with_guests(|guest| async move {
        let id = guest.world.id("c");
        guest.create(&id, "exec sleep 1000").await.unwrap();
        assert_eq!(code(guest.create(&id, "exit 1").await), Code::ALREADY_EXISTS);
        guest.start(&id).await.unwrap();
        assert_eq!(code(guest.create(&id, "exit 1").await), Code::ALREADY_EXISTS);
        guest.assert_goes_on(&id).await;
        guest.remove(&id).await.unwrap();
    });
}

#[test]
fn container_that_is_started_twice_runs_its_command_once() {
    with_guests(|guest| async move {
        let id = guest.world.id("c");
        let ran = guest.world.root().join("tmp/ran");
        guest.create(&id, "echo once >> /tmp/ran; exec sleep 1000").await.unwrap();
        let (first, second) = tokio::join!(guest.start(&id), guest.start(&id));
        assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
        assert_eq!(code(first.and(second)), Code::FAILED_PRECONDITION);
        assert_eq!(code(guest.start(&id).await), Code::FAILED_PRECONDITION);
        guest.assert_goes_on(&id).await;
        for _ in 0..100 {
            if ran.exists() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(std::fs::read_to_string(ran).unwrap(), "once\n");
        guest.remove(&id).await.unwrap();
    });
}

#[test]
fn container_is_not_found_before_it_is_made_and_after_it_was_removed() {
    with_guests(|guest| async move {
        let id = guest.world.id("c");
        for made in [false, true] {
            if made {
                guest.run(&id).await;
                guest.remove(&id).await.unwrap();
            }
            assert_eq!(code(guest.start(&id).await), Code::NOT_FOUND);
            assert_eq!(code(guest.exec(&id, "e", "exit 0", 0).await), Code::NOT_FOUND);
            assert_eq!(code(guest.wait(&id, "").await), Code::NOT_FOUND);
            assert_eq!(code(guest.wait(&id, "asked").await), Code::NOT_FOUND);
            let (container_id, signal) = (id.clone(), 9);
            let kill = wire::SignalProcessRequest { container_id, signal, ..Default::default() };
            assert_eq!(code(guest.client.signal_process(context(), &kill).await), Code::NOT_FOUND);
            let stats = wire::StatsContainerRequest { container_id: id.clone(), ..Default::default() };
            assert_eq!(code(guest.client.stats_container(context(), &stats).await), Code::NOT_FOUND);
            assert_eq!(code(guest.remove(&id).await), Code::NOT_FOUND);
        }
        guest.run(&id).await;
        guest.assert_goes_on(&id).await;
        guest.remove(&id).await.unwrap();
    });
}

#[test]
fn container_that_is_removed_twice_at_once_is_removed_by_one_and_the_next_of_its_id_goes_on() {
    with_guests(|guest| async move {
        let id = guest.world.id("c");
        for round in 0..5 {
            guest.run(&id).await;
            let (first, second) = tokio::join!(guest.remove(&id), guest.remove(&id));
            assert!(first.is_ok() != second.is_ok(), "round {round}: {first:?} {second:?}");
            assert_eq!(code(first.and(second)), Code::NOT_FOUND);
        }
        guest.run(&id).await;
        guest.assert_goes_on(&id).await;
        guest.remove(&id).await.unwrap();
    });
}

#[test]
fn process_whose_stream_comes_when_its_container_is_gone_is_not_started_in_the_next_of_the_same_id() {
    with_guests(|guest| async move {
        let id = guest.world.id("c");
        guest.run(&id).await;
        let host = async {
            // Long enough for the request to wait for its stream.
            tokio::time::sleep(Duration::from_millis(200)).await;
            guest.remove(&id).await.unwrap();
            guest.run(&id).await;
            let (near, far) = UnixStream::pair().unwrap();
            guest.agent.streams.offer(7, near.into());
            far
        };
        let (executed, _far) = tokio::join!(guest.exec(&id, "e", "echo > /tmp/landed", 7), host);
        assert_eq!(code(executed), Code::NOT_FOUND);
        guest.assert_goes_on(&id).await;
        assert!(!guest.world.root().join("tmp/landed").exists());
        guest.remove(&id).await.unwrap();
    });
}

#[test]
fn sandbox_that_is_made_twice_exists_already_and_keeps_its_name_and_its_containers() {
    with_guests(|guest| async move {
        let id = guest.world.id("c");
        guest.create_sandbox("pod", "first").await.unwrap();
        guest.run(&id).await;
        assert_eq!(code(guest.create_sandbox("pod", "second").await), Code::ALREADY_EXISTS);
        assert_eq!(code(guest.create_sandbox("other", "second").await), Code::ALREADY_EXISTS);
        assert_eq!(rustix::system::uname().nodename().to_bytes(), b"first");
        guest.assert_goes_on(&id).await;
        guest.destroy_sandbox().await.unwrap();
    });
}

#[test]
fn nothing_is_made_once_the_sandbox_was_destroyed() {
    with_guests(|guest| async move {
        let id = guest.world.id("c");
        guest.create_sandbox("pod", "").await.unwrap();
        guest.run(&id).await;
        let (first, second) = tokio::join!(guest.destroy_sandbox(), guest.destroy_sandbox());
        first.unwrap();
        second.unwrap();
        assert_eq!(code(guest.start(&id).await), Code::NOT_FOUND);
        assert_eq!(code(guest.create(&id, "exit 0").await), Code::FAILED_PRECONDITION);
        assert_eq!(code(guest.create_sandbox("pod", "").await), Code::FAILED_PRECONDITION);
        guest.destroy_sandbox().await.unwrap();
    });
}
