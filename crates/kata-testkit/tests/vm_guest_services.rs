//! Containers that need a service of their guest: with one that an extension brings, without, and on an image that can have none.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use kata_testkit::containerd::{Containerd, Version};
use kata_testkit::guest_services::{self, Extension};
use kata_testkit::host::{Host, refused, stderr, stdout};
use kata_testkit::initdata;

/// Every emptyDir on disk is encrypted, and pods may bring initdata.
const CONFIG: &str =
    "enable_annotations = [\"cc_init_data\"]\n[runtime]\nemptydir_mode = \"block-encrypted\"\n";
/// What a container asks by for its secrets to be opened.
const UNSEAL: &str = "io.katacontainers.guest.unseal";
const IDLE: &str = "exec sleep 1000";

/// A new world whose pods boot `image`, or the lean one, with what `more` makes for it at the end of its configuration.
fn rig(image: Option<&Path>, more: impl FnOnce(&Host) -> Option<String>) -> Option<Containerd> {
    let rig = Containerd::new(Version::V2)?;
    let more = more(rig.host())?;
    let image = image.map(|image| format!("image = \"{}\"\n", image.display())).unwrap_or_default();
    rig.host().configure(&format!("[hypervisor.qemu]\n{image}{CONFIG}{more}"));
    rig.has_machines().then_some(rig)
}

/// kubelet's directory of a volume of the pod, made.
fn volume(rig: &Containerd, plugin: &str) -> PathBuf {
    let path = rig.host().scratch("pods/4711/volumes").join(plugin).join("it");
    fs::create_dir_all(&path).unwrap();
    path
}

fn bind(source: &Path, at: &str, how: &str) -> String {
    format!("type=bind,src={},dst={at},options=rbind:{how}", source.display())
}

/// What a container of Kubernetes's is marked with; the pod's first is called `pod`.
fn of_pod(id: &str) -> [&'static str; 4] {
    let kind = match id {
        "pod" => "io.kubernetes.cri.container-type=sandbox",
        _ => "io.kubernetes.cri.container-type=container",
    };
    ["--annotation", kind, "--annotation", "io.kubernetes.cri.sandbox-id=pod"]
}

/// `ctr run` of a container of the pod that has a secret in a variable, which it wants opened.
fn with_secret(rig: &Containerd, id: &str, secret: &str) -> Output {
    let (wanted, variable) = (format!("{UNSEAL}=env"), format!("TOKEN={secret}"));
    let options = [&of_pod(id)[..], &["--annotation", &wanted, "--env", &variable]].concat();
    rig.sh(&options, id, "echo $TOKEN")
}

/// The same of one that has an emptyDir.
fn with_volume(rig: &Containerd, id: &str) -> Output {
    let mount = bind(&volume(rig, "kubernetes.io~empty-dir"), "/scratch", "rw");
    rig.sh(&[&of_pod(id)[..], &["--mount", &mount]].concat(), id, "ls /scratch")
}

#[test]
fn services_of_an_extension_open_secrets_and_mount_the_encrypted_volumes_of_a_pod() {
    let Some(image) = guest_services::image() else { return };
    let Some(rig) = rig(Some(&image), |host| Some(Extension::of_fakes(host)?.table())) else { return };
    let (secret, scratch) = (volume(&rig, "kubernetes.io~secret"), volume(&rig, "kubernetes.io~empty-dir"));
    fs::write(secret.join("key"), "sealed.fake.in-a-file\n").unwrap();
    fs::write(secret.join("user"), "nobody\n").unwrap();
    let mounts = [bind(&secret, "/secret", "ro"), bind(&scratch, "/scratch", "rw")];
    let wanted = format!("{UNSEAL}=env,files=/secret");
    let mut options = of_pod("pod").to_vec();
    options.extend([
        "--annotation",
        &wanted,
        "--env",
        "TOKEN=sealed.fake.in-a-variable",
        "--env",
        "PLAIN=as it is",
    ]);
    mounts.iter().for_each(|mount| options.extend(["--mount", mount]));
    rig.detached(&options, "pod", IDLE);

    let say = |script: &str| stdout(&rig.exec("pod", "say", script));
    assert_eq!(say("echo $TOKEN; echo $PLAIN"), "in-a-variable\nas it is\n");
    assert_eq!(say("cat /secret/key; echo; cat /secret/user"), "in-a-file\nnobody\n");
    assert_eq!(fs::read_to_string(secret.join("key")).unwrap(), "sealed.fake.in-a-file\n");
    let options = say("cat /scratch/OPTIONS");
    for option in ["encryptionType=luks2", "sourceType=empty", "filesystemType=ext4", "deviceId="] {
        assert!(options.contains(option), "no `{option}` in: {options}");
    }
    // The volume is the service's, and nothing of it is in the host's directory but the disk.
    assert_eq!(say("echo kept > /scratch/file; grep -c ' /scratch tmpfs ' /proc/mounts"), "1\n");
    let names: Vec<_> = fs::read_dir(&scratch).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["disk.img"]);

    // What the service cannot open is no container, and its text is nowhere.
    let foreign = with_secret(&rig, "foreign", "sealed.of-somebody-else");
    refused(&foreign, &["TOKEN", "sealed-secrets has refused (INVALID_ARGUMENT)"]);
    let told = stderr(&foreign) + &rig.log();
    for text in ["of-somebody-else", "in-a-variable", "in-a-file"] {
        assert!(!told.contains(text), "{text} in: {told}");
    }
    rig.remove("pod");
}

#[test]
fn containers_that_need_an_absent_service_name_it_and_others_of_the_pod_run() {
    let Some(image) = guest_services::image() else { return };
    let Some(rig) = rig(Some(&image), |_| Some(String::new())) else { return };
    rig.detached(&of_pod("pod"), "pod", IDLE);
    let secret = with_secret(&rig, "secret", "sealed.fake.text");
    refused(&secret, &["opens sealed secrets", "sealed-secrets.socket", "no unit sealed-secrets.service"]);
    refused(&with_volume(&rig, "volume"), &["mounts encrypted volumes", "secure-mount.socket"]);

    rig.detached(&of_pod("side"), "side", IDLE);
    let look = |id: &str, what: &str| {
        let output = rig.exec(id, "look", what);
        assert!(output.status.success(), "{id}: {}", stderr(&output));
        stdout(&output)
    };
    let boot = "cat /proc/sys/kernel/random/boot_id";
    assert_eq!(look("pod", boot), look("side", boot), "one machine");
    let processes = "readlink /proc/self/ns/pid";
    assert_ne!(look("pod", processes), look("side", processes), "each has its own processes");
    rig.remove("side");
    rig.remove("pod");
}

#[test]
fn lean_image_says_of_each_thing_that_it_lacks_what_has_it() {
    let Some(rig) = rig(None, |_| Some(String::new())) else { return };
    // What the host knows of the image is told before there is a machine.
    let bound = initdata::annotation(rig.host(), &[("policy.rego", "package agent_policy\n")]);
    refused(&rig.sh(&["--annotation", &bound], "bound", "true"), &["no initdata", "--flavour services"]);
    rig.host().configure("[runtime]\nexperimental = [\"force_guest_pull\"]\n");
    let name = "io.kubernetes.cri.image-name=registry.test/app:1";
    let pulled = rig.sh(&["--annotation", name], "pulled", "true");
    refused(&pulled, &["no guest-pull", "force_guest_pull", "--flavour services --image-pull"]);

    // What only the guest knows is told by its agent.
    rig.host().configure(&format!("[hypervisor.qemu]\n{CONFIG}"));
    rig.detached(&of_pod("pod"), "pod", IDLE);
    let secret = with_secret(&rig, "secret", "sealed.fake.text");
    refused(&secret, &["opens sealed secrets", "this guest image has no such service", "--flavour services"]);
    let volume = with_volume(&rig, "volume");
    refused(
        &volume,
        &["mounts encrypted volumes", "this guest image has no such service", "--flavour services"],
    );
    let file = rig.host().scratch("policy.rego");
    fs::write(&file, "package agent_policy\n").unwrap();
    let policy = rig.host().output(["policy", "set", "pod", file.to_str().unwrap()]);
    refused(&policy, &["this guest's agent does not support SetPolicy"]);
    rig.remove("pod");
}
