//! The agent's own use of the service: a storage that asks for an image, from request to removal.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kata_agent::cmdline::Settings;
use kata_agent::device::Disks;
use kata_agent::mount::{StorageError, Storages};
use kata_agent::reaper::Reaper;
use kata_agent::services::Services;
use kata_api::agent::Storage;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use support::{LocalRegistry, Made, Service, Wants, can_run, layer};

/// What a runtime asks the agent for.
fn wanted(image: &str, bundle: &Path) -> Storage {
    Storage {
        driver: "image_guest_pull".into(),
        driver_options: vec![r#"image_guest_pull={"metadata":{}}"#.into()],
        source: image.into(),
        fstype: "overlay".into(),
        mount_point: bundle.join("rootfs").display().to_string(),
        ..Default::default()
    }
}

/// Does something as the agent would: in the service's mount namespace, with a way to its socket.
fn as_agent<T: Send>(service: &Service, act: impl AsyncFnOnce(Storages) -> T + Send) -> T {
    let mounts = File::open(format!("/proc/{}/ns/mnt", service.process.0.id())).unwrap();
    let dir = service.dir.path().join("sockets");
    if !dir.exists() {
        fs::create_dir(&dir).unwrap();
        symlink(service.socket(), dir.join("image-pull.socket")).unwrap();
    }
    let entered = || {
        // SAFETY: this thread shares its directory with the others no longer, and none of them relies on that.
        unsafe { unshare_unsafe(UnshareFlags::FS) }.unwrap();
        move_into_link_name_space(mounts.as_fd(), Some(LinkNameSpaceType::Mount)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let services = Services::new(&dir, &Settings::default(), Reaper::new());
            let disks = Disks::new(Arc::default(), Duration::from_secs(1));
            act(Storages::new(Arc::default(), disks, services, true)).await
        })
    };
    std::thread::scope(|scope| scope.spawn(entered).join().unwrap())
}

#[test]
fn the_agent_has_an_image_pulled_and_takes_it_down_without_a_trace() {
    if !can_run(&["docker-registry", "unshare"]) {
        return;
    }
    let registry = LocalRegistry::start(Wants::default());
    registry.push("app:v1", &Made::of(&[layer(&[("etc/kept", "kept")])]));
    let service = Service::start(&registry.insecure());
    let bundle = service.dir.path().join("bundles/one");
    let image = registry.name("app:v1");
    let (config, text) = as_agent(&service, async |storages| {
        let points = storages.add(vec![wanted(&image, &bundle)]).await.unwrap();
        let text = fs::read_to_string(bundle.join("rootfs/etc/kept")).unwrap();
        let config = fs::read_to_string(bundle.join("config.json")).unwrap();
        storages.remove(points).await.unwrap();
        (config, text)
    });
    assert_eq!(text, "kept");
    assert!(config.contains("/bin/x"), "{config}");
    assert!(!bundle.exists());
}

#[test]
fn an_image_that_is_not_there_is_an_error_in_the_services_words_and_leaves_nothing() {
    if !can_run(&["docker-registry", "unshare"]) {
        return;
    }
    let registry = LocalRegistry::start(Wants::default());
    let service = Service::start(&registry.insecure());
    let bundle = service.dir.path().join("bundles/one");
    let image = registry.name("absent:v1");
    let error =
        as_agent(&service, async |storages| storages.add(vec![wanted(&image, &bundle)]).await.unwrap_err());
    let text = kata_agent::chain(&error);
    assert!(matches!(error, StorageError::Service { .. }), "{text}");
    assert!(text.contains("image-pull has refused (NOT_FOUND)"), "{text}");
    assert!(!bundle.exists());
}

#[test]
fn a_service_that_was_killed_is_used_again_once_it_is_back() {
    if !can_run(&["docker-registry", "unshare"]) {
        return;
    }
    let registry = LocalRegistry::start(Wants::default());
    registry.push("app:v1", &Made::of(&[layer(&[("file", "x")])]));
    let mut service = Service::start(&registry.insecure());
    let image = registry.name("app:v1");
    for name in ["one", "two"] {
        let bundle = service.dir.path().join("bundles").join(name);
        let found = as_agent(&service, async |storages| {
            let points = storages.add(vec![wanted(&image, &bundle)]).await.unwrap();
            let found = bundle.join("rootfs/file").exists();
            storages.remove(points).await.unwrap();
            found
        });
        assert!(found, "{name}");
        service.restart();
    }
}
