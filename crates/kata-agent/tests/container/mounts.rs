//! Mounts of the spec.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kata_agent::cmdline::Settings;
use kata_agent::container::EngineError;
use kata_agent::device::Disks;
use kata_agent::mount::Storages;
use kata_agent::services::Services;
use kata_api::agent::Storage;
use serde_json::{Value, json};

use crate::world::{World, spec, with_world};

fn with_mount(mount: Value) -> Value {
    let mut spec = spec();
    spec["mounts"].as_array_mut().unwrap().push(mount);
    spec
}

/// A directory of the "guest" with a file in it.
fn volume(world: &Arc<World>) -> std::path::PathBuf {
    let volume = world.bundle.path().join("volume");
    fs::create_dir_all(&volume).unwrap();
    fs::write(volume.join("file"), "from outside").unwrap();
    volume
}

async fn refused(world: &Arc<World>, spec: &Value) -> String {
    kata_agent::chain(&world.run(spec).await.unwrap_err())
}

#[test]
fn a_bind_mount_is_writable_unless_it_is_read_only() {
    with_world(|world| async move {
        let source = volume(&world);
        let at = |options: Value| {
            with_mount(
                json!({"destination": "/deep/er/mnt", "type": "bind", "source": source, "options": options}),
            )
        };
        let text = world
            .sh(&at(json!(["rbind", "rprivate"])), "cat /deep/er/mnt/file; echo new > /deep/er/mnt/new")
            .await;
        assert_eq!(text.ok(), "from outside");
        assert_eq!(fs::read_to_string(source.join("new")).unwrap(), "new\n");
        let outcome = world.sh(&at(json!(["bind", "ro"])), "echo x > /deep/er/mnt/file").await;
        assert!(outcome.stderr.contains("Read-only"), "{outcome:?}");
    });
}

#[test]
fn containers_share_memory_that_the_sandbox_has_mounted() {
    with_world(|world| async move {
        let disks = Disks::new(Arc::default(), Duration::ZERO);
        let services = Services::new(Path::new("/no/services"), &Settings::default(), world.reaper.clone());
        let storages = Storages::new(Arc::default(), disks, services, true);
        let shm = world.bundle.path().join("sandbox/shm");
        let wanted = Storage {
            driver: "ephemeral".into(),
            source: "shm".into(),
            fstype: "tmpfs".into(),
            options: ["nosuid", "noexec", "nodev", "mode=1777", "size=64k"].map(str::to_owned).into(),
            mount_point: shm.to_str().unwrap().into(),
            ..Default::default()
        };
        let made = storages.add(vec![wanted]).await.unwrap();
        let spec = with_mount(
            json!({"destination": "/dev/shm", "type": "bind", "source": shm, "options": ["rbind"]}),
        );
        world.sh(&spec, "echo shared > /dev/shm/segment").await.ok();
        let text = world.sh(&spec, "cat /dev/shm/segment; grep ' /dev/shm ' /proc/mounts").await.ok();
        assert!(text.starts_with("shared\nshm /dev/shm tmpfs rw,nosuid,nodev,noexec"), "{text}");
        assert!(text.contains("size=64k"), "{text}");
        storages.remove(made).await.unwrap();
    });
}

#[test]
fn a_file_is_bound_onto_a_file_made_for_it() {
    with_world(|world| async move {
        let source = volume(&world).join("file");
        let spec = with_mount(
            json!({"destination": "/etc/conf", "type": "bind", "source": source, "options": ["bind"]}),
        );
        assert_eq!(world.sh(&spec, "cat /etc/conf").await.ok(), "from outside");
    });
}

#[test]
fn attributes_of_a_tree_reach_the_mounts_below() {
    with_world(|world| async move {
        let outer = volume(&world);
        let mut spec = spec();
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/vol", "type": "bind", "source": outer, "options": ["rbind"]}));
        mounts.push(json!({"destination": "/vol/sub", "type": "tmpfs", "source": "t"}));
        let script = "grep ' /vol' /proc/self/mountinfo | cut -d' ' -f6 | tr '\\n' ' '; grep -c ' /vol/sub ' /proc/mounts";
        assert_eq!(world.sh(&spec, script).await.ok(), "rw,relatime rw,relatime 1");
        let proc = json!({"destination": "/copy", "type": "bind", "source": "/dev", "options": ["rbind", "rro", "noexec"]});
        let text = world
            .sh(&with_mount(proc), "grep ' /copy' /proc/self/mountinfo | cut -d' ' -f6 | grep -vc ^ro")
            .await;
        assert_eq!(text.stdout.trim(), "0", "every mount below is read-only");
    });
}

#[test]
fn filesystem_parameters_and_flags_are_applied() {
    with_world(|world| async move {
        fs::set_permissions(world.root().join("tmp"), std::os::unix::fs::PermissionsExt::from_mode(0o1777))
            .unwrap();
        let tmp = json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs",
            "options": ["size=64k", "nosuid", "nodev", "noexec", "noatime"]});
        let text = world.sh(&with_mount(tmp), "grep ' /tmp ' /proc/mounts; stat -c %a /tmp").await.ok();
        assert!(text.contains("nosuid,nodev,noexec,noatime,size=64k"), "{text}");
        assert!(text.ends_with("1777"), "the mode of the directory below stays: {text}");
    });
}

#[test]
fn a_bad_parameter_is_told_in_the_kernels_words() {
    with_world(|world| async move {
        let bad = |options: Value| json!({"destination": "/mnt", "type": "tmpfs", "source": "t", "options": options});
        let text = refused(&world, &with_mount(bad(json!(["size=banana"])))).await;
        assert!(text.contains("mount tmpfs at /mnt") && text.contains("size=banana"), "{text}");
        let unknown = json!({"destination": "/mnt", "type": "nosuchfs", "source": "t"});
        let text = refused(&world, &with_mount(unknown)).await;
        assert!(text.contains("nosuchfs at /mnt"), "{text}");
    });
}

#[test]
fn a_missing_source_is_named() {
    with_world(|world| async move {
        let gone =
            json!({"destination": "/mnt", "type": "bind", "source": "/no/such/volume", "options": ["bind"]});
        let text = refused(&world, &with_mount(gone)).await;
        assert!(text.contains("/no/such/volume") && text.contains("/mnt"), "{text}");
    });
}

#[test]
fn links_of_the_image_do_not_lead_a_mount_out() {
    with_world(|world| async move {
        let outside = world.bundle.path().join("outside");
        fs::create_dir(&outside).unwrap();
        symlink("../outside", world.root().join("up")).unwrap();
        symlink(&outside, world.root().join("absolute")).unwrap();
        symlink("../run/resolve.conf", world.root().join("etc/resolv.conf")).unwrap();
        for destination in ["/up/made", "/absolute/made", "/../../outside/made"] {
            let tmpfs = json!({"destination": destination, "type": "tmpfs", "source": "t"});
            world.sh(&with_mount(tmpfs), "true").await.ok();
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        let source = volume(&world).join("file");
        let conf =
            json!({"destination": "/etc/resolv.conf", "type": "bind", "source": source, "options": ["bind"]});
        let text = world.sh(&with_mount(conf), "cat /run/resolve.conf /etc/resolv.conf").await.ok();
        assert_eq!(text, "from outsidefrom outside");
    });
}

#[test]
fn proc_is_mounted_where_it_belongs_and_not_covered() {
    with_world(|world| async move {
        let source = volume(&world);
        let attr =
            json!({"destination": "/proc/self/attr", "type": "bind", "source": source, "options": ["bind"]});
        let error = world.run(&with_mount(attr)).await.unwrap_err();
        assert!(matches!(error, EngineError::Invalid { .. }), "{error:?}");
        let cover = json!({"destination": "/proc", "type": "bind", "source": source, "options": ["bind"]});
        assert!(matches!(world.run(&with_mount(cover)).await, Err(EngineError::Invalid { .. })));
        let file = json!({"destination": "/proc/uptime", "type": "bind", "source": source.join("file"), "options": ["bind"]});
        assert_eq!(world.sh(&with_mount(file), "cat /proc/uptime").await.ok(), "from outside");

        fs::remove_dir(world.root().join("proc")).unwrap();
        symlink("tmp", world.root().join("proc")).unwrap();
        let error = world.run(&spec()).await.unwrap_err();
        assert!(error.to_string().contains("symlink"), "{error}");
    });
}

#[test]
fn propagation_of_the_root_and_of_mounts_is_set() {
    with_world(|world| async move {
        let source = volume(&world);
        let mut spec = with_mount(
            json!({"destination": "/mnt", "type": "bind", "source": source, "options": ["rbind", "rshared"]}),
        );
        spec["linux"]["rootfsPropagation"] = json!("private");
        let text = world.sh(&spec, "grep -c ' / .* shared:' /proc/self/mountinfo; grep -c ' /mnt .* shared:' /proc/self/mountinfo").await;
        assert_eq!(text.stdout, "0\n1\n");
    });
}
