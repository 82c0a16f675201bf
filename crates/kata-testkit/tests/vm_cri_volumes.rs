//! Volumes of CRI pods: raw block devices, and volumes within volumes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use kata_testkit::containerd::Version;
use kata_testkit::cri::{ContainerPlan, Cri, api};
use kata_testkit::host::{stderr, stdout};

/// A block device of the host until it is dropped, and the file behind it.
struct LoopDevice {
    device: String,
    file: PathBuf,
}

impl LoopDevice {
    fn new(file: PathBuf, content: &str) -> Self {
        let mut bytes = vec![0; 4 << 20];
        bytes.splice(..content.len(), content.bytes());
        std::fs::write(&file, bytes).unwrap();
        let made = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().unwrap();
        assert!(made.status.success(), "{}", stderr(&made));
        Self { device: stdout(&made).trim().to_owned(), file }
    }

    fn begins_with(&self, text: &str) -> bool {
        std::fs::read(&self.file).unwrap().starts_with(text.as_bytes())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

fn with_device<'a>(
    plan: ContainerPlan<'a>,
    disk: &LoopDevice,
    path: &str,
    permissions: &str,
) -> ContainerPlan<'a> {
    let mut device = api::Device::new();
    device.host_path.clone_from(&disk.device);
    path.clone_into(&mut device.container_path);
    permissions.clone_into(&mut device.permissions);
    plan.with(|config| config.devices.push(device))
}

#[test]
fn raw_block_volume_is_a_device_of_the_container_and_of_no_other() {
    let Some(cri) = Cri::new(Version::V2) else { return };
    let data = LoopDevice::new(cri.host().scratch("data.img"), "from the host");
    let kept = LoopDevice::new(cri.host().scratch("kept.img"), "only to be read");
    let pod = cri.pod("block").run();
    let plan = with_device(pod.container("main").idle(), &data, "/dev/data", "rwm");
    let main = with_device(plan, &kept, "/dev/kept", "r").start();
    assert_eq!(
        main.sh("head -c 13 /dev/data; echo; head -c 15 /dev/kept").text(),
        "from the host\nonly to be read"
    );
    assert_eq!(main.sh("test -b /dev/data && blockdev --getsize64 /dev/data").text(), "4194304\n");
    main.sh("printf 'from the pod.' | dd of=/dev/data conv=notrunc,fsync status=none").text();
    let refused = main.sh("echo no > /dev/kept");
    assert!(refused.code != 0 && refused.stderr.contains("not permitted"), "{refused:?}");
    let other = pod.container("other").idle().start();
    assert_eq!(other.sh("ls /dev/data").code, 1, "another container has no such device");
    pod.remove();
    assert!(data.begins_with("from the pod.") && kept.begins_with("only to be read"));
}

#[test]
fn disk_that_the_host_loses_is_an_error_of_that_disk_and_the_pod_lives() {
    let Some(cri) = Cri::new(Version::V2) else { return };
    let data = LoopDevice::new(cri.host().scratch("data.img"), "there");
    let pod = cri.pod("loses").run();
    let main = with_device(pod.container("main").idle(), &data, "/dev/data", "rwm").start();
    assert_eq!(main.sh("head -c 5 /dev/data").text(), "there");
    std::fs::File::options().write(true).open(&data.file).unwrap().set_len(0).unwrap();
    let lost = main.sh("dd if=/dev/data bs=512 skip=6144 count=1 of=/dev/null");
    assert!(lost.code != 0 && lost.stderr.contains("Input/output error"), "{lost:?}");
    assert_eq!(main.sh("echo lives").text(), "lives\n");
    pod.remove();
}

/// kubelet's directory of a volume, with one key where it has a text.
fn volume(cri: &Cri, plugin: &str, name: &str, text: Option<&str>) -> PathBuf {
    let path = cri.host().scratch("pods/4711/volumes").join(plugin).join(name);
    std::fs::create_dir_all(path.join("..1")).unwrap();
    symlink("..1", path.join("..data")).unwrap();
    if let Some(text) = text {
        std::fs::write(path.join("..1/key"), text).unwrap();
        symlink("..data/key", path.join("key")).unwrap();
    }
    path
}

#[test]
fn volumes_may_be_within_volumes_empty_or_one_file_of_another() {
    let Some(cri) = Cri::new(Version::V2) else { return };
    let base = cri.host().scratch("pods/4711/volumes/kubernetes.io~empty-dir/base");
    std::fs::create_dir_all(&base).unwrap();
    let config = volume(&cri, "kubernetes.io~configmap", "config", Some("a setting"));
    let secret = volume(&cri, "kubernetes.io~secret", "secret", Some("a secret"));
    let empty = volume(&cri, "kubernetes.io~configmap", "empty", None);
    let all = volume(&cri, "kubernetes.io~projected", "all", Some("a token"));
    // What kubelet makes of a subPath: the file itself, under its own name for it.
    let one: &Path = &secret.join("..1/key");
    let pod = cri.pod("nested").run();
    let main = pod
        .container("main")
        .mount(&base, "/app")
        .mount_read_only(&config, "/app/config")
        .mount_read_only(&secret, "/app/config-secret")
        .mount_read_only(&empty, "/app/empty")
        .mount_read_only(&all, "/app/all")
        .mount_read_only(one, "/app/one")
        .idle()
        .start();
    let read = "cat /app/config/key /app/config-secret/key /app/all/key /app/one; ls /app/empty";
    assert_eq!(main.sh(read).text(), "a settinga secreta tokena secret");
    assert_ne!(main.sh("echo no > /app/config/key").code, 0, "a config map is not written to");
    main.sh("echo kept > /app/file").text();
    pod.remove();
    // Until kubelet removes it, an emptyDir is the host's.
    assert_eq!(std::fs::read_to_string(base.join("file")).unwrap(), "kept\n");
}
