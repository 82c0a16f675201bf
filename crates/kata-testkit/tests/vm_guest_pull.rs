//! Images that the guest pulls by itself, in machines of the services image, from a registry on the host's side of the network.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Output;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kata_testkit::containerd::{Containerd, Version};
use kata_testkit::cosign::Key;
use kata_testkit::host::{refused, stderr, stdout};
use kata_testkit::registry::{ALIAS, PASSWORD, REGISTRY, Registry, USER};
use kata_testkit::{guest_services, initdata};

const IMAGE: &str = "library/busybox:latest";

/// A new world whose pods are of the services image and pull their images; `None` (said and counted) where something is missing.
fn rig() -> Option<Containerd> {
    let image = guest_services::image()?;
    let config = format!(
        "[hypervisor.qemu]\nimage = \"{}\"\ndefault_memory = 1024\nenable_annotations = [\"cc_init_data\"]\n\
         [runtime]\nexperimental = [\"force_guest_pull\"]\n\
         [agent.kata]\ncreate_container_timeout = 600\nenable_debug = true\n",
        image.display()
    );
    let containerd = Containerd::configured(Version::V2, "", &["unshare", "--net"])?;
    containerd.host().configure(&config);
    containerd.has_machines().then_some(containerd)
}

/// A pod whose owner has bound `files` to it, and in it how its service is to treat the test's registry.
struct Pod<'a> {
    rig: &'a Containerd,
    network: String,
    initdata: String,
}

impl<'a> Pod<'a> {
    fn new(rig: &'a Containerd, registry: &Registry, config: &str, files: &[(&str, &str)]) -> Self {
        let tables = [REGISTRY, ALIAS].map(|name| format!("[registries.\"{name}\"]\ninsecure = true\n"));
        let text = format!("log_level = \"debug\"\n{config}\n{}", tables.concat());
        let files = [&[("image-pull.toml", text.as_str())], files].concat();
        let initdata = initdata::annotation(rig.host(), &files);
        Self { rig, network: registry.network(), initdata }
    }

    /// The pod's own container, which has no image and pauses.
    #[track_caller]
    fn start(&self) {
        let kind = "io.kubernetes.cri.container-type=sandbox";
        let options = [&["--annotation", kind, "--annotation", &self.initdata], &self.of_pod()[..]].concat();
        self.rig.detached(&options, "pod", "echo this is never run");
    }

    /// `ctr run` of a shell script in a container of the pod, whose image the guest is to pull by `name`.
    fn sh(&self, name: &str, id: &str, script: &str) -> Output {
        let kind = "io.kubernetes.cri.container-type=container";
        let image = image_name(name);
        let options = [&["--annotation", kind, "--annotation", &image], &self.of_pod()[..]].concat();
        self.rig.sh(&options, id, script)
    }

    fn of_pod(&self) -> [&str; 4] {
        ["--with-ns", &self.network, "--annotation", "io.kubernetes.cri.sandbox-id=pod"]
    }
}

fn image_name(name: &str) -> String {
    format!("io.kubernetes.cri.image-name={name}")
}

/// What is in an image, and nowhere else on the host but in the registry.
const MARKER: &str = "bytes-of-an-image-that-are-shared-of-nobody\n";

/// Files of the test's world, what is mounted in it included, that have this in them.
fn files_with(rig: &Containerd, text: &str) -> Vec<String> {
    let world = rig.host().run_dir();
    let mut grep = std::process::Command::new("grep");
    grep.args(["--recursive", "--files-with-matches", "--text", "--fixed-strings", "--devices=skip", text]);
    let output = grep.arg(world.parent().unwrap()).output().unwrap();
    stdout(&output).lines().map(str::to_owned).collect()
}

/// A rule that has all images pulled.
const ANYTHING: &str = "[signatures]\ndefault = \"accept\"\n";

#[test]
fn an_image_that_the_guest_pulls_runs_and_no_byte_of_it_is_shared() {
    let Some(rig) = rig() else { return };
    let Some(registry) = Registry::open(&rig) else { return };
    registry.push(&rig, IMAGE);
    // Only the registry has it, and containerd has another image by that name.
    let tag = registry.add_file(&rig, "library/busybox", "latest", "marker", MARKER);
    // A container without a pod of Kubernetes's, whose machine it starts itself.
    let Pod { network, initdata, .. } = Pod::new(&rig, &registry, ANYTHING, &[]);
    let name = image_name(&format!("{REGISTRY}/library/busybox:{tag}"));
    let options = ["--with-ns", &network, "--annotation", &initdata, "--annotation", &name];
    rig.detached(&options, "pulled", "exec sleep 1000");
    let look =
        "grep ' / ' /proc/mounts; tail -c 10 /marker; cp /marker /copy; echo written > /file; cat /file";
    let output = rig.exec("pulled", "look", look);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}{}", stderr(&output));
    assert!(text.contains("overlay") && text.ends_with("of-nobody\nwritten\n"), "{text}");
    let found = files_with(&rig, MARKER.trim_end());
    let elsewhere: Vec<_> = found.iter().filter(|file| !file.contains("/scratch/registry/")).collect();
    assert!(elsewhere.is_empty(), "the image is on the host: {elsewhere:?}");
    assert!(!found.is_empty(), "the registry has it, so it would be found");
    rig.remove("pulled");
    // The pod's directory of shared files has had no root in it.
    assert!(!rig.log().contains("its root is attached"), "{}", rig.log());
    assert!(rig.log().contains("the guest pulls its root"), "{}", rig.log());
}

#[test]
fn a_container_whose_image_is_not_there_or_has_no_name_says_so_and_the_pod_pauses_on() {
    let Some(rig) = rig() else { return };
    let Some(registry) = Registry::open(&rig) else { return };
    let pod = Pod::new(&rig, &registry, ANYTHING, &[]);
    pod.start();
    let absent = pod.sh(&format!("{REGISTRY}/library/absent:1"), "absent", "true");
    refused(&absent, &["image-pull has refused (NOT_FOUND)", "library/absent:1"]);
    refused(&pod.sh("", "nameless", "true"), &["io.kubernetes.cri.image-name"]);
    assert_eq!(rig.status("pod").as_deref(), Some("RUNNING"));
    rig.remove("pod");
}

#[test]
fn a_registry_with_a_password_serves_who_has_it_and_no_log_has_it() {
    let Some(rig) = rig() else { return };
    let Some(registry) = Registry::with_password(&rig) else { return };
    registry.push(&rig, IMAGE);
    let auth = STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let file = format!(r#"{{"auths": {{"{REGISTRY}": {{"auth": "{auth}"}}}}}}"#);
    let config = format!("auth_file = \"/run/measured-cfg/auth.json\"\n{ANYTHING}");
    let pod = Pod::new(&rig, &registry, &config, &[("auth.json", &file)]);
    pod.start();
    let known = pod.sh(&format!("{REGISTRY}/{IMAGE}"), "known", "echo out");
    assert_eq!(stdout(&known), "out\n", "{}", stderr(&known));
    // By a name that the file has nothing for, it is the same registry.
    let unknown = pod.sh(&format!("{ALIAS}/{IMAGE}"), "unknown", "true");
    refused(&unknown, &["image-pull has refused (UNAUTHENTICATED)", ALIAS]);
    let console = rig.host().output(["console", "pod"]);
    assert!(console.status.success(), "{}", stderr(&console));
    let told = [rig.log(), stdout(&console), stderr(&known), stderr(&unknown)].concat();
    assert!(told.contains("the guest pulls its root"), "there is a log: {told}");
    for secret in [PASSWORD, &auth] {
        assert!(!told.contains(secret), "{secret} in: {told}");
    }
    rig.remove("pod");
}

#[test]
fn where_the_rules_want_a_signature_only_what_the_key_has_signed_runs() {
    let Some(rig) = rig() else { return };
    let Some(registry) = Registry::open(&rig) else { return };
    let (Some(ours), Some(theirs)) =
        (Key::new(&rig.host().scratch("ours")), Key::new(&rig.host().scratch("theirs")))
    else {
        return;
    };
    let signed = registry.push(&rig, "team/signed:1");
    ours.sign(&rig, &registry, "team/signed", &signed);
    let forged = registry.push(&rig, "team/forged:1");
    theirs.sign(&rig, &registry, "team/forged", &forged);
    registry.push(&rig, "team/unsigned:1");
    registry.push(&rig, "others/image:1");
    let rules = format!(
        "[signatures]\ndefault = \"reject\"\n\
         [[signatures.rule]]\nscope = \"{REGISTRY}/team\"\npolicy = \"cosign\"\nkeys = [\"/run/measured-cfg/team.pub\"]\n"
    );
    let pod = Pod::new(&rig, &registry, &rules, &[("team.pub", &ours.public())]);
    pod.start();
    let sh = |image: &str, id: &str| pod.sh(&format!("{REGISTRY}/{image}"), id, "echo out");
    let output = sh("team/signed:1", "signed");
    assert_eq!(stdout(&output), "out\n", "{}", stderr(&output));
    let denied = "image-pull has refused (PERMISSION_DENIED)";
    refused(&sh("team/unsigned:1", "unsigned"), &[denied, "has no signature"]);
    refused(&sh("team/forged:1", "forged"), &[denied, "by none of the keys"]);
    refused(&sh("others/image:1", "others"), &[denied]);
    rig.remove("pod");
}

/// A pod as its owner writes it, whose one container is of `image`.
fn manifest(image: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{ name: pod }}\nspec:\n  containers:\n    - name: web\n      image: {image:?}\n      \
         command: [sh, -c, {SERVE:?}]\n      livenessProbe: {{ exec: {{ command: [sh, -c, {PROBE:?}] }} }}\n"
    )
}

/// What the container of [`manifest`] runs, and its probe.
const SERVE: &str = "echo out; exec sleep 1000";
const PROBE: &str = "echo alive";

/// What `kata-ctl` makes of a manifest.
#[track_caller]
fn generated(rig: &Containerd, manifest: &str) -> String {
    let file = rig.host().scratch("pod.yaml");
    std::fs::write(&file, manifest).unwrap();
    let output = rig.host().output(["policy", "generate", file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output)
}

#[test]
fn under_the_policy_of_its_manifest_a_pod_runs_with_its_probe_and_nothing_else_does() {
    let Some(rig) = rig() else { return };
    let Some(registry) = Registry::open(&rig) else { return };
    let digest = registry.push(&rig, IMAGE);
    // The same bytes by another name: the policy is about what is asked for, before anything is pulled.
    registry.push(&rig, "library/evil:1");
    let image = format!("{REGISTRY}/library/busybox@{digest}");
    let policy = generated(&rig, &manifest(&image));
    let pod = Pod::new(&rig, &registry, ANYTHING, &[("policy.rego", &policy)]);
    pod.start();
    let create = "rule agent_policy.CreateContainerRequest";
    refused(&pod.sh(&format!("{REGISTRY}/library/evil:1"), "evil", SERVE), &[create]);
    refused(&pod.sh(&image, "other", "echo other"), &[create]);
    let kind = "io.kubernetes.cri.container-type=container";
    let name = image_name(&image);
    let options = [&["--annotation", kind, "--annotation", &name], &pod.of_pod()[..]].concat();
    rig.detached(&options, "web", SERVE);
    assert_eq!(rig.status("web").as_deref(), Some("RUNNING"));
    let probe = rig.exec("web", "probe", PROBE);
    assert_eq!(stdout(&probe), "alive\n", "{}", stderr(&probe));
    let exec = "rule agent_policy.ExecProcessRequest";
    refused(&rig.exec("web", "shell", "echo shell"), &[exec]);
    let elsewhere = rig.in_container(&["--cwd", "/tmp"], "web", "elsewhere", PROBE);
    refused(&rig.output(elsewhere), &[exec]);
    // In the pod's own container, too, which has no probes.
    refused(&rig.exec("pod", "pods", PROBE), &[exec]);
    rig.remove("web");
    rig.remove("pod");
}
