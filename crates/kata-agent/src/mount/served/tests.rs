use std::sync::Arc;
use std::time::Duration;

use kata_api::guest_services::{ImagePullResponse, SecureMountResponse};
use rustix::mount::{MountFlags, mount};
use ttrpc::Code;

use super::super::Storages;
use super::*;
use crate::device::Disks;
use crate::services::fake;

fn storages(dir: &Path) -> Storages {
    let disks = Disks::new(Arc::default(), Duration::from_millis(20));
    Storages::new(Arc::default(), disks, fake::services(dir, Duration::from_secs(20)), true)
}

fn may_mount() -> bool {
    let may = rustix::process::geteuid().is_root();
    if !may {
        eprintln!("skipped: needs root to mount");
    }
    may
}

fn image(point: &Path, metadata: &str) -> Storage {
    Storage {
        driver: PULL.into(),
        driver_options: vec![format!("{PULL}={{\"metadata\":{metadata}}}")],
        source: "docker.io/library/x:1".into(),
        fstype: "overlay".into(),
        mount_point: point.to_str().unwrap().into(),
        ..Default::default()
    }
}

/// What a service leaves at a bundle.
fn make_bundle(bundle: &str) {
    let root = Path::new(bundle).join("rootfs");
    fs::create_dir_all(&root).unwrap();
    mount("image-pull-x", &root, "tmpfs", MountFlags::empty(), None).unwrap();
    fs::write(root.join("file"), "of the image").unwrap();
    fs::write(Path::new(bundle).join("config.json"), "{}").unwrap();
}

async fn pull_error(dir: &Path, point: &Path) -> StorageError {
    storages(dir).add(vec![image(point, "null")]).await.unwrap_err()
}

#[tokio::test]
async fn an_image_is_pulled_beside_its_root_and_goes_without_a_trace() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bundle = dir.path().join("c1");
    let point = bundle.join("rootfs");
    let _service = fake::pulls(dir.path(), |request| {
        assert_eq!(request.image_url, "docker.io/library/x:1");
        make_bundle(&request.bundle_path);
        Ok(ImagePullResponse::new())
    })
    .await;
    let all = storages(dir.path());
    let points = all.add(vec![image(&point, r#"{"a":"b"}"#)]).await.unwrap();
    assert_eq!(points, std::slice::from_ref(&point));
    assert_eq!(fs::read_to_string(point.join("file")).unwrap(), "of the image");
    assert!(bundle.join("config.json").exists());
    all.remove(points).await.unwrap();
    assert!(!bundle.exists());
}

#[tokio::test]
async fn a_pull_that_fails_leaves_nothing_that_it_has_mounted() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bundle = dir.path().join("c1");
    let point = bundle.join("rootfs");
    let _service = fake::pulls(dir.path(), |request| {
        make_bundle(&request.bundle_path);
        Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::DATA_LOSS, "layer 2 is another")))
    })
    .await;
    let error = pull_error(dir.path(), &point).await;
    let text = crate::chain(&error);
    assert!(text.contains("DATA_LOSS") && text.contains("layer 2 is another"), "{text}");
    assert!(!bundle.exists());
}

#[tokio::test]
async fn a_service_that_says_it_has_mounted_and_has_not_is_caught() {
    let dir = tempfile::tempdir().unwrap();
    let bundle = dir.path().join("c1");
    let _service = fake::pulls(dir.path(), |_| Ok(ImagePullResponse::new())).await;
    let error = pull_error(dir.path(), &bundle.join("rootfs")).await;
    assert!(matches!(error, StorageError::NotMounted { .. }), "{error}");
    assert!(!bundle.exists());
}

#[tokio::test]
async fn without_a_service_an_image_is_an_error_that_says_which_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let error = pull_error(dir.path(), &dir.path().join("c1/rootfs")).await;
    let text = crate::chain(&error);
    assert!(text.contains("a service of the guest that pulls images"), "{text}");
    assert!(matches!(&error, StorageError::Service { source, .. } if source.is_absent()), "{text}");
}

#[tokio::test]
async fn nothing_is_pulled_over_what_is_mounted() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("c1/rootfs");
    fs::create_dir_all(&point).unwrap();
    mount("none", &point, "tmpfs", MountFlags::empty(), None).unwrap();
    let error = pull_error(dir.path(), &point).await;
    assert!(error.to_string().contains("something is mounted there already"), "{error}");
    assert!(is_mount(&point).await.unwrap());
    unmount(&point, UnmountFlags::DETACH).unwrap();
}

#[tokio::test]
async fn an_image_is_pulled_to_where_nothing_is_whatever_the_host_has_put_there() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("c1/rootfs");
    let _service = fake::pulls(dir.path(), |request| {
        make_bundle(&request.bundle_path);
        Ok(ImagePullResponse::new())
    })
    .await;
    let all = storages(dir.path());
    let of_host = Storage { driver: "ephemeral".into(), driver_options: Vec::new(), ..image(&point, "null") };
    let of_host = Storage { source: "tmpfs".into(), fstype: "tmpfs".into(), ..of_host };
    let made = all.add(vec![of_host]).await.unwrap();
    let error = all.add(vec![image(&point, "null")]).await.unwrap_err().to_string();
    assert!(error.contains("c1/rootfs") && error.contains("another driver"), "{error}");
    all.remove(made).await.unwrap();
    let made = all.add(vec![image(&point, "null")]).await.unwrap();
    let error = all.add(vec![image(&point, "null")]).await.unwrap_err().to_string();
    assert!(error.contains("one container's"), "{error}");
    all.remove(made).await.unwrap();
}

#[tokio::test]
async fn an_image_is_not_pulled_beside_files_that_are_there_already() {
    let dir = tempfile::tempdir().unwrap();
    let _service = fake::pulls(dir.path(), |_| panic!("it was asked")).await;
    for file in ["rootfs/bin/sh", "config.json"] {
        let bundle = dir.path().join("c1");
        let path = bundle.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "of the host").unwrap();
        let error = pull_error(dir.path(), &bundle.join("rootfs")).await.to_string();
        assert!(error.contains("is there already"), "{error}");
        assert!(path.exists(), "what is another's stays");
        fs::remove_dir_all(&bundle).unwrap();
    }
}

#[tokio::test]
async fn a_pods_own_container_needs_no_service() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("c1/rootfs");
    let wanted = image(&point, r#"{"io.kubernetes.cri.container-type":"sandbox"}"#);
    assert!(Image::of(&wanted).unwrap().unwrap().is_pods_own);
    let all = storages(dir.path());
    let points = all.add(vec![wanted]).await.unwrap();
    assert!(is_mount(&point).await.unwrap());
    assert_eq!(fs::read_dir(&point).unwrap().count(), 0);
    all.remove(points).await.unwrap();
    assert!(!point.exists());
}

#[test]
fn a_request_for_an_image_that_makes_no_sense_is_invalid() {
    let good = image(Path::new("/run/c1/rootfs"), "{}");
    assert_eq!(Image::of(&good).unwrap().unwrap().config(), Path::new("/run/c1/config.json"));
    let of_other_kind = Storage { driver: "blk".into(), ..good.clone() };
    assert_eq!(Image::of(&of_other_kind).unwrap(), None);
    for bad in [
        Storage { mount_point: "/run/c1/root".into(), ..good.clone() },
        Storage { source: String::new(), ..good.clone() },
        Storage { driver_options: vec!["image_guest_pull={".into()], ..good.clone() },
        Storage { driver_options: vec!["image_guest_pull=[1]".into()], ..good.clone() },
        Storage { driver_options: vec!["other".into()], ..good.clone() },
    ] {
        assert!(matches!(Image::of(&bad), Err(StorageError::Invalid { .. })), "{bad:?}");
    }
}

#[test]
fn a_disk_is_encrypted_where_its_options_say_so_and_other_options_are_refused() {
    let disk = |options: &[&str], fstype: &str| Storage {
        driver: "blk".into(),
        driver_options: options.iter().map(|option| (*option).to_owned()).collect(),
        fstype: fstype.into(),
        ..Default::default()
    };
    assert!(!is_secure(&disk(&[], "ext4")).unwrap());
    for fstype in ["", "ext4"] {
        assert!(is_secure(&disk(&["encryption_key=ephemeral", "create_filesystem"], fstype)).unwrap());
    }
    for (options, fstype) in [
        (["encryption_key=ephemeral"].as_slice(), "xfs"),
        (&["create_filesystem"], "ext4"),
        (&["encryption_key=kbs:///a/b/c"], "ext4"),
    ] {
        assert!(is_secure(&disk(options, fstype)).is_err(), "{options:?} {fstype}");
    }
}

#[tokio::test]
async fn a_volume_is_encrypted_with_the_options_that_services_know() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("volume");
    let storage = Storage {
        driver: "blk".into(),
        // Numbers of a device that each machine has.
        source: "/dev/null".into(),
        mount_point: point.to_str().unwrap().into(),
        ..Default::default()
    };
    let _service = fake::mounts(dir.path(), |request| {
        let option = |name: &str| request.options.get(name).unwrap().clone();
        assert_eq!(request.volume_type, "block-device");
        assert_eq!(option("deviceId"), "1:3");
        assert_eq!((option("sourceType"), option("targetType")), ("empty".into(), "fileSystem".into()));
        assert_eq!((option("encryptionType"), option("dataIntegrity")), ("luks2".into(), "true".into()));
        assert_eq!(option("filesystemType"), "ext4");
        mount("none", request.mount_point.as_str(), "tmpfs", MountFlags::empty(), None).unwrap();
        Ok(SecureMountResponse::new())
    })
    .await;
    let services = fake::services(dir.path(), Duration::from_secs(20));
    secure(&services, &storage, &point, true).await.unwrap();
    assert!(is_mount(&point).await.unwrap());
    unmount(&point, UnmountFlags::DETACH).unwrap();
}

#[tokio::test]
async fn a_volume_that_is_not_encrypted_is_no_volume() {
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("volume");
    let storage = Storage {
        source: "/dev/null".into(),
        mount_point: point.to_str().unwrap().into(),
        ..Default::default()
    };
    let services = fake::services(dir.path(), Duration::from_secs(20));
    let error = secure(&services, &storage, &point, true).await.unwrap_err();
    assert!(crate::chain(&error).contains("mounts encrypted volumes"), "{error}");
    let _service = fake::mounts(dir.path(), |_| Ok(SecureMountResponse::new())).await;
    let error = secure(&services, &storage, &point, true).await.unwrap_err();
    assert!(matches!(error, StorageError::NotMounted { .. }), "{error}");
    assert!(!point.exists());
}
