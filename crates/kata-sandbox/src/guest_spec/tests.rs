use serde_json::{Value, json};

use super::*;

/// A specification as containerd writes it for a CRI container, in the parts that matter here.
fn containerd_spec() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "root": {"path": "rootfs", "readonly": true},
        "process": {
            "args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0},
            "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "system_u:system_r:container_t:s0"
        },
        "hooks": {"prestart": [{"path": "/usr/bin/nvidia-container-runtime-hook"}]},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/kubelet/pods/p/etc-hosts",
             "options": ["rbind", "rprivate", "rw"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/run/containerd/s/shm", "options": ["rbind", "ro"]},
            {"destination": "/data", "source": "/srv/data", "options": ["bind", "ro", "rslave"]},
            {"destination": "/host/sys", "type": "bind", "source": "/sys/kernel", "options": ["rbind"]}
        ],
        "linux": {
            "cgroupsPath": "kubepods-besteffort.slice:cri-containerd:abc",
            "mountLabel": "system_u:object_r:container_file_t:s0",
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}],
                "cpu": {"shares": 2, "cpus": "0-63", "mems": "1"},
                "blockIO": {"weight": 10}
            },
            "namespaces": [
                {"type": "pid"}, {"type": "mount"},
                {"type": "ipc", "path": "/proc/4711/ns/ipc"}, {"type": "uts", "path": "/proc/4711/ns/uts"},
                {"type": "network", "path": "/var/run/netns/cni-1"}
            ],
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1}
        }
    })
}

fn translated(spec: Value) -> Result<GuestSpec, GuestSpecError> {
    translate("web", serde_json::from_value(spec).unwrap(), false)
}

#[test]
fn what_belongs_to_the_host_does_not_reach_the_guest() {
    let guest = translated(containerd_spec()).unwrap();
    let spec = serde_json::to_value(&guest.spec).unwrap();
    assert_eq!(spec["root"]["path"], "/run/kata-containers/shared/containers/web/rootfs");
    assert_eq!(spec["root"]["readonly"], true);
    assert_eq!(spec["linux"]["cgroupsPath"], "/web");
    for gone in ["/hooks", "/process/apparmorProfile", "/process/selinuxLabel", "/linux/mountLabel"] {
        assert_eq!(spec.pointer(gone), None, "{gone}");
    }
    let namespaces = json!([{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]);
    assert_eq!(spec["linux"]["namespaces"], namespaces);
    let resources = &spec["linux"]["resources"];
    assert_eq!(resources["devices"][0]["access"], "rwm");
    assert_eq!(resources["cpu"], json!({"shares": 2}));
    assert_eq!(resources["blockIO"], json!({"weight": 10}));
    assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
}

#[test]
fn bind_mounts_are_volumes_that_are_placed_later() {
    let mut guest = translated(containerd_spec()).unwrap();
    let volume = |source: &str, mount, readonly, follows_host| Volume {
        source: source.into(),
        mount,
        readonly,
        follows_host,
    };
    let hosts = volume("/var/lib/kubelet/pods/p/etc-hosts", 1, false, false);
    assert_eq!(guest.volumes, [hosts.clone(), volume("/srv/data", 3, true, true)]);
    guest.place(&hosts, "/somewhere".into());
    let spec = serde_json::to_value(&guest.spec).unwrap();
    let mounts = &spec["mounts"];
    assert_eq!((&mounts[1]["source"], &mounts[1]["type"]), (&json!("/somewhere"), &json!("bind")));
    assert_eq!(mounts[4]["source"], "/sys/kernel");
}

#[test]
fn direct_volumes_by_type_are_volumes_too() {
    let mut spec = containerd_spec();
    spec["mounts"] =
        json!([{"destination": "/v", "type": "directvol", "source": "/csi/v", "options": ["rw"]}]);
    let guest = translated(spec).unwrap();
    assert_eq!(
        guest.volumes.iter().map(|volume| volume.source.as_path()).collect::<Vec<_>>(),
        [Path::new("/csi/v")]
    );
}

#[test]
fn mounts_that_should_reach_the_host_are_refused_by_name() {
    let mut spec = containerd_spec();
    spec["mounts"][1]["options"] = json!(["rbind", "rshared"]);
    let error = translated(spec).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unimplemented);
    assert!(error.to_string().contains("Bidirectional"), "{error}");
}

#[test]
fn bound_shared_memory_is_the_pods() {
    let guest = translated(containerd_spec()).unwrap();
    let mounts = serde_json::to_value(&guest.spec).unwrap()["mounts"].take();
    let expected = json!({"destination": "/dev/shm", "type": "bind", "options": ["rbind", "ro"],
        "source": "/run/kata-containers/sandbox/shm"});
    assert_eq!(mounts[2], expected);
    assert_eq!(guest.shm.unwrap(), Path::new("/run/containerd/s/shm"));

    let mut private = containerd_spec();
    private["mounts"] =
        json!([{"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=1m"]}]);
    let guest = translated(private.clone()).unwrap();
    assert_eq!(serde_json::to_value(&guest.spec).unwrap()["mounts"], private["mounts"]);
    assert_eq!(guest.shm, None);
}

#[test]
fn root_can_be_elsewhere() {
    let mut guest = translated(containerd_spec()).unwrap();
    assert!(guest.root_readonly());
    guest.set_root("/run/kata-containers/web/rootfs", false);
    assert_eq!(guest.spec.root().as_ref().unwrap().path(), Path::new("/run/kata-containers/web/rootfs"));
    assert!(!guest.root_readonly());
}

#[test]
fn seccomp_can_be_switched_off() {
    let spec = serde_json::from_value(containerd_spec()).unwrap();
    let guest = translate("web", spec, true).unwrap();
    assert!(guest.spec.linux().as_ref().unwrap().seccomp().is_none());
}

#[test]
fn pid_namespace_to_join_is_named_and_not_told_to_the_guest() {
    let mut spec = containerd_spec();
    spec["linux"]["namespaces"][0]["path"] = json!("/proc/4711/ns/pid");
    let given: Spec = serde_json::from_value(spec.clone()).unwrap();
    assert_eq!(pid_namespace(&given), Some(Path::new("/proc/4711/ns/pid")));
    let guest = translated(spec).unwrap();
    assert_eq!(pid_namespace(&guest.spec), None);
}

#[test]
fn namespaces_of_the_host_are_refused_with_what_to_change() {
    for (kind, pod_field) in [("pid", "hostPID"), ("ipc", "hostIPC")] {
        let mut spec = containerd_spec();
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != kind);
        let error = translated(spec).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unimplemented, "{kind}");
        assert!(error.to_string().contains(pod_field), "{error}");
    }
}

#[test]
fn specification_without_a_process_is_refused() {
    let mut spec = containerd_spec();
    spec.as_object_mut().unwrap().remove("process");
    let error = translated(spec).unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string()),
        (ErrorKind::InvalidArgument, "the specification has no process".to_owned())
    );
}
