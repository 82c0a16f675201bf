use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// A spec as containerd writes it, small.
fn base() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "root": {"path": "rootfs"},
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}]},
    })
}

/// `base` with the value at `pointer` set.
fn with(pointer: &str, value: Value) -> Value {
    let mut spec = base();
    let mut at = &mut spec;
    for part in pointer.split('/') {
        at = &mut at[part];
    }
    *at = value;
    spec
}

fn plan(spec: &Value) -> Result<Plan, EngineError> {
    let spec: Spec = serde_json::from_value(spec.clone()).expect("a spec");
    Plan::of("c1", &spec, Path::new("/bundle"))
}

fn refused(pointer: &str, value: Value, key: &str) {
    match plan(&with(pointer, value)) {
        Err(EngineError::Unsupported { key: named, .. }) => assert!(named.contains(key), "{named}"),
        other => panic!("{pointer}: {other:?}"),
    }
}

fn wrong(pointer: &str, value: Value, key: &str) {
    match plan(&with(pointer, value)) {
        Err(EngineError::Invalid { key: named, .. }) => assert!(named.contains(key), "{named}"),
        other => panic!("{pointer}: {other:?}"),
    }
}

#[test]
fn a_small_spec_is_planned_whole() {
    let plan = plan(&base()).unwrap();
    assert_eq!(plan.container.rootfs, Path::new("/bundle/rootfs"));
    assert_eq!(plan.cgroup, Path::new("kata/c1"));
    let wanted = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    assert_eq!(plan.container.namespaces(), flag_of(wanted));
    assert_eq!(plan.process.capabilities, crate::container::capabilities::CapabilityPlan::default());
}

#[test]
fn what_the_engine_does_not_do_is_refused_by_key() {
    refused("linux/namespaces", json!([{"type": "mount"}, {"type": "user"}]), "namespaces[user]");
    refused("linux/namespaces", json!([{"type": "mount", "path": "/proc/1/ns/mnt"}]), "namespaces[mount]");
    refused("linux/intelRdt", json!({"closID": "x"}), "intelRdt");
    refused("linux/mountLabel", json!("system_u:object_r:x"), "mountLabel");
    refused("linux/personality", json!({"domain": "LINUX32"}), "personality");
    refused("linux/timeOffsets", json!({"monotonic": {"secs": 1}}), "timeOffsets");
    refused("process/selinuxLabel", json!("system_u:system_r:x"), "selinuxLabel");
    refused("process/scheduler", json!({"policy": "SCHED_FIFO"}), "scheduler");
    refused("process/ioPriority", json!({"class": "IOPRIO_CLASS_RT", "priority": 1}), "ioPriority");
    refused("linux/sysctl", json!({"vm.swappiness": "1"}), "sysctl");
    refused("mounts", json!([{"destination": "/t", "type": "tmpfs", "options": ["tmpcopyup"]}]), "mounts");
    refused(
        "mounts",
        json!([{"destination": "/t", "type": "bind", "source": "/x", "options": ["bind", "idmap"]}]),
        "mounts",
    );
}

#[test]
fn what_contradicts_the_specification_is_invalid_by_key() {
    wrong("process/args", json!([]), "process.args");
    wrong("hooks", json!({"startContainer": [{"path": "bin/x"}]}), "hooks.startContainer");
    wrong("hooks", json!({"createContainer": [{"path": "/bin/x", "timeout": 0}]}), "hooks.createContainer");
    wrong("process/cwd", json!("relative"), "process.cwd");
    wrong("process/args", json!(["a\u{0}b"]), "process.args");
    wrong("process/env", json!(["A=\u{0}"]), "process.env");
    wrong("process/user/uid", json!(u32::MAX), "uid");
    wrong("process/oomScoreAdj", json!(2000), "oomScoreAdj");
    wrong("process/rlimits", json!([{"type": "RLIMIT_NOFILE", "soft": 2, "hard": 1}]), "RLIMIT_NOFILE");
    let twice = json!({"type": "RLIMIT_CORE", "soft": 1, "hard": 1});
    wrong("process/rlimits", json!([twice, twice]), "RLIMIT_CORE");
    wrong("linux/namespaces", json!([{"type": "pid"}]), "linux.namespaces");
    wrong("linux/namespaces", json!([{"type": "mount"}, {"type": "mount"}]), "namespaces[mount]");
    wrong("linux/rootfsPropagation", json!("sideways"), "rootfsPropagation");
    wrong("linux/maskedPaths", json!(["relative"]), "maskedPaths");
    wrong("linux/cgroupsPath", json!("/a/../../b"), "cgroupsPath");
    wrong("linux/sysctl", json!({"net..x": "1"}), "sysctl");
    wrong("linux/sysctl", json!({"net/../kernel/core_pattern": "1"}), "sysctl");
    wrong("linux/devices", json!([{"path": "/dev/x", "type": "c", "major": -5, "minor": 0}]), "/dev/x");
    wrong("mounts", json!([{"destination": "/", "type": "tmpfs"}]), "mounts");
    wrong("mounts", json!([{"destination": "/x", "type": "bind", "source": "relative"}]), "mounts");
    wrong("mounts", json!([{"destination": "/x"}]), "mounts");
    wrong("hostname", json!("x".repeat(65)), "hostname");
}

#[test]
fn the_size_of_a_terminal_counts_only_with_one() {
    let terminal = |process: Value| {
        let mut spec = base();
        spec["process"].as_object_mut().unwrap().extend(process.as_object().unwrap().clone());
        plan(&spec).map(|plan| plan.process.terminal)
    };
    let sized = |height: u32| json!({"terminal": true, "consoleSize": {"height": height, "width": 80}});
    assert_eq!(terminal(json!({})).unwrap(), None);
    assert_eq!(terminal(json!({"terminal": true})).unwrap(), Some(TerminalPlan { rows: 0, columns: 0 }));
    assert_eq!(terminal(sized(25)).unwrap(), Some(TerminalPlan { rows: 25, columns: 80 }));
    assert!(matches!(terminal(sized(70_000)), Err(EngineError::Invalid { .. })));
    let ignored = json!({"terminal": false, "consoleSize": {"height": 70_000, "width": 80}});
    assert_eq!(terminal(ignored).unwrap(), None);
}

#[test]
fn hooks_of_the_host_side_are_none_of_the_guests_business() {
    let hook = json!([{"path": "/usr/bin/hook"}]);
    let hooks = json!({"prestart": hook, "createRuntime": hook, "poststart": hook, "poststop": hook});
    assert!(plan(&with("hooks", hooks)).is_ok());
}

#[test]
fn a_hostname_needs_a_uts_namespace() {
    let mut spec = with("hostname", json!("box"));
    assert_eq!(plan(&spec).unwrap().container.hostname.as_deref(), Some("box"));
    spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
    assert!(matches!(plan(&spec), Err(EngineError::Invalid { .. })));
    spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts", "path": "/run/uts"}]);
    assert!(plan(&spec).is_ok());
}

#[test]
fn sysctls_of_the_containers_own_namespaces_are_accepted() {
    let names = json!({"net.ipv4.ip_forward": "1", "net/ipv4/conf/eth0.1/forwarding": "1", "kernel.shmmax": "1",
        "fs.mqueue.msg_max": "9", "kernel.domainname": "x"});
    let plan_of = plan(&with("linux/sysctl", names)).unwrap();
    let paths: Vec<_> = plan_of.container.sysctls.keys().map(|path| path.display().to_string()).collect();
    assert!(paths.contains(&"net/ipv4/conf/eth0.1/forwarding".to_owned()), "{paths:?}");
    assert!(paths.contains(&"kernel/shmmax".to_owned()));
    let mut spec = with("linux/sysctl", json!({"kernel.shmmax": "1"}));
    spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
    assert!(
        matches!(plan(&spec), Err(EngineError::Unsupported { .. })),
        "the guest's IPC namespace is shared"
    );
}

#[test]
fn cgroup_paths_are_below_the_root_and_systemd_units_are_taken_apart() {
    for (asked, made) in [
        ("/kubepods/pod1/c1", "kubepods/pod1/c1"),
        ("kubepods//./c1", "kubepods/c1"),
        ("system.slice:cri:c1", "system.slice/cri-c1.scope"),
        ("/a:b:c", "a:b:c"),
        ("", "kata/c1"),
    ] {
        assert_eq!(
            plan(&with("linux/cgroupsPath", json!(asked))).unwrap().cgroup,
            Path::new(made),
            "{asked}"
        );
    }
}

#[test]
fn ids_are_one_plain_word() {
    for bad in ["", ".", "..", "a/b", "a b", "a\n", &"x".repeat(2000)] {
        assert!(check_id(bad).is_err(), "{bad:?}");
    }
    for good in ["a", "1", "c-1_x.y+z"] {
        assert!(check_id(good).is_ok(), "{good:?}");
    }
}

#[test]
fn a_bind_is_a_bind_by_type_or_option_and_other_mounts_keep_their_parameters() {
    let plan = plan(&with(
        "mounts",
        json!([
            {"destination": "/a", "type": "bind", "source": "/s", "options": ["ro"]},
            {"destination": "/b", "type": "none", "source": "/s", "options": ["rbind", "rslave"]},
            {"destination": "/c", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m", "nosuid", "ro"]},
            {"destination": "/d", "type": "ext4", "source": "/dev/vdb", "options": ["ro"]},
            {"destination": "/e", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
        ]),
    ))
    .unwrap();
    let sources: Vec<_> = plan.container.mounts.iter().map(|mount| mount.source.clone()).collect();
    assert_eq!(sources[0], MountSource::Bind { path: "/s".into(), recursive: false });
    assert_eq!(sources[1], MountSource::Bind { path: "/s".into(), recursive: true });
    let tmpfs = MountSource::Filesystem {
        kind: "tmpfs".to_owned(),
        source: "tmpfs".to_owned(),
        parameters: vec!["size=1m".to_owned()],
    };
    assert_eq!(sources[2], tmpfs);
    let MountSource::Filesystem { parameters, .. } = &sources[3] else { panic!("{:?}", sources[3]) };
    assert_eq!(parameters, &["ro"], "a disk is opened read-only, not only its mount");
    assert_eq!(sources[4], MountSource::Cgroup);
    assert_eq!(plan.container.mounts[0].set & 1, 1, "MOUNT_ATTR_RDONLY");
}

/// Any JSON, not too deep.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
        "[a-z./:=\u{0}-]{0,12}".prop_map(Value::from),
        Just(Value::from("mount")),
        Just(Value::from("SCMP_ACT_ALLOW")),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec(("[a-zA-Z]{1,8}", inner), 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

const POINTERS: [&str; 24] = [
    "root/path",
    "process/args",
    "process/env",
    "process/cwd",
    "process/user",
    "process/user/additionalGids",
    "process/rlimits",
    "process/capabilities",
    "process/oomScoreAdj",
    "hostname",
    "mounts",
    "hooks",
    "linux/namespaces",
    "linux/devices",
    "linux/sysctl",
    "linux/seccomp",
    "linux/resources",
    "linux/resources/memory",
    "linux/resources/devices",
    "linux/cgroupsPath",
    "linux/maskedPaths",
    "linux/readonlyPaths",
    "linux/rootfsPropagation",
    "linux/personality",
];

proptest! {
    #[test]
    fn a_spec_with_garbage_anywhere_never_panics(pointer in prop::sample::select(&POINTERS[..]), value in any_json()) {
        if let Ok(spec) = serde_json::from_value::<Spec>(with(pointer, value)) {
            let _ = Plan::of("c1", &spec, Path::new("/bundle"));
        }
    }

    #[test]
    fn odd_mounts_and_devices_never_panic(
        destination in "\\PC{0,20}", kind in "[a-z]{0,8}", source in "\\PC{0,20}",
        options in prop::collection::vec("[a-z=,0-9]{0,12}", 0..6), major in any::<i64>(), mode in any::<u32>(),
    ) {
        let mut spec = with("mounts", json!([{"destination": destination, "type": kind, "source": source, "options": options}]));
        spec["linux"]["devices"] = json!([{"path": source, "type": "c", "major": major, "minor": 0, "fileMode": mode}]);
        if let Ok(spec) = serde_json::from_value::<Spec>(spec) {
            let _ = Plan::of("c1", &spec, Path::new("/bundle"));
        }
    }

    #[test]
    fn a_cgroup_path_never_leaves_the_root(asked in "[a-z./:]{0,30}") {
        if let Ok(path) = cgroup_path("c1", Some(Path::new(&asked))) {
            prop_assert!(path.is_relative());
            prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
        }
    }

    #[test]
    fn a_sysctl_path_never_leaves_its_directory(name in "[a-z./]{0,30}") {
        if let Some(path) = sysctl_path(&name) {
            prop_assert!(!path.starts_with('/') && path.split('/').all(|part| part != ".." && !part.is_empty()));
        }
    }
}
