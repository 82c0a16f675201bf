//! Root file systems on disks, pods without a share, and the pod's shared memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod rig;

use std::path::{Path, PathBuf};
use std::time::Duration;

use kata_api::agent::CreateContainerRequest;
use kata_config::SharedFs;
use kata_hypervisor::fake::FakeVm;
use kata_sandbox::{ContainerSpec, ErrorKind, RootfsMount, Stdio};
use oci_spec::runtime::Mount;
use rig::{Rig, init, soon};
use ttrpc::Code;

/// A container whose root is the disk `image`, and which may write it.
fn on_disk(rig: &Rig, image: &Path, fs_type: &str, options: &[&str]) -> ContainerSpec {
    let mut container = rig.container("c", &["sleep"], Stdio::default());
    container.spec.root_mut().as_mut().unwrap().set_readonly(Some(false));
    container.rootfs = vec![RootfsMount {
        fs_type: fs_type.to_owned(),
        source: image.display().to_string(),
        target: String::new(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }];
    container
}

/// A disk without a file system: nobody but the guest looks into it.
fn blank(rig: &Rig) -> PathBuf {
    let path = rig.dir.path().join("disk.img");
    std::fs::write(&path, [0; 4096]).unwrap();
    path
}

/// A disk that the host can mount; `None` where it cannot be made.
fn ext4(rig: &Rig) -> Option<PathBuf> {
    let path = rig.dir.path().join("disk.img");
    match std::process::Command::new("mkfs.ext4").arg("-q").arg(&path).arg("4M").status() {
        Ok(status) => assert!(status.success()),
        Err(error) => {
            kata_testkit::skip(&format!("mkfs.ext4 cannot be run: {error}"));
            return None;
        }
    }
    Some(path)
}

fn bind(container: &mut ContainerSpec, source: &Path, destination: &str) {
    let mut mount = Mount::default();
    mount.set_destination(destination.into()).set_typ(Some("bind".to_owned()));
    mount.set_source(Some(source.to_owned())).set_options(Some(vec!["rbind".to_owned()]));
    container.spec.mounts_mut().get_or_insert_default().push(mount);
}

/// Driver, source and mount point of the storages.
fn storages(request: &CreateContainerRequest) -> Vec<[&str; 3]> {
    let storages = request.storages.iter();
    storages.map(|storage| [&*storage.driver, &*storage.source, &*storage.mount_point]).collect()
}

/// What is mounted last at `destination`.
fn source_of<'a>(request: &'a CreateContainerRequest, destination: &str) -> &'a str {
    let mut mounts = request.oci.mounts.iter().rev();
    &mounts.find(|mount| mount.destination == destination).unwrap().source
}

/// A pod that shares nothing.
async fn unshared() -> Option<Rig> {
    let mut rig = Rig::new().await?.daemon("exit 1");
    rig.config.hypervisor.qemu.shared_fs = SharedFs::None;
    Some(rig)
}

#[tokio::test]
async fn root_on_a_disk_is_attached_and_not_shared() {
    let Some(rig) = Rig::new().await else { return };
    let (pod, image) = (rig.pod().await, blank(&rig));
    pod.create_container(on_disk(&rig, &image, "ext4", &["loop", "rw"])).await.unwrap();

    let disks = rig.vm.disks();
    assert_eq!((disks.len(), &disks[0].path, disks[0].readonly), (1, &image, false));
    let request = rig.agent.created().remove(0);
    assert_eq!(storages(&request), [["blk", "10/01", "/run/kata-containers/c/rootfs"]]);
    assert_eq!(request.storages[0].options, ["rw"]);
    assert_eq!(request.oci.root.path, "/run/kata-containers/c/rootfs");
    assert!(!request.oci.root.readonly);
    assert!(!rig.run_dir().join("shared/c").exists());

    // The guest has it until the agent has let go of it.
    rig.agent.refuse("RemoveContainer", Code::INTERNAL, "busy");
    pod.kill(&init(), 9, false).await.unwrap();
    soon(pod.wait(&init())).await.unwrap();
    pod.delete(&init()).await.unwrap_err();
    assert_eq!(rig.vm.disks(), disks);
    rig.agent.relent();
    soon(pod.delete(&init())).await.unwrap();
    assert_eq!(rig.vm.disks(), []);
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn guest_writes_its_disks_back_before_its_machine_ends() {
    let Some(rig) = Rig::new().await else { return };
    let (pod, image) = (rig.pod().await, blank(&rig));
    pod.create_container(on_disk(&rig, &image, "ext4", &["loop"])).await.unwrap();
    pod.shutdown().await.unwrap();
    assert_eq!(rig.agent.calls().last().map(String::as_str), Some("DestroySandbox"));
    rig.assert_clean().await;
}

#[tokio::test]
async fn pod_without_disks_is_ended_without_asking_the_guest() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    pod.shutdown().await.unwrap();
    assert!(!rig.agent.calls().iter().any(|call| call == "DestroySandbox"));
    rig.assert_clean().await;
}

#[tokio::test]
async fn volumes_of_a_root_on_a_disk_are_shared() {
    let Some(rig) = Rig::new().await else { return };
    let (pod, image) = (rig.pod().await, blank(&rig));
    let mut container = on_disk(&rig, &image, "ext4", &["loop"]);
    bind(&mut container, rig.dir.path(), "/data");
    pod.create_container(container).await.unwrap();
    assert!(rig.run_dir().join("shared/.volumes/0/disk.img").exists());
    assert!(!rig.run_dir().join("shared/c/rootfs").exists());
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn readonly_image_gets_a_place_for_mount_points() {
    let Some(rig) = Rig::new().await else { return };
    let (pod, image) = (rig.pod().await, blank(&rig));
    pod.create_container(on_disk(&rig, &image, "erofs", &["ro", "loop"])).await.unwrap();
    assert!(rig.vm.disks()[0].readonly);
    let request = rig.agent.created().remove(0);
    let drivers: Vec<_> = request.storages.iter().map(|storage| &*storage.driver).collect();
    assert_eq!(drivers, ["blk", "ephemeral", "overlayfs"]);
    assert!(request.oci.root.readonly);
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn machine_that_takes_no_disks_gets_the_root_through_the_share() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.vm = FakeVm::new().without_hotplug();
    let Some(image) = ext4(&rig) else { return };
    let pod = rig.pod().await;
    pod.create_container(on_disk(&rig, &image, "ext4", &["loop"])).await.unwrap();
    assert!(rig.run_dir().join("shared/c/rootfs/lost+found").exists());
    let request = rig.agent.created().remove(0);
    assert_eq!(storages(&request), <[[&str; 3]; 0]>::default());
    assert_eq!(request.oci.root.path, "/run/kata-containers/shared/containers/c/rootfs");
    pod.delete(&init()).await.unwrap();

    pod.create_container(on_disk(&rig, &image, "ext4", &["loop", "ro"])).await.unwrap();
    let request = rig.agent.created().remove(1);
    assert_eq!(request.storages[1].options[0], "lowerdir=/run/kata-containers/shared/containers/c/rootfs");
    assert_eq!(request.oci.root.path, "/run/kata-containers/c/rootfs");
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn failed_create_gives_the_disks_back() {
    let Some(rig) = Rig::new().await else { return };
    let (pod, image) = (rig.pod().await, blank(&rig));
    rig.agent.refuse("CreateContainer", Code::INTERNAL, "no");
    pod.create_container(on_disk(&rig, &image, "ext4", &[])).await.unwrap_err();
    assert_eq!(rig.vm.disks(), []);

    let mut container = on_disk(&rig, &image, "ext4", &[]);
    bind(&mut container, Path::new("/nonexistent/volume"), "/data");
    let error = pod.create_container(container).await.unwrap_err();
    assert_eq!(
        error.chain(),
        "cannot prepare the files of container c: /nonexistent/volume does not exist on the host"
    );
    assert_eq!(rig.vm.disks(), []);
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn kill_ends_a_create_that_waits_for_the_machine() {
    let Some(rig) = Rig::new().await else { return };
    let (pod, image) = (rig.launch().await.unwrap(), blank(&rig));
    let create = tokio::spawn({
        let (pod, container) = (pod.clone(), on_disk(&rig, &image, "ext4", &[]));
        async move { pod.create_container(container).await }
    });
    while pod.kill(&init(), 9, false).await.is_err() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let error = soon(create).await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "container c was killed while it was being created");
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn pod_without_a_share_runs_from_a_disk_with_small_files_copied() {
    let Some(rig) = unshared().await else { return };
    let (pod, image) = (rig.pod().await, blank(&rig));
    let hosts = rig.dir.path().join("hosts");
    std::fs::write(&hosts, "127.0.0.1 localhost\n").unwrap();
    let mut container = on_disk(&rig, &image, "ext4", &["loop"]);
    bind(&mut container, &hosts, "/etc/hosts");
    bind(&mut container, Path::new("/dev/shm"), "/dev/shm");
    bind(&mut container, Path::new("/sys/kernel"), "/host");
    pod.create_container(container).await.unwrap();

    let copied = rig.agent.copied();
    assert_eq!(copied.len(), 1);
    assert_eq!(copied[0].path, "/run/kata-containers/c/volumes/0");
    assert_eq!((copied[0].data.as_slice(), copied[0].file_size), (&b"127.0.0.1 localhost\n"[..], 20));
    assert_eq!(copied[0].file_mode & 0o170_000, 0o100_000);
    assert_eq!(source_of(&rig.agent.created()[0], "/etc/hosts"), copied[0].path);
    assert_eq!(rig.agent.sandbox().unwrap().storages, []);
    assert_eq!(rig.mounts(), <[String; 0]>::default());
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn pod_without_a_share_refuses_what_cannot_be_copied_and_names_the_key() {
    let Some(rig) = unshared().await else { return };
    let (pod, image) = (rig.pod().await, blank(&rig));
    let (large, fifo) = (rig.dir.path().join("large"), rig.fifo("fifo"));
    std::fs::write(&large, vec![0; (1 << 20) + 1]).unwrap();
    for volume in [&large, rig.dir.path(), &fifo] {
        let mut container = on_disk(&rig, &image, "ext4", &["loop"]);
        bind(&mut container, volume, "/data");
        let error = pod.create_container(container).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unimplemented, "{error}");
        let text = error.chain();
        assert!(text.contains(volume.to_str().unwrap()), "{text}");
        assert!(text.contains("hypervisor.qemu.shared_fs"), "{text}");
    }
    let error = pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap_err();
    assert!(error.chain().contains("/c/rootfs cannot reach the guest"), "{}", error.chain());
    assert_eq!(rig.vm.disks(), []);
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn pod_is_refused_where_its_driver_cannot_share_files() {
    let Some(mut rig) = Rig::new().await else { return };
    rig.vm = FakeVm::new().without_share();
    let error = rig.launch().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unimplemented);
    assert_eq!(
        error.to_string(),
        "the pod cannot be made: qemu cannot share files of the host with the guest, as shared_fs = \"virtio-fs\" asks for; \
         set runtime.hypervisor_name to \"qemu\", \"builtin\" or \"cloud-hypervisor\""
    );
    rig.assert_clean().await;
}

#[tokio::test]
async fn container_is_refused_where_no_way_leads_to_the_guest_and_another_driver_is_named() {
    let Some(mut rig) = unshared().await else { return };
    rig.vm = FakeVm::new().without_share().without_hotplug();
    let (pod, image) = (rig.pod().await, blank(&rig));
    let plain = rig.container("c", &["sleep"], Stdio::default());
    for container in [plain, on_disk(&rig, &image, "ext4", &["loop"])] {
        let error = pod.create_container(container).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unimplemented, "{}", error.chain());
        let text = error.chain();
        assert!(text.contains("neither shares files of the host nor takes disks while it runs"), "{text}");
        assert!(text.contains("\"cloud-hypervisor\""), "{text}");
    }
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn shared_memory_is_one_for_the_pod_and_of_the_hosts_size() {
    let Some(rig) = Rig::new().await else { return };
    let (pod, shm) = (rig.pod().await, rig.dir.path().join("shm"));
    std::fs::create_dir(&shm).unwrap();
    rustix::mount::mount("shm", &shm, "tmpfs", rustix::mount::MountFlags::empty(), c"size=8m").unwrap();
    for name in ["a", "b"] {
        let mut container = rig.container(name, &["sleep"], Stdio::default());
        bind(&mut container, &shm, "/dev/shm");
        pod.create_container(container).await.unwrap();
    }
    rustix::mount::unmount(&shm, rustix::mount::UnmountFlags::empty()).unwrap();
    let created = rig.agent.created();
    assert_eq!(storages(&created[0]), [["ephemeral", "shm", "/run/kata-containers/sandbox/shm"]]);
    assert_eq!(created[0].storages, created[1].storages);
    assert!(created[0].storages[0].options.contains(&"size=8388608".to_owned()));
    assert_eq!(source_of(&created[1], "/dev/shm"), "/run/kata-containers/sandbox/shm");
    assert!(!rig.run_dir().join("shared/.volumes").exists());
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}
