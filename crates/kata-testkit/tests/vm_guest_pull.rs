//! Images that the guest pulls by itself, in machines of the services image, from a registry on the host's side of the network.
//!
//! ```text
//!   containerd's network namespace                     the pod's      the guest
//!   docker-registry on 10.88.0.1 (bridge kt0) ── veth ── eth0 ── tap ── eth0 10.88.0.2 ◀── kata-image-pull
//! ```
//!
//! `KATA_TEST_SERVICES` names the directory of a guest image with systemd and `kata-image-pull`.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use kata_testkit::containerd::{Containerd, IMAGE, Version};
use kata_testkit::host::{stderr, stdout};

const REGISTRY: &str = "10.88.0.1:5000";
const NAME: &str = "10.88.0.1:5000/library/busybox:latest";
/// How the guest's service is to treat the test's registry, for the image's owner to bind to it.
const PULL: &str = "[registries.\"10.88.0.1:5000\"]\ninsecure = true\n[signatures]\ndefault = \"accept\"\n";

/// A new world whose pods are of the services image and pull their images; `None` (said and counted) where something is missing.
fn rig() -> Option<Containerd> {
    let Some(image) = std::env::var_os("KATA_TEST_SERVICES").map(PathBuf::from) else {
        kata_testkit::skip("KATA_TEST_SERVICES does not name a guest image with services");
        return None;
    };
    if Command::new("docker-registry").arg("--version").output().is_err() {
        kata_testkit::skip("docker-registry is not installed");
        return None;
    }
    let config = format!(
        "[hypervisor.qemu]\nimage = \"{}\"\ndefault_memory = 1024\nenable_annotations = [\"cc_init_data\"]\n\
         [runtime]\nexperimental = [\"force_guest_pull\"]\n[agent.kata]\ncreate_container_timeout = 600\n",
        image.display()
    );
    let containerd = Containerd::configured(Version::V2, "", &["unshare", "--net"])?;
    containerd.host().configure(&config);
    containerd.has_machines().then_some(containerd)
}

#[track_caller]
fn runs(command: &mut Command, words: &str) {
    let output = command.args(words.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{words}: {}", stderr(&output));
}

/// A network for pods with a registry in it, which has the image; both end with the value.
struct World {
    netns: PathBuf,
    registry: Child,
}

impl World {
    fn new(rig: &Containerd) -> Self {
        let netns = rig.host().scratch("netns");
        File::create(&netns).unwrap();
        let path = netns.to_str().unwrap();
        runs(&mut Command::new("unshare"), &format!("--net={path} true"));
        for words in [
            "link set lo up",
            "link add kt0 type bridge",
            "addr add 10.88.0.1/24 dev kt0",
            "link set kt0 up",
            "link add kt1 type veth peer name eth0",
            "link set kt1 master kt0 up",
            &format!("link set eth0 netns {path}"),
        ] {
            runs(&mut rig.beside("ip"), words);
        }
        for words in ["link set lo up", "addr add 10.88.0.2/24 dev eth0", "link set eth0 up"] {
            runs(Command::new("nsenter").arg(format!("--net={path}")).arg("ip"), words);
        }
        Self { registry: Self::registry(rig), netns }
    }

    fn registry(rig: &Containerd) -> Child {
        let (config, data) = (rig.host().scratch("registry.yml"), rig.host().scratch("registry"));
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{REGISTRY}\"}}\n",
            data.display()
        );
        std::fs::write(&config, text).unwrap();
        let mut command = rig.beside("docker-registry");
        let serving = command.arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::null());
        let registry = serving.spawn().unwrap();
        rig.host().wait_for("the registry", || rig.on_its_host(|| TcpStream::connect(REGISTRY).ok()));
        rig.ok(["images", "tag", IMAGE, NAME]);
        let push = ["images", "push", "--plain-http", NAME];
        let mut client = rig.beside(rig.client());
        let output = client.arg("--address").arg(rig.socket()).args(push).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        registry
    }

    /// `ctr run` of a shell script in a container whose image the guest is to pull by `name`.
    fn sh(&self, rig: &Containerd, name: &str, id: &str, script: &str) -> Output {
        let network = format!("network:{}", self.netns.display());
        let image = format!("io.kubernetes.cri.image-name={name}");
        let initdata = format!("io.katacontainers.config.hypervisor.cc_init_data={}", initdata());
        let options = ["--with-ns", &network, "--annotation", &image, "--annotation", &initdata];
        rig.sh(&options, id, script)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.registry.kill();
        let _ = self.registry.wait();
        let _ = rustix::mount::unmount(&self.netns, rustix::mount::UnmountFlags::DETACH);
    }
}

/// base64 of gzip of a document with the service's configuration.
fn initdata() -> String {
    let document = format!(
        "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"image-pull.toml\" = '''\n{PULL}'''\n"
    );
    let script = format!("gzip -n <<'END' | base64 -w 0\n{document}END\n");
    stdout(&Command::new("sh").arg("-c").arg(script).output().unwrap())
}

#[test]
fn an_image_that_the_guest_pulls_runs_and_no_byte_of_it_is_shared() {
    let Some(rig) = rig() else { return };
    let world = World::new(&rig);
    let output = world.sh(&rig, NAME, "pulled", "grep ' / ' /proc/mounts; echo written > /file; cat /file");
    let text = stdout(&output);
    assert!(output.status.success(), "{text}{}", stderr(&output));
    assert!(text.contains("overlay") && text.ends_with("written\n"), "{text}");
    // The pod's directory of shared files has had no root in it.
    assert!(!rig.log().contains("its root is attached"), "{}", rig.log());
    assert!(rig.log().contains("the guest pulls its root"), "{}", rig.log());
}

#[test]
fn an_image_that_the_registry_does_not_have_is_the_containers_error_in_the_services_words() {
    let Some(rig) = rig() else { return };
    let world = World::new(&rig);
    let output = world.sh(&rig, "10.88.0.1:5000/library/absent:1", "absent", "true");
    let words = stderr(&output);
    assert!(!output.status.success());
    assert!(words.contains("image-pull has refused (NOT_FOUND)"), "{words}");
}

#[test]
fn an_image_without_a_name_is_refused_before_the_guest_is_asked() {
    let Some(rig) = rig() else { return };
    let output = rig.sh(&[], "nameless", "true");
    assert!(stderr(&output).contains("io.kubernetes.cri.image-name"), "{}", stderr(&output));
}

#[test]
fn a_pods_own_container_pauses_without_an_image() {
    let Some(rig) = rig() else { return };
    let sandbox = [
        "--annotation",
        "io.kubernetes.cri.container-type=sandbox",
        "--annotation",
        "io.kubernetes.cri.sandbox-id=own",
    ];
    rig.detached(&sandbox, "own", "echo this is never run");
    assert_eq!(rig.status("own").as_deref(), Some("RUNNING"));
    rig.remove("own");
}
