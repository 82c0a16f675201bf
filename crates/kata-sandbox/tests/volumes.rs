//! Volumes as Kubernetes makes them, each on its way into the guest.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod rig;

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kata_api::agent::{CreateContainerRequest, Storage};
use kata_config::direct_volume::{Entry, MountInfo};
use kata_config::{EmptyDirMode, SharedFs};
use kata_sandbox::{ContainerSpec, ErrorKind, ProcessId, RootfsMount, Sandbox, Stdio};
use oci_spec::runtime::Mount;
use rig::{Rig, soon};
use rustix::mount::{MountFlags, UnmountFlags};

/// kubelet's directory of a volume, made.
fn volume(rig: &Rig, plugin: &str, name: &str) -> PathBuf {
    let path = rig.dir.path().join("pods/4711/volumes").join(plugin).join(name);
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// A file system mounted on the host until it is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(path: &Path, options: &str) -> Self {
        let data = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::empty(), data.as_c_str()).unwrap();
        Self(path.to_owned())
    }

    fn bind(source: &Path, path: &Path) -> Self {
        std::fs::create_dir_all(path).unwrap();
        rustix::mount::mount_bind(source, path).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

fn container(rig: &Rig, name: &str, binds: &[(&Path, &str)]) -> ContainerSpec {
    let mut container = rig.container(name, &["sleep"], Stdio::default());
    for (number, (source, mode)) in binds.iter().enumerate() {
        let mut mount = Mount::default();
        mount.set_destination(format!("/v{number}").into()).set_typ(Some("bind".to_owned()));
        mount.set_source(Some((*source).to_owned()));
        mount.set_options(Some(vec!["rbind".to_owned(), (*mode).to_owned()]));
        container.spec.mounts_mut().get_or_insert_default().push(mount);
    }
    container
}

/// The same with its root on a disk.
fn on_disk(rig: &Rig, name: &str, binds: &[(&Path, &str)]) -> ContainerSpec {
    let image = rig.dir.path().join("root.img");
    std::fs::write(&image, [0; 4096]).unwrap();
    let mut container = container(rig, name, binds);
    container.spec.root_mut().as_mut().unwrap().set_readonly(Some(false));
    let source = image.display().to_string();
    container.rootfs = vec![RootfsMount { fs_type: "ext4".to_owned(), source, ..Default::default() }];
    container
}

/// What is mounted at `/vN`.
fn source(request: &CreateContainerRequest, number: usize) -> &str {
    let destination = format!("/v{number}");
    &request.oci.mounts.iter().find(|mount| mount.destination == destination).unwrap().source
}

fn point(storage: &Storage) -> (&str, &str) {
    (&storage.driver, &storage.mount_point)
}

async fn remove(pod: &Sandbox, name: &str) {
    let id = ProcessId::init(name);
    pod.kill(&id, 9, false).await.unwrap();
    soon(pod.wait(&id)).await.unwrap();
    pod.delete(&id).await.unwrap();
}

async fn until(what: &str, mut probe: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !probe() {
        assert!(begin.elapsed() < Duration::from_secs(10), "waited for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Publishes a version of a volume as kubelet does.
fn publish(volume: &Path, version: &str, text: &str) {
    let directory = volume.join(version);
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("key"), text).unwrap();
    let old = std::fs::read_link(volume.join("..data"));
    symlink(version, volume.join("..data_tmp")).unwrap();
    std::fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    match old {
        Ok(old) => std::fs::remove_dir_all(volume.join(old)).unwrap(),
        Err(_) => symlink("..data/key", volume.join("key")).unwrap(),
    }
}

const COPY: &str = "/run/kata-containers/c/volumes/0";

async fn config_volume_follows(rig: Rig, make: fn(&Rig, &str, &[(&Path, &str)]) -> ContainerSpec) {
    let config = volume(&rig, "kubernetes.io~configmap", "config");
    publish(&config, "..1", "one");
    std::fs::set_permissions(config.join("..1/key"), PermissionsExt::from_mode(0o440)).unwrap();
    std::os::unix::fs::chown(config.join("..1/key"), Some(7), Some(8)).unwrap();
    let pod = rig.pod().await;
    pod.create_container(make(&rig, "c", &[(&config, "ro")])).await.unwrap();
    assert_eq!(source(&rig.agent.created()[0], 0), COPY);
    let copied = rig.agent.copied();
    let paths: Vec<&str> = copied.iter().map(|copy| copy.path.strip_prefix(COPY).unwrap()).collect();
    assert_eq!(paths, ["", "/..1", "/..1/key", "/..data", "/key"]);
    let file = &copied[2];
    assert_eq!(
        (file.data.as_slice(), file.file_mode & 0o7777, file.uid, file.gid),
        (&b"one"[..], 0o440, 7, 8)
    );

    publish(&config, "..2", "two");
    let link = |target: &'static [u8]| {
        move |copies: Vec<kata_api::agent::CopyFileRequest>| {
            copies.iter().any(|copy| copy.path.ends_with("/..data") && copy.data == target)
        }
    };
    until("the new version", || link(b"..2")(rig.agent.copied())).await;
    until("the old one to go", || rig.agent.removed().contains(&format!("{COPY}/..1"))).await;
    let copied = rig.agent.copied();
    let at = |end: &str| copied.iter().rposition(|copy| copy.path.ends_with(end)).unwrap();
    assert!(at("/..2/key") < at("/..data"), "no name leads to a file that is not there");
    assert_eq!(copied[at("/..2/key")].data, b"two");

    remove(&pod, "c").await;
    assert_eq!(rig.agent.removed().last().unwrap(), "/run/kata-containers/c/volumes");
    let seen = rig.agent.copied().len();
    publish(&config, "..3", "three");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(rig.agent.copied().len(), seen, "nobody follows for a container that is gone");
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn config_volume_is_copied_and_follows_the_host() {
    let Some(rig) = Rig::new().await else { return };
    config_volume_follows(rig, container).await;
}

#[tokio::test]
async fn config_volume_follows_the_host_without_a_share_too() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.config.hypervisor.qemu.shared_fs = SharedFs::None;
    config_volume_follows(rig.daemon("exit 1"), on_disk).await;
}

#[tokio::test]
async fn config_volume_that_is_large_or_writable_is_shared() {
    let Some(rig) = Rig::new().await else { return };
    let (large, written) =
        (volume(&rig, "kubernetes.io~secret", "large"), volume(&rig, "kubernetes.io~projected", "written"));
    std::fs::write(large.join("key"), vec![0; (1 << 20) + 1]).unwrap();
    let pod = rig.pod().await;
    pod.create_container(container(&rig, "c", &[(&large, "ro"), (&written, "rw")])).await.unwrap();
    assert!(rig.agent.copied().is_empty());
    let request = rig.agent.created().remove(0);
    for number in 0..2 {
        let expected = format!("/run/kata-containers/shared/containers/.volumes/{number}");
        assert_eq!(source(&request, number), expected);
    }
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn empty_dir_in_memory_is_the_guests_for_as_long_as_the_pod() {
    let Some(rig) = Rig::new().await else { return };
    let cache = volume(&rig, "kubernetes.io~empty-dir", "cache");
    let tmpfs = Mounted::new(&cache, "size=8m,mode=2770,gid=42");
    std::fs::create_dir(cache.join("part")).unwrap();
    let part = rig.dir.path().join("pods/4711/volume-subpaths/cache/c/0");
    let part_mount = Mounted::bind(&cache.join("part"), &part);
    let pod = rig.pod().await;
    pod.create_container(container(&rig, "a", &[(&cache, "rw")])).await.unwrap();
    pod.create_container(container(&rig, "b", &[(&part, "rw"), (&cache, "ro")])).await.unwrap();

    let [first, second] = rig.agent.created().try_into().unwrap();
    let memory = &first.storages[0];
    let guest = "/run/kata-containers/sandbox/ephemeral/cache";
    assert_eq!(point(memory), ("ephemeral", guest));
    assert!(memory.shared, "it outlives its containers");
    assert_eq!(memory.options, ["mode=2770", "uid=0", "gid=42", "size=8388608"]);
    assert_eq!(source(&first, 0), guest);
    // A part of it is a part of the guest's.
    assert_eq!(second.storages[0], *memory);
    assert_eq!(point(&second.storages[1]), ("local", "/run/kata-containers/sandbox/ephemeral/cache/part"));
    assert_eq!((source(&second, 0), source(&second, 1)), (&*format!("{guest}/part"), guest));
    assert!(!rig.run_dir().join("shared/.volumes").exists());
    pod.shutdown().await.unwrap();
    drop((part_mount, tmpfs));
    rig.assert_clean().await;
}

#[tokio::test]
async fn empty_dir_on_disk_is_one_for_its_containers() {
    let Some(rig) = Rig::new().await else { return };
    let dir = volume(&rig, "kubernetes.io~empty-dir", "dir");
    let pod = rig.pod().await;
    pod.create_container(container(&rig, "a", &[(&dir, "rw")])).await.unwrap();
    pod.create_container(container(&rig, "b", &[(&dir, "ro")])).await.unwrap();
    let created = rig.agent.created();
    assert_eq!(source(&created[0], 0), source(&created[1], 0));
    remove(&pod, "a").await;
    std::fs::write(rig.run_dir().join("shared/.volumes/0/file"), "").unwrap();
    assert!(dir.join("file").exists());
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn empty_dir_without_a_share_is_a_directory_of_the_guest() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.config.hypervisor.qemu.shared_fs = SharedFs::None;
    let rig = rig.daemon("exit 1");
    let dir = volume(&rig, "kubernetes.io~empty-dir", "dir");
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o2777)).unwrap();
    std::os::unix::fs::chown(&dir, None, Some(42)).unwrap();
    let pod = rig.pod().await;
    pod.create_container(on_disk(&rig, "c", &[(&dir, "rw")])).await.unwrap();
    let request = rig.agent.created().remove(0);
    let local = request.storages.iter().find(|storage| storage.driver == "local").unwrap();
    assert_eq!(local.mount_point, "/run/kata-containers/sandbox/ephemeral/dir");
    assert_eq!(local.options, ["mode=2777", "fsgid=42"]);
    assert!(local.shared);
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn empty_dir_may_be_a_disk_of_its_own() {
    let Some(mut rig) = Rig::new().await else { return };
    if std::process::Command::new("mkfs.ext4").arg("-V").output().is_err() {
        return kata_testkit::skip("mkfs.ext4 cannot be run");
    }
    rig.config.runtime.emptydir_mode = EmptyDirMode::BlockPlain;
    let dir = volume(&rig, "kubernetes.io~empty-dir", "dir");
    let small = Mounted::new(dir.parent().unwrap(), "size=64m");
    std::fs::create_dir_all(&dir).unwrap();
    let pod = rig.pod().await;
    for name in ["a", "b"] {
        pod.create_container(container(&rig, name, &[(&dir, "rw")])).await.unwrap();
    }
    let disks = rig.vm.disks();
    assert_eq!((disks.len(), &disks[0].path), (1, &dir.join("disk.img")));
    let image = std::fs::metadata(dir.join("disk.img")).unwrap();
    assert!(image.len() == 64 << 20 && image.blocks() * 512 < 4 << 20, "{image:?}");
    let request = rig.agent.created().remove(1);
    assert_eq!(point(&request.storages[0]), ("blk", "/run/kata-containers/sandbox/disks/dir"));
    assert_eq!(point(&request.storages[1]), ("local", "/run/kata-containers/sandbox/disks/dir/files"));
    assert_eq!(source(&request, 0), "/run/kata-containers/sandbox/disks/dir/files");
    remove(&pod, "a").await;
    remove(&pod, "b").await;
    assert_eq!(rig.vm.disks().len(), 1, "it outlives its containers");
    pod.shutdown().await.unwrap();
    assert!(!dir.join("disk.img").exists());
    drop(small);
    rig.assert_clean().await;
}

#[tokio::test]
async fn direct_volume_is_a_disk_of_the_machine_while_somebody_uses_it() {
    let Some(rig) = Rig::new().await else { return };
    let (path, device) = (rig.dir.path().join("csi"), rig.dir.path().join("device"));
    std::fs::write(&device, [0; 4096]).unwrap();
    let entry = Entry::of(&path).unwrap();
    let info = MountInfo {
        volume_type: "directvol".to_owned(),
        device: device.clone(),
        fs_type: "ext4".to_owned(),
        options: vec!["noatime".to_owned()],
        ..Default::default()
    };
    entry.write(&info).unwrap();
    let pod = rig.pod().await;
    // The path itself need not be there.
    for name in ["a", "b"] {
        pod.create_container(container(&rig, name, &[(&path, "rw")])).await.unwrap();
    }
    assert_eq!(rig.vm.disks().iter().map(|disk| &disk.path).collect::<Vec<_>>(), [&device]);
    let created = rig.agent.created();
    let storage = &created[0].storages[0];
    assert_eq!((storage.driver.as_str(), storage.fstype.as_str()), ("blk", "ext4"));
    assert_eq!(source(&created[1], 0), storage.mount_point);
    assert_eq!(entry.sandbox().unwrap().unwrap(), "pod");
    remove(&pod, "a").await;
    assert_eq!(rig.vm.disks().len(), 1);
    remove(&pod, "b").await;
    assert_eq!(rig.vm.disks(), []);
    entry.remove().unwrap();

    let info = MountInfo { volume_type: "spdkvol".to_owned(), ..info };
    entry.write(&info).unwrap();
    let error = pod.create_container(container(&rig, "c", &[(&path, "rw")])).await.unwrap_err();
    entry.remove().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.chain().contains("spdkvol"), "{}", error.chain());
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

/// Another pod beside the test's, as its owner leaves it to be read.
fn beside(rig: &Rig, name: &str, state: &str) {
    let run_dir = rig.run_dir().with_file_name(name);
    std::fs::create_dir_all(&run_dir).unwrap();
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let start = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap();
    let text = format!(
        r#"{{"version": 1, "id": "{name}", "state": "{state}", "owner_pid": {}, "owner_start_time": {start},
        "created_at_ms": 0, "hypervisor": "qemu", "accelerator": "tcg", "choice": "", "guest_kernel": "",
        "agent_version": "", "containers": [], "timeline": [], "fault": null}}"#,
        std::process::id()
    );
    std::fs::write(run_dir.join("state.json"), text).unwrap();
}

#[tokio::test]
async fn direct_volume_of_a_pod_that_lives_is_refused_and_a_dead_ones_taken_over() {
    let Some(rig) = Rig::new().await else { return };
    let (path, device) = (rig.dir.path().join("csi"), rig.dir.path().join("device"));
    std::fs::write(&device, [0; 4096]).unwrap();
    let entry = Entry::of(&path).unwrap();
    let (volume_type, fs_type) = ("directvol".to_owned(), "ext4".to_owned());
    entry.write(&MountInfo { volume_type, device, fs_type, ..Default::default() }).unwrap();
    let pod = rig.pod().await;
    beside(&rig, "other", "ready");
    entry.claim("other", false, |_| true).unwrap();
    let taken = pod.create_container(container(&rig, "a", &[(&path, "rw")])).await.unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::FailedPrecondition);
    assert!(taken.chain().contains("pod other uses it"), "{}", taken.chain());
    assert_eq!((entry.sandbox().unwrap().unwrap(), rig.vm.disks().len()), ("other".into(), 0));

    beside(&rig, "other", "stopped");
    for name in ["a", "b"] {
        pod.create_container(container(&rig, name, &[(&path, "rw")])).await.unwrap();
    }
    assert_eq!(entry.sandbox().unwrap().unwrap(), "pod");
    remove(&pod, "a").await;
    assert_eq!(entry.sandbox().unwrap().unwrap(), "pod", "the other container uses it still");
    remove(&pod, "b").await;
    assert_eq!(entry.sandbox().unwrap(), None);
    entry.remove().unwrap();
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn disk_of_one_machine_is_no_other_machines_until_it_is_given_back() {
    let (Some(rig), Some(other)) = (Rig::new().await, Rig::new().await) else { return };
    let Some(device) = Loop::new(&rig) else { return };
    let (file, path, raw) =
        (rig.dir.path().join("disk"), rig.dir.path().join("csi"), rig.dir.path().join("other"));
    std::fs::write(&file, [0; 4096]).unwrap();
    let entries = [(&path, &file), (&raw, &device.0)].map(|(path, device)| {
        let entry = Entry::of(path).unwrap();
        let (device, fs_type) = (device.clone(), "ext4".to_owned());
        entry
            .write(&MountInfo { volume_type: "block".to_owned(), device, fs_type, ..Default::default() })
            .unwrap();
        entry
    });
    let (pod, next) = (rig.pod().await, other.pod().await);
    for path in [&path, &raw] {
        pod.create_container(container(&rig, "a", &[(path, "rw")])).await.unwrap();
        let busy = next.create_container(container(&other, "a", &[(path, "rw")])).await.unwrap_err();
        assert_eq!(busy.kind(), ErrorKind::FailedPrecondition);
        assert!(busy.chain().contains("in use on the host"), "{}", busy.chain());
        assert_eq!(other.vm.disks(), []);
        remove(&pod, "a").await;
        next.create_container(container(&other, "a", &[(path, "rw")])).await.unwrap();
        remove(&next, "a").await;
    }
    entries.iter().for_each(|entry| entry.remove().unwrap());
    pod.shutdown().await.unwrap();
    next.shutdown().await.unwrap();
}

/// Runs a test again, alone, with a directory of programs before those of the host.
fn with_programs(test: &str, programs: &[(&str, &str)]) -> bool {
    if std::env::var_os("KATA_TEST_ALONE").is_some() {
        return true;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in programs {
        std::fs::write(dir.path().join(name), text).unwrap();
        std::fs::set_permissions(dir.path().join(name), PermissionsExt::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let run = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("KATA_TEST_ALONE", "1")
        .env("PATH", path)
        .status();
    assert!(run.unwrap().success());
    false
}

#[tokio::test]
async fn disk_that_takes_long_to_make_holds_up_nobody_else_and_is_given_up_with_its_container() {
    let slow = [("mkfs.ext4", "#!/bin/sh\nexec sleep 100\n")];
    if !with_programs(
        "disk_that_takes_long_to_make_holds_up_nobody_else_and_is_given_up_with_its_container",
        &slow,
    ) {
        return;
    }
    let Some(mut rig) = Rig::new().await else { return };
    let Some(device) = Loop::new(&rig) else { return };
    rig.config.runtime.emptydir_mode = EmptyDirMode::BlockPlain;
    let dir = volume(&rig, "kubernetes.io~empty-dir", "dir");
    let image = dir.join("disk.img");
    let pod = rig.pod().await;
    let creation = |name: &str| {
        let (pod, container) = (pod.clone(), container(&rig, name, &[(&dir, "rw")]));
        tokio::spawn(async move { pod.create_container(container).await })
    };
    let first = creation("first");
    until("its image", || image.exists()).await;
    let second = creation("second");
    soon(pod.create_container(with_device(&rig, "other", &device.0, "rwm"))).await.unwrap();
    soon(remove(&pod, "other")).await;
    // One that waits for the other's disk does not wait for its own end.
    for (name, creation) in [("second", second), ("first", first)] {
        pod.kill(&ProcessId::init(name), 9, false).await.unwrap();
        let ended = soon(creation).await.unwrap().unwrap_err();
        assert!(ended.chain().contains("was killed while it was being created"), "{}", ended.chain());
    }
    assert!(!image.exists());
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

/// A device of this machine, for as long as it is kept.
struct Loop(PathBuf);

impl Loop {
    fn new(rig: &Rig) -> Option<Self> {
        let image = rig.dir.path().join("raw");
        std::fs::write(&image, [0; 4096]).unwrap();
        let made = std::process::Command::new("losetup").args(["--find", "--show"]).arg(image).output();
        let name = made.map(|made| String::from_utf8(made.stdout).unwrap().trim().to_owned());
        let name = name.unwrap_or_default();
        if name.is_empty() {
            kata_testkit::skip("this machine has no loop devices");
        }
        (!name.is_empty()).then(|| Self(name.into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A container that asks for a device of the host as `/dev/raw`.
fn with_device(rig: &Rig, name: &str, device: &Path, access: &str) -> ContainerSpec {
    let numbers = std::fs::metadata(device).unwrap().rdev();
    let (major, minor) = (rustix::fs::major(numbers), rustix::fs::minor(numbers));
    let mut container = container(rig, name, &[]);
    let mut spec = serde_json::to_value(&container.spec).unwrap();
    spec["linux"]["devices"] =
        serde_json::json!([{"type": "b", "major": major, "minor": minor, "path": "/dev/raw"}]);
    let rule =
        serde_json::json!({"type": "b", "major": major, "minor": minor, "allow": true, "access": access});
    spec["linux"]["resources"] = serde_json::json!({"devices": [rule]});
    container.spec = serde_json::from_value(spec).unwrap();
    container
}

#[tokio::test]
async fn raw_block_volume_is_plugged_in_and_the_agent_is_told_where() {
    let Some(rig) = Rig::new().await else { return };
    let Some(device) = Loop::new(&rig) else { return };
    let asking = |name: &str, access: &str| with_device(&rig, name, &device.0, access);
    let pod = rig.pod().await;
    pod.create_container(asking("a", "rm")).await.unwrap();
    let disks = rig.vm.disks();
    assert_eq!((disks.len(), &disks[0].path, disks[0].readonly), (1, &device.0, true));
    let told = rig.agent.created().remove(0).devices.remove(0);
    assert_eq!((&*told.type_, &*told.id, &*told.container_path), ("blk", "10/01", "/dev/raw"));
    let error = pod.create_container(asking("b", "rwm")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    remove(&pod, "a").await;
    pod.create_container(asking("b", "rwm")).await.unwrap();
    assert!(!rig.vm.disks()[0].readonly);
    remove(&pod, "b").await;
    assert_eq!(rig.vm.disks(), []);
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}
