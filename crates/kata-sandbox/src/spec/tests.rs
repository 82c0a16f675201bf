//! The wire is read back by hand into config.json's shape, so that a field put in the wrong place shows.

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn converted(json: Value) -> wire::Spec {
    spec(&serde_json::from_value(json).unwrap())
}

fn text() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9/=_. -]{1,12}"
}

prop_compose! {
    fn process_json()(
        terminal: bool, no_new_privileges: bool,
        (height, width) in (1..5000_u32, 1..5000_u32),
        (uid, gid, groups) in (any::<u32>(), any::<u32>(), vec(any::<u32>(), 1..4)),
        (args, env) in (vec(text(), 1..4), vec(text(), 1..4)),
        cwd in "/[a-z]{0,9}",
        (hard, soft) in (any::<u64>(), any::<u64>()),
        score in 1..=1000_i32,
    ) -> Value {
        json!({
            "terminal": terminal, "consoleSize": {"height": height, "width": width},
            "user": {"uid": uid, "gid": gid, "additionalGids": groups, "username": "u"},
            "args": args, "env": env, "cwd": cwd, "noNewPrivileges": no_new_privileges, "oomScoreAdj": score,
            "apparmorProfile": "a", "selinuxLabel": "s",
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": hard, "soft": soft}],
            "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_KILL"], "inheritable": ["CAP_FOWNER"],
                             "permitted": ["CAP_MKNOD"], "ambient": ["CAP_SYS_CHROOT"]},
        })
    }
}

fn process_back(process: &wire::Process) -> Value {
    let capabilities = &process.capabilities;
    json!({
        "terminal": process.terminal,
        "consoleSize": {"height": process.console_size.height, "width": process.console_size.width},
        "user": {"uid": process.user.uid, "gid": process.user.gid, "additionalGids": process.user.additional_gids,
                 "username": process.user.username},
        "args": process.args, "env": process.env, "cwd": process.cwd, "noNewPrivileges": process.no_new_privileges,
        "oomScoreAdj": process.oom_score_adj, "apparmorProfile": process.apparmor_profile,
        "selinuxLabel": process.selinux_label,
        "rlimits": process.rlimits.iter().map(|limit| json!({"type": limit.type_, "hard": limit.hard, "soft": limit.soft}))
            .collect::<Vec<_>>(),
        "capabilities": {"bounding": capabilities.bounding, "effective": capabilities.effective,
                         "inheritable": capabilities.inheritable, "permitted": capabilities.permitted,
                         "ambient": capabilities.ambient},
    })
}

prop_compose! {
    fn resources_json()(
        (limit, reservation, swap) in (any::<i64>(), any::<i64>(), any::<i64>()),
        (shares, quota, period) in (any::<u64>(), any::<i64>(), any::<u64>()),
        (runtime, realtime_period) in (any::<i64>(), any::<u64>()),
        (pids, pages) in (any::<i64>(), 0..i64::MAX),
        (weight, leaf) in (any::<u16>(), any::<u16>()),
        (major, minor, rate) in (any::<i64>(), any::<i64>(), any::<u64>()),
        allow: bool, swappiness in 0..100_u64,
    ) -> Value {
        json!({
            "devices": [{"allow": allow, "type": "c", "major": major, "minor": minor, "access": "rw"}],
            "memory": {"limit": limit, "reservation": reservation, "swap": swap, "kernel": 3, "kernelTCP": 4,
                       "swappiness": swappiness, "disableOOMKiller": allow},
            "cpu": {"shares": shares, "quota": quota, "period": period, "realtimeRuntime": runtime,
                    "realtimePeriod": realtime_period, "cpus": "0-1", "mems": "0"},
            "pids": {"limit": pids},
            "blockIO": {"weight": weight, "leafWeight": leaf,
                        "weightDevice": [{"major": major, "minor": minor, "weight": weight, "leafWeight": leaf}],
                        "throttleReadBpsDevice": [{"major": 1, "minor": minor, "rate": rate}],
                        "throttleWriteBpsDevice": [{"major": 2, "minor": minor, "rate": rate}],
                        "throttleReadIOPSDevice": [{"major": 3, "minor": minor, "rate": rate}],
                        "throttleWriteIOPSDevice": [{"major": 4, "minor": minor, "rate": rate}]},
            "hugepageLimits": [{"pageSize": "2MB", "limit": pages}],
            "network": {"classID": 7, "priorities": [{"name": "eth0", "priority": 8}]},
        })
    }
}

fn resources_back(resources: &wire::LinuxResources) -> Value {
    let throttle = |devices: &[wire::LinuxThrottleDevice]| -> Vec<Value> {
        devices.iter().map(|d| json!({"major": d.major, "minor": d.minor, "rate": d.rate})).collect()
    };
    let (memory, cpu, block_io) = (&resources.memory, &resources.cpu, &resources.block_io);
    json!({
        "devices": resources.devices.iter().map(|rule| json!({"allow": rule.allow, "type": rule.type_,
            "major": rule.major, "minor": rule.minor, "access": rule.access})).collect::<Vec<_>>(),
        "memory": {"limit": memory.limit, "reservation": memory.reservation, "swap": memory.swap, "kernel": memory.kernel,
                   "kernelTCP": memory.kernel_tcp, "swappiness": memory.swappiness,
                   "disableOOMKiller": memory.disable_oom_killer},
        "cpu": {"shares": cpu.shares, "quota": cpu.quota, "period": cpu.period, "realtimeRuntime": cpu.realtime_runtime,
                "realtimePeriod": cpu.realtime_period, "cpus": cpu.cpus, "mems": cpu.mems},
        "pids": {"limit": resources.pids.limit},
        "blockIO": {"weight": block_io.weight, "leafWeight": block_io.leaf_weight,
                    "weightDevice": block_io.weight_device.iter().map(|d| json!({"major": d.major, "minor": d.minor,
                        "weight": d.weight, "leafWeight": d.leaf_weight})).collect::<Vec<_>>(),
                    "throttleReadBpsDevice": throttle(&block_io.throttle_read_bps_device),
                    "throttleWriteBpsDevice": throttle(&block_io.throttle_write_bps_device),
                    "throttleReadIOPSDevice": throttle(&block_io.throttle_read_iops_device),
                    "throttleWriteIOPSDevice": throttle(&block_io.throttle_write_iops_device)},
        "hugepageLimits": resources.hugepage_limits.iter().map(|l| json!({"pageSize": l.pagesize, "limit": l.limit}))
            .collect::<Vec<_>>(),
        "network": {"classID": resources.network.class_id,
                    "priorities": resources.network.priorities.iter().map(|p| json!({"name": p.name,
                        "priority": p.priority})).collect::<Vec<_>>()},
    })
}

proptest! {
    #[test]
    fn every_field_of_a_process_arrives_in_its_place(given in process_json()) {
        prop_assert_eq!(process_back(&process(&serde_json::from_value(given.clone()).unwrap())), given);
    }

    #[test]
    fn every_limit_arrives_in_its_place(given in resources_json()) {
        prop_assert_eq!(resources_back(&resources(&serde_json::from_value(given.clone()).unwrap())), given);
    }
}

#[test]
fn missing_numbers_of_a_device_rule_are_wildcards() {
    let given = json!({"devices": [{"allow": false, "access": "rwm"}]});
    let rule = resources(&serde_json::from_value(given).unwrap()).devices.remove(0);
    assert_eq!((rule.type_.as_str(), rule.major, rule.minor), ("a", -1, -1));
}

#[test]
fn the_rest_of_a_specification_arrives_in_its_place() {
    let hook = |name: &str| json!([{"path": name, "args": ["a"], "env": ["E=1"], "timeout": 3}]);
    let wire = converted(json!({
        "ociVersion": "1.2.0", "hostname": "h", "annotations": {"k": "v"},
        "root": {"path": "/r", "readonly": true},
        "mounts": [{"destination": "/d", "source": "/s", "type": "bind", "options": ["ro"]}],
        "hooks": {"prestart": hook("1"), "createRuntime": hook("2"), "createContainer": hook("3"),
                  "startContainer": hook("4"), "poststart": hook("5"), "poststop": hook("6")},
        "linux": {
            "uidMappings": [{"containerID": 1, "hostID": 2, "size": 3}],
            "gidMappings": [{"containerID": 4, "hostID": 5, "size": 6}],
            "sysctl": {"net.ipv4.ip_forward": "1"}, "cgroupsPath": "/c",
            "namespaces": [{"type": "network", "path": "/n"}, {"type": "mount"}, {"type": "cgroup"}, {"type": "time"}],
            "devices": [{"path": "/dev/x", "type": "b", "major": 8, "minor": 1, "fileMode": 384, "uid": 1, "gid": 2}],
            "rootfsPropagation": "slave", "maskedPaths": ["/m"], "readonlyPaths": ["/ro"], "mountLabel": "l",
            "intelRdt": {"l3CacheSchema": "L3"}
        }
    }));
    assert_eq!(
        (wire.version.as_str(), wire.hostname.as_str(), wire.annotations["k"].as_str()),
        ("1.2.0", "h", "v")
    );
    assert_eq!((wire.root.path.as_str(), wire.root.readonly), ("/r", true));
    let mount = &wire.mounts[0];
    assert_eq!(
        (mount.destination.as_str(), mount.source.as_str(), mount.type_.as_str()),
        ("/d", "/s", "bind")
    );
    let h = &wire.hooks;
    let names =
        [&h.prestart, &h.create_runtime, &h.create_container, &h.start_container, &h.poststart, &h.poststop];
    assert_eq!(names.map(|hooks| hooks[0].path.clone()), ["1", "2", "3", "4", "5", "6"]);
    assert_eq!((h.prestart[0].env[0].as_str(), h.prestart[0].timeout), ("E=1", 3));
    let linux = &wire.linux;
    let ids = |m: &wire::LinuxIDMapping| (m.container_id, m.host_id, m.size);
    assert_eq!((ids(&linux.uid_mappings[0]), ids(&linux.gid_mappings[0])), ((1, 2, 3), (4, 5, 6)));
    let namespaces: Vec<_> = linux.namespaces.iter().map(|n| (n.type_.as_str(), n.path.as_str())).collect();
    assert_eq!(namespaces, [("network", "/n"), ("mount", ""), ("cgroup", ""), ("time", "")]);
    let device = &linux.devices[0];
    assert_eq!((device.type_.as_str(), device.major, device.minor, device.file_mode), ("b", 8, 1, 0o600));
    assert_eq!((linux.sysctl["net.ipv4.ip_forward"].as_str(), linux.cgroups_path.as_str()), ("1", "/c"));
    assert_eq!((linux.masked_paths[0].as_str(), linux.readonly_paths[0].as_str()), ("/m", "/ro"));
    assert_eq!((linux.rootfs_propagation.as_str(), linux.mount_label.as_str()), ("slave", "l"));
    assert_eq!(linux.intel_rdt.l3_cache_schema, "L3");
}

#[test]
fn seccomp_keeps_the_names_of_config_json() {
    let wire = converted(json!({"ociVersion": "1.1.0", "linux": {"seccomp": {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X32", "SCMP_ARCH_MIPS64N32"],
        "flags": ["SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
        "syscalls": [{"names": ["clone"], "action": "SCMP_ACT_ALLOW", "errnoRet": 38,
                      "args": [{"index": 2, "value": 3, "valueTwo": 4, "op": "SCMP_CMP_MASKED_EQ"}]}]
    }}}));
    let seccomp = &wire.linux.seccomp;
    assert_eq!(seccomp.default_action, "SCMP_ACT_ERRNO");
    assert_eq!(seccomp.architectures, ["SCMP_ARCH_X86_64", "SCMP_ARCH_X32", "SCMP_ARCH_MIPS64N32"]);
    assert_eq!(seccomp.flags, ["SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]);
    let call = &seccomp.syscalls[0];
    assert_eq!(
        (call.names[0].as_str(), call.action.as_str(), call.errnoret),
        ("clone", "SCMP_ACT_ALLOW", 38)
    );
    let arg = &call.args[0];
    assert_eq!((arg.index, arg.value, arg.value_two, arg.op.as_str()), (2, 3, 4, "SCMP_CMP_MASKED_EQ"));
}
