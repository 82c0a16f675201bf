//! What a container may do: each part of its security context, seen from within.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt;

use kata_testkit::containerd::{self, Containerd, Version};
use kata_testkit::cri::{self, Cri, api};
use kata_testkit::host::{stderr, stdout};
use serde_json::{Value, json};

#[test]
fn security_context_of_a_container_is_in_force() {
    containerd::with(Version::V1, by_specification);
}

#[test]
fn names_limits_and_hooks_of_a_specification_reach_the_guest() {
    containerd::with(Version::V1, names_limits_and_hooks);
}

#[test]
fn security_contexts_of_a_pod_are_in_force() {
    cri::with(Version::V2, security_contexts);
}

/// What `ctr` would make, with a shell script as its command.
fn specification(rig: &Containerd, script: &str) -> Value {
    let mut spec: Value = serde_json::from_str(&rig.ok(["oci", "spec"])).unwrap();
    spec["root"]["path"] = rig.unpacked_root().to_str().unwrap().into();
    spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
    spec["process"]["terminal"] = false.into();
    spec
}

#[track_caller]
fn run(rig: &Containerd, id: &str, spec: &Value) -> Result<String, String> {
    let file = rig.host().scratch("spec.json");
    std::fs::write(&file, spec.to_string()).unwrap();
    let output = rig.output(rig.run(&["--rm", "--config", file.to_str().unwrap(), id]));
    if output.status.success() { Ok(stdout(&output)) } else { Err(stdout(&output) + &stderr(&output)) }
}

fn by_specification(rig: &mut Containerd) {
    let script = "id -u; id -g; id -G; umask; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; \
        grep -E '^(CapBnd|CapEff|CapAmb|NoNewPrivs|Seccomp):' /proc/self/status; \
        touch /x 2>&1; touch /tmp/x && echo tmp; mkdir /tmp/d 2>&1; ls /masked; cat /masked-file; \
        echo x 2>&1 > /frozen/x; stat -c '%t:%T %a %u %F' /dev/own /dev/disk; head -c 0 /dev/null && echo null";
    let mut spec = specification(rig, script);
    let root = rig.unpacked_root();
    for dir in ["masked", "frozen"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::write(root.join("masked/secret"), "secret\n").unwrap();
    std::fs::write(root.join("masked-file"), "secret\n").unwrap();
    spec["root"]["readonly"] = true.into();
    let tmp = json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]});
    spec["mounts"].as_array_mut().unwrap().push(tmp);
    let caps = json!(["CAP_NET_BIND_SERVICE"]);
    let process = &mut spec["process"];
    process["user"] = json!({"uid": 7, "gid": 8, "additionalGids": [8, 9], "umask": 0o27});
    process["capabilities"] =
        json!({"bounding": caps, "effective": caps, "permitted": caps, "inheritable": caps, "ambient": caps});
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
    process["noNewPrivileges"] = true.into();
    process["oomScoreAdj"] = 77.into();
    // As the runtime gives them on hosts that have such; neither is known in the guest.
    process["apparmorProfile"] = "cri-containerd.apparmor.d".into();
    process["selinuxLabel"] = "system_u:system_r:container_t:s0".into();
    let linux = &mut spec["linux"];
    linux["maskedPaths"] = json!(["/masked", "/masked-file"]);
    linux["readonlyPaths"] = json!(["/frozen"]);
    linux["devices"] = json!([
        {"path": "/dev/own", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 8},
        {"path": "/dev/disk", "type": "b", "major": 240, "minor": 3, "fileMode": 0o600, "uid": 0, "gid": 0}
    ]);
    linux["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]});
    let told = run(rig, "secure", &spec).unwrap();
    let wanted = "7\n8\n8 9\n0027\n100\n200\n77\n\
        CapEff:\t0000000000000400\nCapBnd:\t0000000000000400\nCapAmb:\t0000000000000400\nNoNewPrivs:\t1\nSeccomp:\t2\n\
        touch: /x: Read-only file system\ntmp\nmkdir: can't create directory '/tmp/d': No space left on device\n\
        /bin/sh: can't create /frozen/x: Read-only file system\n1:5 640 7 character special file\nf0:3 600 0 block special file\nnull\n";
    assert_eq!(told, wanted);
    // What cannot be carried out is an error that names it, and the name is free again.
    spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    let refused = run(rig, "secure", &spec).unwrap_err();
    assert!(refused.contains("linux.personality is not supported"), "{refused}");
}

fn names_limits_and_hooks(rig: &mut Containerd) {
    let script = "hostname; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_forward; cat /tmp/hook; \
        cd /sys/fs/cgroup && cat pids.max memory.oom.group";
    let mut spec = specification(rig, script);
    let hook = rig.unpacked_root().join("hook");
    std::fs::write(
        &hook,
        "#!/bin/sh\necho $1 $A $(id -u) > /tmp/hook\ngrep -c '\"status\":\"created\"' >> /tmp/hook\n",
    )
    .unwrap();
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
    let groups =
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]});
    spec["mounts"].as_array_mut().unwrap().push(groups);
    spec["hostname"] = "box".into();
    spec["domainname"] = "example.org".into();
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
    spec["linux"]["resources"]["pids"] = json!({"limit": 99});
    // Kubernetes sets it for every container on hosts with control groups of version 2.
    spec["linux"]["resources"]["unified"] = json!({"memory.oom.group": "1"});
    let start = json!([{"path": "/hook", "args": ["hook", "one"], "env": ["A=b", "PATH=/bin:/usr/bin"]}]);
    spec["hooks"] = json!({"startContainer": start});
    let told = run(rig, "named", &spec).unwrap();
    assert_eq!(told, "box\nexample.org\n1\none b 0\n1\n99\n1\n");
    // A program of the host is none of the guest.
    spec["hooks"] = json!({"createContainer": [{"path": "/usr/bin/env-of-the-host"}]});
    let failed = run(rig, "named", &spec).unwrap_err();
    assert!(
        failed.contains("the hook /usr/bin/env-of-the-host") && failed.contains("No such file"),
        "{failed}"
    );
}

const STATUS: &str = "grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status | cut -f2 | tr '\\n' ' '";

fn security_contexts(cri: &mut Cri) {
    let privileged = |config: &mut api::PodSandboxConfig| {
        let linux = config.linux.mut_or_insert_default();
        linux.security_context.mut_or_insert_default().privileged = true;
    };
    let pod = cri.pod("secure").with(privileged).run();
    let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    // The CRI's defaults and RuntimeDefault; then one capability more and all others dropped.
    let plain = pod.container("plain").sh(STATUS).run().text();
    assert_eq!(plain, "00000000a80425fb 0 0 ");
    let default = |security: &mut api::LinuxContainerSecurityContext| {
        let profile = security.seccomp.mut_or_insert_default();
        profile.profile_type = api::ProfileType::PROFILE_RUNTIMEDEFAULT.into();
    };
    let told =
        pod.container("default").security(default).sh(&format!("{STATUS}; unshare -U true 2>&1")).run();
    assert!(told.stdout.starts_with("00000000a80425fb 0 2 "), "{told:?}");
    assert!(told.stdout.contains("Operation not permitted") && told.code != 0, "{told:?}");
    let narrow = pod.container("narrow").user(1000, 2000).security(|security| {
        let capabilities = security.capabilities.mut_or_insert_default();
        capabilities.drop_capabilities = words(&["ALL"]);
        capabilities.add_capabilities = words(&["NET_ADMIN"]);
        security.no_new_privs = true;
        security.readonly_rootfs = true;
        // fsGroup and the pod's groups come as these, whatever the policy.
        security.supplemental_groups = vec![3000, 4000];
    });
    let script = "grep -E '^(CapBnd|NoNewPrivs):' /proc/self/status | cut -f2 | tr '\\n' ' '; id -u; id -g; id -G; touch /x";
    let told = narrow.sh(script).run();
    assert_eq!(told.stdout, "0000000000001000 1 1000\n2000\n2000 3000 4000\n");
    assert!(told.stderr.contains("Read-only file system"), "{told:?}");
    localhost_profile(cri, &pod);
    // All of root's rights, and the guest's devices but none of the host.
    let script = "grep CapEff /proc/self/status | cut -f2; ls /dev | grep -c -E '^(loop|kvm|mem|vda)'; mount -t tmpfs none /mnt \
        && echo mounted; echo 1 > /proc/sys/vm/drop_caches && echo written";
    let told = pod.container("mighty").privileged().sh(&format!("mkdir -p /mnt; {script}")).run().stdout;
    let (caps, rest) = told.split_once('\n').unwrap();
    assert_eq!((u64::from_str_radix(caps, 16).unwrap() >> 21) & 1, 1, "CAP_SYS_ADMIN");
    assert_eq!(rest, "0\nmounted\nwritten\n");
    // procMount: Unmasked is no masked and no read-only paths.
    let look = "cat /proc/timer_list | head -c 1 | wc -c; echo 1 2>/dev/null > /proc/sys/vm/drop_caches && echo open || echo shut";
    let masked = |paths: &[&str]| {
        let paths = words(paths);
        move |security: &mut api::LinuxContainerSecurityContext| {
            security.masked_paths.clone_from(&paths);
            security.readonly_paths = paths.iter().map(|_| "/proc/sys".to_owned()).collect();
        }
    };
    assert_eq!(
        pod.container("masked").security(masked(&["/proc/timer_list"])).sh(look).run().stdout,
        "0\nshut\n"
    );
    assert_eq!(pod.container("unmasked").security(masked(&[])).sh(look).run().stdout, "1\nopen\n");
    pod.remove();
}

fn localhost_profile(cri: &Cri, pod: &cri::Pod<'_>) {
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]});
    let file = cri.host().scratch("profile.json");
    std::fs::write(&file, profile.to_string()).unwrap();
    let localhost = pod.container("localhost").security(|security| {
        let seccomp = security.seccomp.mut_or_insert_default();
        seccomp.profile_type = api::ProfileType::PROFILE_LOCALHOST.into();
        seccomp.localhost_ref = file.to_str().unwrap().to_owned();
    });
    let told = localhost.sh("mkdir /tmp/d").run();
    assert!(told.code == 1 && told.stderr.contains("No space left on device"), "{told:?}");
}
