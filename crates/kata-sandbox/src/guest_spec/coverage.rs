//! [`FIELDS`] against the specification and against the translation.

use std::collections::BTreeSet;

use protobuf::MessageDyn;
use serde_json::{Map, Value, json};

use super::fields::{DROPPED, FIELDS, Fate, Field, REFUSED};
use super::*;

/// A specification in which no field is left out, but for those of other platforms.
fn full() -> Value {
    let hooks =
        |name: &str| json!([{"path": format!("/{name}"), "args": [name], "env": ["A=b"], "timeout": 3}]);
    let mappings = json!([{"hostID": 100_000, "containerID": 1, "size": 65536}]);
    json!({
        "ociVersion": "1.3.0",
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "web", "domainname": "example.org", "annotations": {"a": "b"},
        "mounts": [{"destination": "/data", "source": "/srv", "type": "bind", "options": ["rbind"],
                    "uidMappings": mappings, "gidMappings": mappings}],
        "process": {
            "terminal": true, "consoleSize": {"height": 24, "width": 80},
            "user": {"uid": 7, "gid": 8, "umask": 63, "additionalGids": [9], "username": "seven"},
            "args": ["sh"], "commandLine": "sh.exe", "env": ["A=b"], "cwd": "/tmp",
            "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "inheritable": ["CAP_CHOWN"],
                             "permitted": ["CAP_CHOWN"], "ambient": ["CAP_CHOWN"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2, "soft": 1}], "noNewPrivileges": true,
            "apparmorProfile": "cri-containerd.apparmor.d", "oomScoreAdj": 5, "selinuxLabel": "a:b:c:s0",
            "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4},
            "scheduler": {"policy": "SCHED_OTHER", "nice": 1, "priority": 1, "flags": ["SCHED_FLAG_RECLAIM"],
                          "runtime": 1, "deadline": 2, "period": 3},
            "execCPUAffinity": {"initial": "0", "final": "1"}
        },
        "hooks": {"prestart": hooks("prestart"), "createRuntime": hooks("createRuntime"),
                  "createContainer": hooks("createContainer"), "startContainer": hooks("startContainer"),
                  "poststart": hooks("poststart"), "poststop": hooks("poststop")},
        "linux": linux(&mappings)
    })
}

fn linux(mappings: &Value) -> Value {
    let throttle = json!([{"major": 8, "minor": 1, "rate": 5}]);
    json!({
        "netDevices": {"eth0": {"name": "eth1"}},
        "uidMappings": mappings, "gidMappings": mappings, "sysctl": {"net.ipv4.ip_forward": "1"},
        "resources": {
            "devices": [{"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"}],
            "memory": {"limit": 5, "reservation": 4, "swap": 6, "kernel": 1, "kernelTCP": 1, "swappiness": 1,
                       "disableOOMKiller": true, "useHierarchy": true, "checkBeforeUpdate": true},
            "cpu": {"shares": 2, "quota": 3, "idle": 1, "burst": 1, "period": 4, "realtimeRuntime": 1,
                    "realtimePeriod": 1, "cpus": "0-1", "mems": "0"},
            "pids": {"limit": 9},
            "blockIO": {"weight": 10, "leafWeight": 11,
                        "weightDevice": [{"major": 8, "minor": 1, "weight": 2, "leafWeight": 3}],
                        "throttleReadBpsDevice": throttle, "throttleWriteBpsDevice": throttle,
                        "throttleReadIOPSDevice": throttle, "throttleWriteIOPSDevice": throttle},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4}],
            "network": {"classID": 1, "priorities": [{"name": "eth0", "priority": 1}]},
            "rdma": {"mlx": {"hcaHandles": 1, "hcaObjects": 2}},
            "unified": {"memory.oom.group": "1"}
        },
        "cgroupsPath": "/kubepods/a",
        "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc", "path": "/proc/2/ns/ipc"}, {"type": "uts"}],
        "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 1, "gid": 2}],
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "architectures": ["SCMP_ARCH_X86_64"],
                    "flags": ["SECCOMP_FILTER_FLAG_LOG"], "listenerPath": "/l", "listenerMetadata": "m",
                    "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
                                  "args": [{"index": 1, "value": 2, "valueTwo": 3, "op": "SCMP_CMP_MASKED_EQ"}]}]},
        "rootfsPropagation": "rslave", "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"],
        "mountLabel": "a:b:c:s1",
        "intelRdt": {"closID": "c", "schemata": ["L3:0=f"], "l3CacheSchema": "L3:0=f", "memBwSchema": "MB:0=20",
                     "enableCmt": true, "enableMbm": true, "enableMonitoring": true},
        "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]},
        "personality": {"domain": "LINUX32", "flags": ["A"]},
        "timeOffsets": {"boottime": {"secs": 1, "nanosecs": 2}}
    })
}

/// The parts for other platforms, in the least that makes them.
fn foreign() -> [(&'static str, Value); 4] {
    [
        ("solaris", json!({"milestone": "m"})),
        ("windows", json!({"layerFolders": ["c"]})),
        ("vm", json!({"kernel": {"path": "/k"}})),
        ("zos", json!({"namespaces": []})),
    ]
}

/// Objects whose keys are the user's.
const MAPS: [&str; 6] = [
    "annotations",
    "linux.netDevices",
    "linux.sysctl",
    "linux.resources.rdma",
    "linux.resources.unified",
    "linux.timeOffsets",
];

fn leaves(value: &Value, path: &str, into: &mut BTreeSet<String>) {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match value {
        Value::Object(fields) if !MAPS.contains(&path) => {
            fields.iter().for_each(|(key, value)| leaves(value, &below(key), into));
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            items.iter().for_each(|item| leaves(item, &format!("{path}[]"), into));
        }
        _ => {
            into.insert(path.to_owned());
        }
    }
}

/// Whether a row is about this field, or about one that it is part of.
fn covers(row: &Field, leaf: &str) -> bool {
    let row = row.path.trim_end_matches("[]");
    leaf.strip_prefix(row).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// The row that speaks of a field: the most exact one.
fn row_of(leaf: &str) -> Option<&'static Field> {
    FIELDS.iter().filter(|row| covers(row, leaf)).max_by_key(|row| row.path.len())
}

/// Applies `change` to what is at `path`: the object that has it, and its key.
fn at(value: &mut Value, path: &str, change: &mut dyn FnMut(&mut Map<String, Value>, &str)) {
    let path = path.trim_end_matches("[]");
    let (head, rest) = path.split_once('.').map_or((path, None), |(head, rest)| (head, Some(rest)));
    let key = head.trim_end_matches("[]");
    match (rest, value) {
        (None, Value::Object(fields)) => change(fields, key),
        (Some(rest), Value::Object(fields)) => match fields.get_mut(key) {
            Some(Value::Array(items)) => items.iter_mut().for_each(|item| at(item, rest, change)),
            Some(value) => at(value, rest, change),
            None => {}
        },
        _ => {}
    }
}

fn without(mut spec: Value, path: &str) -> Value {
    at(&mut spec, path, &mut |fields, key| drop(fields.remove(key)));
    spec
}

/// The full specification without what is refused.
fn accepted() -> Value {
    let refused = FIELDS.iter().filter(|row| matches!(row.fate, Fate::Refused(_)));
    refused.fold(full(), |spec, row| without(spec, row.path))
}

/// Other values than those that are there, of the same types; of a list of several, all but the last.
fn altered(value: &mut Value) {
    match value {
        Value::Bool(it) => *it = !*it,
        Value::Number(it) => *value = json!(it.as_i64().unwrap_or_default() + 1),
        Value::String(it) => it.push('x'),
        // Without one of some there is still what the others stand for.
        Value::Array(items) if items.len() > 1 => drop(items.pop()),
        Value::Array(items) => items.iter_mut().for_each(altered),
        Value::Object(fields) => fields.values_mut().for_each(altered),
        Value::Null => {}
    }
}

fn on_the_wire(spec: Value) -> Result<Box<dyn MessageDyn>, String> {
    let spec: Spec = serde_json::from_value(spec).map_err(|error| format!("not a specification: {error}"))?;
    let guest = translate("web", spec, false).map_err(|error| error.to_string())?;
    Ok(Box::new(crate::spec::spec(&guest.spec)))
}

fn text(spec: Value) -> String {
    // A map has no order of its own; there is one key in each.
    format!("{:?}", on_the_wire(spec).unwrap())
}

#[test]
fn every_field_of_the_specification_has_a_row_and_every_row_a_field() {
    let spec: Spec = serde_json::from_value(full()).unwrap();
    let told = format!("{spec:?}");
    // What the library knows and is not filled here shows. Empty are namespaces without a path, what is for other platforms,
    // and mappings of the whole that the library has and the specification never had.
    let empty = told.replace("path: None", "").matches("None").count();
    assert_eq!(empty, foreign().len() + ["uid_mappings", "gid_mappings"].len(), "{told}");
    assert!(!told.contains("[]") && !told.contains("{}"), "{told}");
    let mut fields = BTreeSet::new();
    leaves(&serde_json::to_value(&spec).unwrap(), "", &mut fields);
    let missing: Vec<_> = fields.iter().filter(|leaf| row_of(leaf).is_none()).collect();
    assert!(missing.is_empty(), "{missing:?}");
    fields.extend(foreign().map(|(platform, _)| platform.to_owned()));
    for row in FIELDS {
        assert!(fields.iter().any(|leaf| row_of(leaf).is_some_and(|it| it.path == row.path)), "{}", row.path);
    }
}

#[test]
fn what_the_guest_carries_out_is_told_to_it() {
    let whole = text(accepted());
    for row in FIELDS.iter().filter(|row| matches!(row.fate, Fate::Guest(_))) {
        let mut less = without(accepted(), row.path);
        if on_the_wire(less.clone()).is_err() {
            // It cannot be absent: something else in its place must make the difference.
            less = accepted();
            at(&mut less, row.path, &mut |fields, key| fields.get_mut(key).into_iter().for_each(altered));
        }
        assert_ne!(text(less), whole, "{}", row.path);
    }
}

#[test]
fn what_means_nothing_in_the_guest_is_not_told_to_it() {
    let whole = text(accepted());
    for row in FIELDS.iter().filter(|row| matches!(row.fate, Fate::Meaningless(_))) {
        assert_eq!(text(without(accepted(), row.path)), whole, "{}", row.path);
    }
}

#[test]
fn each_field_that_is_refused_is_refused_by_its_name() {
    on_the_wire(accepted()).unwrap();
    for row in FIELDS.iter().filter(|row| matches!(row.fate, Fate::Refused(_))) {
        let mut given = None;
        at(&mut full(), row.path, &mut |fields, key| given = fields.remove(key));
        let given = given
            .or_else(|| foreign().into_iter().find_map(|(key, value)| (key == row.path).then_some(value)));
        let mut spec = accepted();
        make_way(&mut spec, row.path);
        at(&mut spec, row.path, &mut |fields, key| {
            drop(fields.insert(key.to_owned(), given.clone().unwrap()))
        });
        let error = on_the_wire(spec).unwrap_err();
        let name = row.path.trim_end_matches("[]").replace("gidMappings", "uidMappings");
        let error = error.replace("gidMappings", "uidMappings");
        assert!(error.starts_with(&format!("{name} is not supported: ")), "{}: {error}", row.path);
    }
}

/// Makes the objects on the way that nothing accepted is in.
fn make_way(spec: &mut Value, path: &str) {
    let parents: Vec<&str> = path.split('.').collect();
    let Some((_, parents)) = parents.split_last() else { return };
    let mut place = spec;
    for key in parents {
        if key.ends_with("[]") {
            return;
        }
        let fields = place.as_object_mut().unwrap();
        place = fields.entry(*key).or_insert_with(|| json!({}));
    }
}

#[test]
fn every_test_that_a_row_names_exists() {
    let code = kata_testkit::code();
    for row in FIELDS {
        assert!(code.contains(&format!("fn {}(", row.test)), "{}: {}", row.path, row.test);
        match row.fate {
            Fate::Meaningless(why) => assert!(row.test == DROPPED && !why.is_empty(), "{}", row.path),
            Fate::Refused(why) => assert!(row.test == REFUSED && !why.is_empty(), "{}", row.path),
            Fate::Guest(_) | Fate::Host(_) => {}
        }
    }
}
