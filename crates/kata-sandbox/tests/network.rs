//! A pod's network namespace and its hooks, with a fake machine.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod rig;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use kata_hypervisor::fake::FakeVm;
use kata_hypervisor::process::Record;
use kata_hypervisor::{
    Capabilities, Device, HypervisorError, Nic, Origin, PciPath, ProcessInfo, Vm, VmExit, VmSpec,
};
use kata_sandbox::{ErrorKind, Event, NetworkSpec, Sandbox, SandboxError, Stdio};
use kata_testkit::netns::Netns;
use oci_spec::runtime::{Hook, HookBuilder, HooksBuilder};
use rig::{Rig, init, soon};
use ttrpc::Code;

/// A rig in a pod's network namespace, which is empty yet.
struct Pod {
    netns: Netns,
    rig: Rig,
}

impl Pod {
    async fn new() -> Option<Self> {
        let netns = Netns::enter()?;
        let mut rig = Rig::new().await?;
        let bundle = rig.bundle("c");
        rig.network = Some(NetworkSpec { hooks: Vec::new(), bundle, runtime_netns: None });
        Some(Self { netns, rig })
    }

    /// An interface as a network plugin makes it.
    fn add_interface(&self) {
        self.interface("eth0", 1);
        self.netns.run("ip addr add 10.1.0.2/24 dev eth0");
        self.netns.run("ip route add default via 10.1.0.1");
        self.netns.run("ip neigh add 10.1.0.7 lladdr 02:00:00:00:00:07 dev eth0 nud permanent");
    }

    /// A link that is up, with a hardware address of this last byte.
    fn interface(&self, name: &str, number: u8) {
        let outside = self.netns.outside();
        let address = format!("02:00:00:00:00:0{number}");
        self.netns.run(&format!(
            "ip link add {name} address {address} type veth peer name out-{name} netns {outside}"
        ));
        self.netns.run_outside(&format!("ip link set out-{name} up"));
        self.netns.run(&format!("ip link set {name} up"));
    }

    /// What the agent knows of an interface: its addresses, as far as it is known at all.
    fn addresses(&self, name: &str) -> Option<Vec<String>> {
        let known = self.rig.agent.network().interfaces;
        let interface = known.iter().rev().find(|interface| interface.name == name)?;
        Some(interface.ip_addresses.iter().map(|ip| format!("{}/{}", ip.address, ip.mask)).collect())
    }

    /// Destinations and gateways that the agent knows.
    fn routes(&self) -> Vec<String> {
        let route =
            |route: &kata_api::types::Route| format!("{} {} {}", route.dest, route.gateway, route.device);
        self.rig.agent.network().routes.iter().map(route).collect()
    }

    /// A hook that is a shell script, and leaves its input beside itself.
    fn hook(&self, name: &str, script: &str) -> Hook {
        let path = self.rig.dir.path().join(name);
        let path_text = path.display();
        std::fs::write(&path, format!("#!/bin/sh\ncat > {path_text}.state\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        HookBuilder::default().path(path).build().unwrap()
    }

    fn network_hook(&mut self, hook: Hook) {
        self.rig.network.as_mut().unwrap().hooks.push(hook);
    }

    fn log(&self) -> PathBuf {
        self.rig.dir.path().join("log")
    }

    /// The calls that concern the network and the container.
    fn calls(&self) -> Vec<String> {
        let own = |call: &String| {
            ["Sandbox", "Interface", "Routes", "Neighbors", "CreateC", "StartC"]
                .iter()
                .any(|part| call.contains(part))
        };
        self.rig.agent.calls().into_iter().filter(own).collect()
    }

    async fn create(&self, pod: &Sandbox) -> Result<(), SandboxError> {
        pod.create_container(self.rig.container("c", &["sleep"], Stdio::default())).await
    }

    fn assert_clean(&self) {
        assert_eq!(self.netns.run("ip link show type tun"), "");
        assert!(!self.netns.run("tc qdisc show").contains("ingress"));
    }
}

/// The fake machine, with a slot for interfaces.
struct Slotted {
    vm: FakeVm,
    /// What was plugged in; `None` where the machine takes nothing.
    nics: Option<Arc<Mutex<Vec<Nic>>>>,
}

#[async_trait]
impl Vm for Slotted {
    fn capabilities(&self) -> Capabilities {
        Capabilities { hotplug_network: self.nics.is_some(), ..self.vm.capabilities() }
    }

    async fn boot(&self, spec: VmSpec, record: &Record) -> Result<Origin, HypervisorError> {
        self.vm.boot(spec, record).await
    }

    async fn exited(&self) -> VmExit {
        self.vm.exited().await
    }

    async fn pause(&self) -> Result<(), HypervisorError> {
        self.vm.pause().await
    }

    async fn resume(&self) -> Result<(), HypervisorError> {
        self.vm.resume().await
    }

    async fn add_device(&self, device: Device) -> Result<PciPath, HypervisorError> {
        let nic = match device {
            Device::Nic(nic) => nic,
            other => return self.vm.add_device(other).await,
        };
        let (operation, driver) = ("add a network interface", "fake".to_owned());
        let nics = self.nics.as_ref().ok_or(HypervisorError::Unsupported { operation, driver })?;
        nics.lock().unwrap().push(nic);
        Ok(PciPath("02/00".to_owned()))
    }

    async fn remove_device(&self, id: &str) -> Result<(), HypervisorError> {
        let mut nics = self.nics.as_ref().map(|nics| nics.lock().unwrap());
        let at = nics.as_ref().and_then(|nics| nics.iter().position(|nic| nic.id == id));
        match (&mut nics, at) {
            (Some(nics), Some(at)) => drop(nics.remove(at)),
            _ => return Err(HypervisorError::UnknownDevice { id: id.to_owned() }),
        }
        Ok(())
    }

    async fn resize(&self, size: kata_hypervisor::Size) -> Result<kata_hypervisor::Layout, HypervisorError> {
        self.vm.resize(size).await
    }

    async fn stop(&self) -> Result<(), HypervisorError> {
        self.vm.stop().await
    }

    fn console_tail(&self) -> String {
        self.vm.console_tail()
    }

    fn processes(&self) -> Vec<ProcessInfo> {
        self.vm.processes()
    }
}

#[tokio::test]
async fn interface_of_the_namespace_is_the_guests_before_its_first_container() {
    let Some(world) = Pod::new().await else { return };
    world.add_interface();
    let pod = world.rig.pod().await;
    let mac = world.rig.vm.with_spec(|spec| spec.nics.iter().map(|nic| nic.mac).collect::<Vec<_>>());
    assert_eq!(mac.unwrap(), [[2, 0, 0, 0, 0, 1]]);
    world.create(&pod).await.unwrap();
    pod.start(&init()).await.unwrap();
    assert_eq!(
        world.calls(),
        [
            "CreateSandbox",
            "UpdateInterface",
            "UpdateRoutes",
            "AddARPNeighbors",
            "CreateContainer",
            "StartContainer"
        ]
    );
    let network = world.rig.agent.network();
    assert_eq!(network.interfaces[0].ip_addresses[0].address, "10.1.0.2");
    assert_eq!(network.routes[0].gateway, "10.1.0.1");
    assert_eq!(network.neighbours[0].lladdr, "02:00:00:00:00:07");
    let stages = pod.inspect().await.timeline;
    assert_eq!(stages.iter().filter(|stage| stage.name == "network").count(), 2, "{stages:?}");
    soon(pod.shutdown()).await.unwrap();
    world.assert_clean();
    world.rig.assert_clean().await;
}

#[tokio::test]
async fn interfaces_of_a_copied_machine_are_plugged_in_before_the_agent_is_told() {
    let Some(mut world) = Pod::new().await else { return };
    world.add_interface();
    let factory = &mut world.rig.config.hypervisor.qemu.factory;
    factory.enable_template = true;
    factory.template_path = world.rig.dir.path().join("template");
    let making =
        kata_sandbox::template::make(world.rig.spec(), Box::new(world.rig.guest()), std::future::pending());
    let (made, ()) = soon(async { tokio::join!(making, world.rig.announce()) }).await;
    made.unwrap();
    assert_eq!(world.rig.vm.with_spec(|spec| spec.nics.len()), Some(0));
    world.rig.vm = FakeVm::new();
    let pod = world.rig.launch().await.unwrap();
    soon(pod.ready()).await.unwrap();
    assert_eq!(pod.inspect().await.started_from_template(), Some(true));
    assert_eq!(world.rig.vm.with_spec(|spec| spec.nics.len()), Some(0));
    // Devices are named for their links' numbers, which the kernel chooses.
    let mac = (1..100).find_map(|link| world.rig.vm.with_nic(&format!("net{link}"), |nic| nic.mac));
    assert_eq!(mac, Some([2, 0, 0, 0, 0, 1]));
    assert_eq!(world.calls(), ["CreateSandbox", "UpdateInterface", "UpdateRoutes", "AddARPNeighbors"]);
    let known = world.rig.agent.network().interfaces;
    assert!(!known[0].device_path.is_empty(), "{known:?}");
    soon(pod.shutdown()).await.unwrap();
    world.assert_clean();
    world.rig.assert_clean().await;
}

#[tokio::test]
async fn namespace_without_interfaces_costs_no_call() {
    let Some(world) = Pod::new().await else { return };
    let pod = world.rig.pod().await;
    world.create(&pod).await.unwrap();
    pod.start(&init()).await.unwrap();
    assert_eq!(world.calls(), ["CreateSandbox", "CreateContainer", "StartContainer"]);
    soon(pod.shutdown()).await.unwrap();
}

#[tokio::test]
async fn interface_that_comes_after_the_create_is_plugged_in_at_the_start() {
    let Some(world) = Pod::new().await else { return };
    let nics = Arc::new(Mutex::new(Vec::new()));
    let vm = Slotted { vm: world.rig.guest(), nics: Some(nics.clone()) };
    let pod = Sandbox::launch(world.rig.spec(), Box::new(vm)).await.unwrap();
    world.rig.announce().await;
    world.create(&pod).await.unwrap();
    world.add_interface();
    pod.start(&init()).await.unwrap();
    assert_eq!(nics.lock().unwrap()[0].mac, [2, 0, 0, 0, 0, 1]);
    assert_eq!(world.rig.agent.network().interfaces[0].device_path, "02/00");
    assert_eq!(world.addresses("eth0").unwrap(), ["10.1.0.2/24"]);
    assert_eq!(world.routes(), [" 10.1.0.1 eth0"]);
    // All of it, before the container runs.
    assert_eq!(world.calls().last().unwrap(), "StartContainer");
    soon(pod.shutdown()).await.unwrap();
    world.assert_clean();
}

/// A pod that runs a container, whose machine takes interfaces.
async fn running(world: &Pod) -> (Sandbox, Arc<Mutex<Vec<Nic>>>) {
    let nics = Arc::new(Mutex::new(Vec::new()));
    let vm = Slotted { vm: world.rig.guest(), nics: Some(nics.clone()) };
    let pod = Sandbox::launch(world.rig.spec(), Box::new(vm)).await.unwrap();
    world.rig.announce().await;
    world.create(&pod).await.unwrap();
    pod.start(&init()).await.unwrap();
    (pod, nics)
}

/// Waits for what the kernel's word brings about.
async fn comes(what: &str, mut is_there: impl FnMut() -> bool) {
    let begin = std::time::Instant::now();
    while !is_there() {
        assert!(begin.elapsed() < std::time::Duration::from_secs(8), "{what} does not come");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn interface_of_a_running_pod_comes_changes_and_goes_by_itself() {
    let Some(world) = Pod::new().await else { return };
    world.add_interface();
    let (pod, nics) = running(&world).await;
    world.interface("eth1", 2);
    world.netns.run("ip addr add 10.2.0.2/24 dev eth1");
    world.netns.run("ip route add 10.3.0.0/16 via 10.2.0.1");
    comes("the interface", || world.addresses("eth1").is_some_and(|all| all == ["10.2.0.2/24"])).await;
    comes("its route", || world.routes() == [" 10.1.0.1 eth0", "10.3.0.0/16 10.2.0.1 eth1"]).await;
    assert_eq!(nics.lock().unwrap().iter().map(|nic| nic.mac[5]).collect::<Vec<_>>(), [2]);

    world.netns.run("ip addr add fd02::2/64 dev eth1 nodad");
    comes("its second address", || world.addresses("eth1").unwrap() == ["10.2.0.2/24", "fd02::2/64"]).await;
    world.netns.run("ip neigh add 10.2.0.7 lladdr 02:00:00:00:00:07 dev eth1 nud permanent");
    let neighbours = || world.rig.agent.network().neighbours;
    comes("its neighbour", || neighbours().iter().any(|one| one.device == "eth1")).await;

    // Another hardware address is another device.
    world.netns.run("ip link set eth1 address 02:00:00:00:00:03");
    comes("it anew", || nics.lock().unwrap().iter().map(|nic| nic.mac[5]).eq([3])).await;

    world.netns.run("ip link del eth1");
    comes("its end", || nics.lock().unwrap().is_empty()).await;
    comes("the end of its route", || world.routes() == [" 10.1.0.1 eth0"]).await;
    soon(pod.shutdown()).await.unwrap();
    world.assert_clean();
    world.rig.assert_clean().await;
}

#[tokio::test]
async fn interface_that_the_machine_cannot_give_back_is_left_bare_and_taken_up_again() {
    let Some(world) = Pod::new().await else { return };
    world.add_interface();
    let (pod, nics) = running(&world).await;
    world.netns.run("ip link del eth0");
    comes("no address", || world.addresses("eth0").unwrap().is_empty() && world.routes().is_empty()).await;
    world.add_interface();
    comes("its address again", || world.addresses("eth0").unwrap() == ["10.1.0.2/24"]).await;
    comes("its route again", || world.routes() == [" 10.1.0.1 eth0"]).await;
    assert!(nics.lock().unwrap().is_empty(), "it is the same device");
    soon(pod.shutdown()).await.unwrap();
    world.assert_clean();
}

#[tokio::test]
async fn storm_of_changes_is_a_few_looks() {
    let Some(world) = Pod::new().await else { return };
    world.add_interface();
    let (pod, _) = running(&world).await;
    let before = world.calls().len();
    let begin = std::time::Instant::now();
    for number in 0..200 {
        world.netns.run(&format!("ip addr add 10.9.{number}.2/24 dev eth0"));
    }
    comes("the last of them", || world.addresses("eth0").unwrap().len() == 201).await;
    // One look in 100 ms, with a call for the interface and one for the routes that go with its addresses.
    let looks = begin.elapsed().as_millis() / 100 + 2;
    let calls = world.calls().len() - before;
    assert!(calls as u128 <= 3 * looks, "{calls} calls in {looks} tenths of a second");
    soon(pod.shutdown()).await.unwrap();
}

#[tokio::test]
async fn machine_without_a_slot_says_what_to_do_and_the_next_start_tries_again() {
    let Some(world) = Pod::new().await else { return };
    let vm = Slotted { vm: world.rig.guest(), nics: None };
    let pod = Sandbox::launch(world.rig.spec(), Box::new(vm)).await.unwrap();
    world.rig.announce().await;
    world.create(&pod).await.unwrap();
    world.add_interface();
    for _ in 0..2 {
        let error = pod.start(&init()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unimplemented);
        assert_eq!(
            error.chain(),
            "cannot start container c: eth0 came into the pod's network namespace when the machine ran already, and this \
             machine takes no more interfaces: set hypervisor.qemu.machine_type = \"q35\", or set the network up before the \
             container is created: add a network interface is not supported by fake"
        );
        world.assert_clean();
    }
    // Without the interface it can go on.
    world.netns.run("ip link del eth0");
    pod.start(&init()).await.unwrap();
    soon(pod.shutdown()).await.unwrap();
}

#[tokio::test]
async fn interface_that_the_agent_refuses_is_told_again_at_the_next_start() {
    let Some(world) = Pod::new().await else { return };
    let nics = Arc::new(Mutex::new(Vec::new()));
    let vm = Slotted { vm: world.rig.guest(), nics: Some(nics.clone()) };
    let pod = Sandbox::launch(world.rig.spec(), Box::new(vm)).await.unwrap();
    world.rig.announce().await;
    world.create(&pod).await.unwrap();
    world.add_interface();
    world.rig.agent.refuse("UpdateInterface", Code::INTERNAL, "no such device");
    let error = pod.start(&init()).await.unwrap_err();
    assert_eq!(
        error.chain(),
        "cannot start container c: the agent cannot set up interface eth0: no such device"
    );
    world.rig.agent.relent();
    pod.start(&init()).await.unwrap();
    assert_eq!(nics.lock().unwrap().len(), 1, "it was plugged in once");
    soon(pod.shutdown()).await.unwrap();
    world.assert_clean();
}

#[tokio::test]
async fn agent_that_refuses_an_interface_fails_the_pod() {
    let Some(world) = Pod::new().await else { return };
    world.add_interface();
    world.rig.agent.refuse("UpdateRoutes", Code::INVALID_ARGUMENT, "no way to 10.1.0.1");
    let pod = world.rig.launch().await.unwrap();
    world.rig.announce().await;
    let error = soon(pod.ready()).await.unwrap_err();
    assert_eq!(
        error.chain(),
        "cannot start the pod: the pod's network cannot be set up: the agent cannot set up the routes: no way to 10.1.0.1"
    );
    soon(pod.shutdown()).await.unwrap();
    world.assert_clean();
    world.rig.assert_clean().await;
}

#[tokio::test]
async fn hook_that_makes_the_network_runs_before_anybody_looks() {
    let Some(mut world) = Pod::new().await else { return };
    let hook = world.hook("setkey", "ip link add eth0 type veth peer name host && ip link set eth0 up");
    world.network_hook(hook.clone());
    let pod = world.rig.pod().await;
    // The same hook is in the container's specification, and is not run again.
    let mut container = world.rig.container("c", &["sleep"], Stdio::default());
    container.spec.set_hooks(Some(HooksBuilder::default().create_runtime(vec![hook]).build().unwrap()));
    pod.create_container(container).await.unwrap();
    assert_eq!(world.rig.agent.network().interfaces[0].name, "eth0");
    let state = std::fs::read_to_string(world.rig.dir.path().join("setkey.state")).unwrap();
    assert!(state.contains(&format!("\"pid\":{}", std::process::id())), "{state}");
    soon(pod.shutdown()).await.unwrap();
    world.assert_clean();
}

#[tokio::test]
async fn hook_that_fails_is_quoted_and_nothing_is_left() {
    let Some(mut world) = Pod::new().await else { return };
    world.add_interface();
    let hook = world.hook("setkey", "echo 'sandbox not found' >&2; exit 1");
    let path = hook.path().display().to_string();
    world.network_hook(hook);
    let pod = world.rig.launch().await.unwrap();
    let error = soon(pod.ready()).await.unwrap_err();
    let expected = format!("cannot start the pod: the hook {path} exited with code 1: sandbox not found");
    assert_eq!(error.chain(), expected);
    let error = world.create(&pod).await.unwrap_err();
    assert_eq!(error.chain(), expected);
    soon(pod.shutdown()).await.unwrap();
    assert!(world.rig.vm.with_spec(|_| ()).is_none(), "no machine was booted");
    world.assert_clean();
    world.rig.assert_clean().await;
}

#[tokio::test]
async fn hooks_of_a_container_run_at_their_moments() {
    let Some(mut world) = Pod::new().await else { return };
    world.rig.network = None;
    let log = world.log();
    let hook = |name: &str| world.hook(name, &format!("echo {name} >> {}; exit ${{FAIL:-0}}", log.display()));
    let failing = |name: &str| {
        let mut hook = hook(name);
        hook.set_env(Some(vec!["FAIL=1".to_owned()]));
        vec![hook]
    };
    let hooks = HooksBuilder::default()
        .create_runtime(vec![hook("create")])
        .poststart(failing("poststart"))
        .poststop(failing("poststop"));
    let mut container = world.rig.container("c", &["sleep"], Stdio::default());
    container.spec.set_hooks(Some(hooks.build().unwrap()));
    let ran =
        || std::fs::read_to_string(&log).unwrap().split_whitespace().map(str::to_owned).collect::<Vec<_>>();

    let pod = world.rig.pod().await;
    let mut events = pod.events();
    pod.create_container(container.clone()).await.unwrap();
    assert_eq!(ran(), ["create"]);
    pod.start(&init()).await.unwrap();
    assert_eq!(ran(), ["create", "poststart"]);
    pod.kill(&init(), 9, false).await.unwrap();
    soon(pod.wait(&init())).await.unwrap();
    pod.delete(&init()).await.unwrap();
    assert_eq!(ran(), ["create", "poststart", "poststop"]);
    while !matches!(soon(events.recv()).await.unwrap(), Event::Deleted { .. }) {}

    // A creation that fails is a container that stops.
    let hooks = HooksBuilder::default().create_runtime(failing("again")).poststop(vec![hook("poststop")]);
    container.spec.set_hooks(Some(hooks.build().unwrap()));
    let error = pod.create_container(container).await.unwrap_err();
    let text = error.chain();
    assert!(text.starts_with("cannot create container c: the hook "), "{text}");
    assert!(text.ends_with("/again exited with code 1"), "{text}");
    assert_eq!(ran()[3..], ["again", "poststop"]);
    assert_eq!(world.rig.agent.created().len(), 1);
    soon(pod.shutdown()).await.unwrap();
    world.rig.assert_clean().await;
}
