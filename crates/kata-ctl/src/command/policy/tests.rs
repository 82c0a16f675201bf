use kata_policy::{Policy, Request};
use serde_json::{Value, json};

use super::rego::Wishes;
use super::*;

const POD: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: { name: web }
spec:
  template:
    spec:
      securityContext: { runAsUser: 1000, runAsGroup: 1000 }
      volumes:
        - { name: data, emptyDir: {} }
        - { name: config, configMap: { name: c } }
        - { name: kernel, hostPath: { path: /sys/kernel } }
      initContainers:
        - { name: init, image: "registry.example/tools@sha256:00", args: ["prepare", "$(SECRET)"], env: [{ name: SECRET, valueFrom: { secretKeyRef: { name: s, key: k } } }] }
      containers:
        - name: web
          image: nginx
          command: ["/bin/web", "--greeting=$(GREETING)", "$$(HOME)"]
          env: [{ name: GREETING, value: hello }]
          volumeMounts:
            - { name: data, mountPath: /data/ }
            - { name: config, mountPath: /etc/web }
            - { name: claim, mountPath: /claim }
            - { name: kernel, mountPath: /kernel }
          volumeDevices: [{ name: raw, devicePath: /dev/raw }]
          securityContext: { allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: { add: [NET_ADMIN] } }
          livenessProbe: { exec: { command: [alive, "$(GREETING)"] } }
"#;

fn of(manifest: &str, wishes: Wishes) -> Policy {
    parsed(&written(manifest, wishes))
}

fn written(manifest: &str, wishes: Wishes) -> String {
    let containers = manifest::containers("pod.yaml", manifest).unwrap();
    rego::policy("pod.yaml", &containers, wishes).unwrap()
}

fn parsed(text: &str) -> Policy {
    Policy::parse("generated.rego", text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

const PLAIN: Wishes = Wishes { exec: false, logs: true, forward: false, host_rootfs: false };

fn allows(policy: &mut Policy, name: &str, input: Value) -> bool {
    policy.check(&Request { name: name.to_owned(), input }).is_ok()
}

/// Asserts that a request is denied by the rule of its name.
#[track_caller]
fn denied(policy: &mut Policy, name: &str, input: Value) {
    let request = Request { name: name.to_owned(), input };
    let error = policy.check(&request).expect_err(&request.input.to_string()).to_string();
    assert_eq!(error, format!("the policy denies {name}: rule agent_policy.{name} does not allow it"));
}

const GUEST: &str = "/run/kata-containers";

fn pull(image: &str) -> Value {
    json!({
        "driver": "image_guest_pull", "source": image, "fstype": "overlay", "options": [],
        "mount_point": "/run/kata-containers/c/rootfs",
        "driver_options": ["image_guest_pull={\"metadata\":{\"io.kubernetes.cri.container-type\":\"container\"}}"],
    })
}

fn storage(driver: &str, kind: &str, place: &str) -> Value {
    json!({ "driver": driver, "source": "", "fstype": kind, "mount_point": format!("{GUEST}/{place}"), "driver_options": [] })
}

fn bind(place: &str, source: &str) -> Value {
    json!({ "destination": place, "type_": "bind", "source": format!("{GUEST}/{source}"), "options": ["rbind"] })
}

/// The request for the container `web`, as this project's runtime makes it where nothing is shared.
fn web() -> Value {
    let kernel = |place: &str, kind: &str| json!({ "destination": place, "type_": kind, "source": kind, "options": ["nosuid"] });
    json!({
        "container_id": "c",
        "devices": [{ "id": "02", "type_": "blk", "container_path": "/dev/raw" }],
        "storages": [
            storage("ephemeral", "tmpfs", "sandbox/shm"), pull("nginx"),
            storage("local", "", "sandbox/ephemeral/data"), storage("blk", "ext4", "sandbox/storage/L3Y="),
        ],
        "OCI": {
            "Process": {
                "Args": ["/bin/web", "--greeting=hello", "$(HOME)"],
                "Env": ["PATH=/usr/bin:/bin", "GREETING=hello", "KUBERNETES_PORT=1"],
                "User": { "UID": 1000, "GID": 1000, "AdditionalGids": [], "Username": "", "umask": null },
                "Cwd": "/",
                "NoNewPrivileges": true,
                "Terminal": false,
                "Capabilities": { "Bounding": ["CAP_CHOWN", "CAP_NET_ADMIN"], "Effective": [] },
            },
            "Root": { "Path": "/run/kata-containers/c/rootfs", "Readonly": true },
            "Mounts": [
                kernel("/proc", "proc"), kernel("/dev", "tmpfs"), kernel("/sys/fs/cgroup", "cgroup"),
                bind("/dev/shm", "sandbox/shm"), bind("/etc/hosts", "c/volumes/3"),
                bind("/etc/resolv.conf", "shared/containers/.volumes/0"), bind("/etc/web", "c/volumes/0"),
                bind("/data", "sandbox/ephemeral/data"), bind("/claim", "sandbox/storage/L3Y="),
                { "destination": "/kernel", "type_": "bind", "source": "/sys/kernel", "options": ["rbind"] },
            ],
            "Hooks": null,
            "Annotations": { "io.kubernetes.cri.image-name": "docker.io/library/nginx:latest" },
        },
    })
}

/// The same with another value at a place.
fn web_with(place: &str, value: Value) -> Value {
    let mut request = web();
    *request.pointer_mut(place).unwrap() = value;
    request
}

#[track_caller]
fn created(policy: &mut Policy, request: Value) {
    let faults = policy.remark("faults", &Request { name: String::new(), input: request.clone() });
    assert!(allows(policy, "CreateContainerRequest", request), "{faults:?}");
}

#[test]
fn container_of_the_pod_is_created_and_any_other_is_not() {
    let mut policy = of(POD, PLAIN);
    created(&mut policy, web());
    for (place, value) in [
        ("/OCI/Process/Args/0", json!("/bin/sh")),
        ("/OCI/Process/Args", json!(["/bin/web", "--greeting=hello"])),
        ("/OCI/Process/Env", json!(["GREETING=hello", "GREETING=bye"])),
        ("/OCI/Process/Env", json!(["PATH=/bin"])),
        ("/OCI/Process/Env/0", json!("LD_PRELOAD=/x.so")),
        ("/OCI/Process/Env/0", json!("BASH_FUNC_ls%%=() { evil; }")),
        ("/OCI/Process/Env/0", json!("PATH=/bin:/etc/web")),
        ("/OCI/Process/Env/0", json!("PATH=/bin:")),
        ("/OCI/Process/Env/0", json!("PATH=/proc/self/root/etc/web")),
        ("/OCI/Process/Cwd", json!("/etc/web/bin")),
        ("/OCI/Process/Cwd", json!("/usr/../etc/web")),
        ("/OCI/Process/User/UID", json!(0)),
        ("/OCI/Process/User/GID", json!(0)),
        ("/OCI/Process/NoNewPrivileges", json!(false)),
        ("/OCI/Process/Capabilities/Effective", json!(["CAP_SYS_ADMIN"])),
        ("/OCI/Hooks", json!({ "StartContainer": [{ "Path": "/x" }] })),
        ("/devices/0/container_path", json!("/dev/other")),
        ("/container_id", json!("d")),
        ("/container_id", json!("../c")),
    ] {
        denied(&mut policy, "CreateContainerRequest", web_with(place, value));
    }
    denied(&mut policy, "CreateContainerRequest", json!({}));
}

#[test]
fn root_is_the_image_that_the_guest_pulls_and_nothing_that_the_host_has_brought() {
    let mut policy = of(POD, PLAIN);
    let mut evil = web_with("/storages/1", storage("local", "", "sandbox/ephemeral/data"));
    *evil.pointer_mut("/OCI/Root/Path").unwrap() = json!("/run/kata-containers/shared/containers/evil");
    denied(&mut policy, "CreateContainerRequest", evil);
    for (place, value) in [
        ("/OCI/Root/Readonly", json!(false)),
        ("/OCI/Root/Path", json!("/")),
        ("/OCI/Root/Path", json!("/run/kata-containers/c/volumes/0")),
        ("/OCI/Root/Path", json!("/run/kata-containers/shared/containers/c/rootfs")),
        ("/OCI/Root/Path", json!("/run/kata-containers/d/../c/rootfs")),
        ("/storages/1/source", json!("registry.example/evil")),
        ("/storages/1/driver", json!("overlayfs")),
        ("/storages/1/driver", json!("bind")),
        ("/storages/1/mount_point", json!("/run/kata-containers/d/rootfs")),
        ("/storages/0", pull("nginx")),
        ("/storages/0", pull("registry.example/evil")),
        (
            "/storages/1/driver_options",
            json!([
                "image_guest_pull={\"metadata\":{\"io.kubernetes.cri.container-type\":\"s\\u0061ndbox\"}}"
            ]),
        ),
        // Over the root that was pulled.
        ("/storages/2/mount_point", json!("/run/kata-containers/c/rootfs")),
        ("/storages", json!([])),
    ] {
        denied(&mut policy, "CreateContainerRequest", web_with(place, value));
    }
    created(&mut policy, web_with("/storages/1/source", json!("docker.io/library/nginx:latest")));
}

#[test]
fn image_with_a_digest_is_pulled_by_its_digest() {
    let pod = "kind: Pod\nspec: { containers: [{ name: c, image: 'nginx:1@sha256:12', command: [/c] }] }\n";
    let mut policy = of(pod, PLAIN);
    let request = |image: &str| {
        let mut request = web_with("/storages", json!([pull(image)]));
        *request.pointer_mut("/OCI/Process/Args").unwrap() = json!(["/c"]);
        *request.pointer_mut("/OCI/Process/Capabilities").unwrap() = Value::Null;
        *request.pointer_mut("/OCI/Mounts").unwrap() = json!([]);
        *request.pointer_mut("/devices").unwrap() = json!([]);
        request
    };
    for image in ["docker.io/library/nginx:1", "docker.io/library/nginx@sha256:13", "nginx"] {
        denied(&mut policy, "CreateContainerRequest", request(image));
    }
    for image in
        ["nginx:1@sha256:12", "docker.io/library/nginx:1@sha256:12", "docker.io/library/nginx@sha256:12"]
    {
        created(&mut policy, request(image));
    }
}

#[test]
fn capabilities_that_a_container_drops_it_may_not_have() {
    let of = |security: &str| {
        let pod = format!(
            "kind: Pod\nspec: {{ containers: [{{ name: c, image: i, securityContext: {{ {security} }} }}] }}\n"
        );
        manifest::containers("pod.yaml", &pod).unwrap().pop().unwrap().capabilities
    };
    assert_eq!(of("capabilities: { drop: [ALL], add: [net_raw] }"), Some(vec!["CAP_NET_RAW".to_owned()]));
    let fewer = of("capabilities: { drop: [CHOWN, CAP_KILL] }").unwrap();
    assert_eq!(fewer.len(), 12, "{fewer:?}");
    assert_eq!(of("privileged: true"), None);
}

#[test]
fn mounts_come_from_where_the_runtime_puts_the_volumes_of_the_pod() {
    let mut policy = of(POD, PLAIN);
    let good = web();
    let number = |place: &str| {
        let mounts = good["OCI"]["Mounts"].as_array().unwrap();
        mounts.iter().position(|mount| mount["destination"] == place).unwrap()
    };
    for (place, key, value) in [
        ("/data", "destination", json!("/bin")),
        ("/data", "source", json!("/run/kata-containers/c/volumes/0")),
        ("/data", "source", json!("/run/kata-containers/sandbox/ephemeral/other")),
        ("/data", "source", json!("/run/kata-containers/sandbox/ephemeral/data/../other")),
        ("/etc/web", "source", json!("/run/kata-containers/d/volumes/0")),
        ("/etc/web", "source", json!("/run/kata-containers/c/volumes/0/x")),
        ("/etc/web", "source", json!("/run/kata-containers/shared/containers/evil")),
        ("/etc/web", "source", json!("/run/measured-cfg")),
        ("/etc/web", "type_", json!("overlay")),
        ("/claim", "source", json!("/run/kata-containers/sandbox/storage/x/..")),
        ("/dev/shm", "source", json!("/run/kata-containers/c/volumes/0")),
        ("/kernel", "source", json!("/sys")),
        ("/proc", "type_", json!("overlay")),
        ("/proc", "options", json!(["bind"])),
    ] {
        let at = format!("/OCI/Mounts/{}/{key}", number(place));
        denied(&mut policy, "CreateContainerRequest", web_with(&at, value));
    }
    created(&mut policy, good);
}

#[test]
fn storage_is_what_a_volume_of_the_pod_needs() {
    let mut policy = of(POD, PLAIN);
    let with = |storage: Value| web_with("/storages/2", storage);
    for storage in [
        storage("blk", "ext4", "sandbox/disks/data"),
        storage("blk", "ext4", "sandbox/storage/b3RoZXI="),
        storage("blk", "ext4", "c/layers/0"),
        storage("ephemeral", "overlay", "sandbox/ephemeral/data"),
        storage("ephemeral", "tmpfs", "sandbox/ephemeral/other"),
        storage("local", "", "sandbox/ephemeral/data/../other"),
        storage("bind", "", "sandbox/ephemeral/data"),
        storage("virtio-fs", "virtiofs", "c/x"),
        storage("local", "", "shared/containers/x"),
    ] {
        denied(&mut policy, "CreateContainerRequest", with(storage));
    }
    let mut encrypted = storage("blk", "ext4", "sandbox/disks/data");
    encrypted["driver_options"] = json!(["encryption_key=ephemeral", "create_filesystem"]);
    for storage in [
        encrypted,
        storage("local", "", "sandbox/disks/data/files/part"),
        storage("ephemeral", "hugetlbfs", "sandbox/ephemeral/data"),
    ] {
        created(&mut policy, with(storage));
    }
}

#[test]
fn root_may_be_the_hosts_where_that_is_asked_for_and_the_policy_says_so() {
    let wishes = Wishes { host_rootfs: true, ..PLAIN };
    let text = written(POD, wishes);
    assert!(text.contains("#  - images: root file systems are the host's"), "{text}");
    let mut policy = parsed(&text);
    let mut shared = web_with("/storages", json!([storage("blk", "ext4", "sandbox/storage/L3Y=")]));
    *shared.pointer_mut("/OCI/Root/Path").unwrap() = json!("/run/kata-containers/shared/containers/c/rootfs");
    created(&mut policy, shared.clone());
    let mut layered = web_with(
        "/storages",
        json!([
            storage("blk", "erofs", "c/layers/0"),
            storage("ephemeral", "tmpfs", "c/scratch"),
            storage("overlayfs", "overlay", "c/rootfs")
        ]),
    );
    created(&mut policy, layered.clone());
    *layered.pointer_mut("/OCI/Annotations").unwrap() = json!({});
    denied(&mut policy, "CreateContainerRequest", layered);
    *shared.pointer_mut("/OCI/Root/Path").unwrap() = json!("/run/kata-containers/shared/containers/evil");
    denied(&mut policy, "CreateContainerRequest", shared);
}

#[test]
fn words_that_only_the_cluster_knows_may_be_any() {
    let mut policy = of(POD, PLAIN);
    let init = |args: Value| {
        let mut request = web_with("/OCI/Process/Args", args);
        *request.pointer_mut("/OCI/Root/Readonly").unwrap() = json!(false);
        *request.pointer_mut("/OCI/Process/Env").unwrap() = json!(["SECRET=x"]);
        *request.pointer_mut("/OCI/Process/Capabilities").unwrap() = Value::Null;
        *request.pointer_mut("/OCI/Mounts").unwrap() = json!([]);
        *request.pointer_mut("/devices").unwrap() = json!([]);
        *request.pointer_mut("/storages").unwrap() = json!([pull("registry.example/tools@sha256:00")]);
        request
    };
    assert!(allows(&mut policy, "CreateContainerRequest", init(json!(["/entry", "prepare", "hunter2"]))));
    assert!(!allows(&mut policy, "CreateContainerRequest", init(json!(["/entry", "other", "hunter2"]))));
    assert!(!allows(&mut policy, "CreateContainerRequest", init(json!(["hunter2"]))));
}

#[test]
fn pause_container_is_the_pods_own() {
    let mut policy = of(POD, PLAIN);
    let mut own = pull("pause");
    own["driver_options"] =
        json!(["image_guest_pull={\"metadata\":{\"io.kubernetes.cri.container-type\":\"sandbox\"}}"]);
    let mut pause = web_with("/OCI/Process/Args", json!(["/pause"]));
    *pause.pointer_mut("/OCI/Process/Capabilities/Bounding").unwrap() = json!([]);
    *pause.pointer_mut("/OCI/Mounts").unwrap() = json!([bind("/dev/shm", "sandbox/shm")]);
    *pause.pointer_mut("/OCI/Annotations").unwrap() = json!({});
    *pause.pointer_mut("/devices").unwrap() = json!([]);
    *pause.pointer_mut("/storages").unwrap() = json!([own]);
    for (place, value) in [
        ("/storages/0/source", json!("evil")),
        ("/storages/0/driver_options", json!([])),
        ("/storages/0/driver", json!("overlayfs")),
    ] {
        let mut other = pause.clone();
        *other.pointer_mut(place).unwrap() = value;
        denied(&mut policy, "CreateContainerRequest", other);
    }
    created(&mut policy, pause.clone());
    // The agent's own pause runs whatever is asked for.
    *pause.pointer_mut("/OCI/Process/Args").unwrap() = json!(["/other"]);
    pause["container_id"] = json!("p");
    pause["OCI"]["Root"]["Path"] = json!("/run/kata-containers/p/rootfs");
    pause["storages"][0]["mount_point"] = json!("/run/kata-containers/p/rootfs");
    created(&mut policy, pause.clone());
    let mut of_host = of(POD, Wishes { host_rootfs: true, ..PLAIN });
    pause["storages"] = json!([]);
    denied(&mut of_host, "CreateContainerRequest", pause.clone());
    *pause.pointer_mut("/OCI/Process/Args").unwrap() = json!(["/pause"]);
    created(&mut of_host, pause);
}

/// The request for a command in a container, with the rest of the process as [`web`] has it.
fn exec(container: &str, args: Value) -> Value {
    let mut process = web()["OCI"]["Process"].clone();
    process["Args"] = args;
    json!({ "container_id": container, "exec_id": "e", "string_user": null, "process": process })
}

#[test]
fn only_probes_are_executed_unless_everything_may_be() {
    let mut policy = of(POD, PLAIN);
    denied(&mut policy, "ExecProcessRequest", exec("c", json!(["alive", "hello"])));
    created(&mut policy, web());
    assert!(allows(&mut policy, "ExecProcessRequest", exec("c", json!(["alive", "hello"]))));
    denied(&mut policy, "ExecProcessRequest", exec("c", json!(["sh"])));
    denied(&mut policy, "WriteStreamRequest", json!({ "container_id": "c", "exec_id": "" }));
    assert!(allows(&mut policy, "ReadStreamRequest", json!({})));
    denied(&mut policy, "ForwardRequest", json!({}));
    let mut open = of(POD, Wishes { exec: true, logs: false, forward: true, ..PLAIN });
    assert!(allows(&mut open, "ExecProcessRequest", exec("c", json!(["sh"]))));
    assert!(allows(&mut open, "WriteStreamRequest", json!({})));
    assert!(!allows(&mut open, "ReadStreamRequest", json!({})));
    assert!(allows(&mut open, "ForwardRequest", json!({})));
}

#[test]
fn probe_is_a_process_like_its_container() {
    let mut policy = of(POD, PLAIN);
    created(&mut policy, web());
    for (place, value) in [
        (
            "/Env",
            json!(["PATH=/usr/bin:/bin", "GREETING=hello", "KUBERNETES_PORT=1", "LD_PRELOAD=/etc/web/x.so"]),
        ),
        ("/Env/0", json!("PATH=/etc/web")),
        ("/User/UID", json!(0)),
        ("/User/AdditionalGids", json!([0])),
        ("/Cwd", json!("/etc/web")),
        ("/Terminal", json!(true)),
        ("/NoNewPrivileges", json!(false)),
        ("/Capabilities/Effective", json!(["CAP_SYS_ADMIN"])),
    ] {
        let mut request = exec("c", json!(["alive", "hello"]));
        *request.pointer_mut(&format!("/process{place}")).unwrap() = value;
        denied(&mut policy, "ExecProcessRequest", request);
    }
    let mut fewer = exec("c", json!(["alive", "hello"]));
    fewer["process"]["Capabilities"] = Value::Null;
    assert!(allows(&mut policy, "ExecProcessRequest", fewer));
}

#[test]
fn probe_of_one_container_is_not_run_in_another_whatever_its_id_was_before() {
    let pod = "kind: Pod\nspec:\n  containers:\n    - { name: a, image: i, command: [/a], livenessProbe: { exec: { command: [pa] } } }\n    \
               - { name: b, image: i, command: [/b], stdin: true }\n";
    let mut policy = of(pod, PLAIN);
    let of = |id: &str, program: &str| {
        let mut request = web_with("/OCI/Process/Args", json!([program]));
        let mut storage = pull("i");
        storage["mount_point"] = json!(format!("/run/kata-containers/{id}/rootfs"));
        request["OCI"]["Root"]["Path"] = storage["mount_point"].clone();
        request["OCI"]["Process"]["Capabilities"] = Value::Null;
        (request["storages"], request["devices"]) = (json!([storage]), json!([]));
        (request["OCI"]["Mounts"], request["container_id"]) = (json!([]), json!(id));
        request
    };
    let probe = |id: &str| {
        let mut request = exec(id, json!(["pa"]));
        request["process"]["Capabilities"] = Value::Null;
        request
    };
    created(&mut policy, of("a", "/a"));
    created(&mut policy, of("b", "/b"));
    assert!(allows(&mut policy, "ExecProcessRequest", probe("a")));
    denied(&mut policy, "ExecProcessRequest", probe("b"));
    denied(&mut policy, "ExecProcessRequest", probe("none"));
    // The agent would refuse it, for the id is taken: what is remembered stays.
    denied(&mut policy, "CreateContainerRequest", of("b", "/a"));
    denied(&mut policy, "ExecProcessRequest", probe("b"));
    // A try that failed is made again.
    created(&mut policy, of("b", "/b"));
    let input = |id: &str, exec: &str| json!({ "container_id": id, "exec_id": exec, "len": 0 });
    assert!(allows(&mut policy, "WriteStreamRequest", input("b", "")));
    denied(&mut policy, "WriteStreamRequest", input("b", "e"));
    denied(&mut policy, "WriteStreamRequest", input("a", ""));
}

#[test]
fn files_are_copied_beside_containers_and_not_into_them() {
    let mut policy = of(POD, PLAIN);
    let copy = |path: &str, mode: u32, link: &str| json!({ "path": format!("{GUEST}/{path}"), "file_mode": mode, "symlink_src": link });
    for (path, mode, link) in [
        ("c/volumes/3", 0o100_644, ""),
        ("c/volumes/0", 0o042_777, ""),
        ("c/volumes/0/..2026_11_29", 0o040_755, ""),
        ("c/volumes/0/..2026_11_29/key", 0o100_400, ""),
        ("c/volumes/0/..data", 0o120_777, "..2026_11_29"),
        ("c/volumes/0/key", 0o120_777, "..data/key"),
    ] {
        assert!(allows(&mut policy, "CopyFileRequest", copy(path, mode, link)), "{path}");
    }
    for (path, mode, link) in [
        ("shared/containers/evil/bin/sh", 0o100_644, ""),
        ("shared/containers/c/rootfs/bin/sh", 0o100_644, ""),
        ("shared/volumes/0", 0o100_644, ""),
        ("image/volumes/0", 0o100_644, ""),
        ("sandbox/ephemeral/data/x", 0o100_644, ""),
        ("c/rootfs/bin/sh", 0o100_644, ""),
        ("c/volumes/../rootfs/x", 0o100_644, ""),
        ("c/volumes/0/../../rootfs/x", 0o100_644, ""),
        ("c/volumes/x", 0o100_644, ""),
        ("c/volumes", 0o040_755, ""),
        ("../../etc/passwd", 0o100_644, ""),
        ("c/volumes/0/x", 0o100_755, ""),
        ("c/volumes/0/x", 0o104_644, ""),
        ("c/volumes/0/x", 0o020_644, ""),
        ("c/volumes/0/x", 0o644, ""),
        ("c/volumes/0", 0o120_777, "1"),
        ("c/volumes/0/x", 0o120_777, "/etc"),
        ("c/volumes/0/x", 0o120_777, "../../rootfs"),
    ] {
        denied(&mut policy, "CopyFileRequest", copy(path, mode, link));
    }
    let remove = |path: &str| json!({ "path": format!("{GUEST}/{path}") });
    assert!(allows(&mut policy, "RemoveRequest", remove("c/volumes")));
    assert!(allows(&mut policy, "RemoveRequest", remove("c/volumes/0/..2026_11_29")));
    for path in
        ["c", "c/rootfs", "c/rootfs/etc", "shared/containers/c", "image/volumes", "c/volumes/../rootfs"]
    {
        denied(&mut policy, "RemoveRequest", remove(path));
    }
}

#[test]
fn sandbox_has_the_share_and_nothing_else_of_the_hosts() {
    let mut policy = of(POD, PLAIN);
    denied(&mut policy, "SetPolicyRequest", json!({}));
    let sandbox = |hooks: &str, storages: Value| json!({ "guest_hook_path": hooks, "kernel_modules": [], "storages": storages });
    assert!(allows(&mut policy, "CreateSandboxRequest", sandbox("", json!([]))));
    let share = storage("virtio-fs", "virtiofs", "shared/containers");
    assert!(allows(&mut policy, "CreateSandboxRequest", sandbox("", json!([share]))));
    denied(&mut policy, "CreateSandboxRequest", sandbox("/x", json!([])));
    let over = storage("virtio-fs", "virtiofs", "c/rootfs");
    denied(&mut policy, "CreateSandboxRequest", sandbox("", json!([over])));
}

#[test]
fn policy_says_at_its_head_what_it_does_not_hold() {
    let text = written(POD, PLAIN);
    let head: Vec<&str> = text.lines().take_while(|line| line.starts_with('#')).collect();
    for note in [
        "#  - what is in config maps, secrets, tokens, /etc/hosts and the like, and in claims, is the host's word",
        "#  - init: its command line may begin with anything: only args are given",
        "#  - web: its image has no digest: what the name stands for is the registry's word",
    ] {
        assert!(head.contains(&note), "{head:#?}");
    }
    assert!(!text.contains("init: its image has no digest"), "{text}");
    let scripts = "kind: Pod\nspec:\n  volumes: [{ name: s, configMap: { name: s, defaultMode: 0755 } }]\n  containers:\n    \
                   - { name: c, image: i, volumeMounts: [{ name: s, mountPath: /s }] }\n";
    assert!(written(scripts, PLAIN).contains("#  - c: volume s has executable files"));
}

#[test]
fn policy_tells_what_keeps_a_request_from_being_a_container() {
    let mut policy = of(POD, PLAIN);
    let request = Request {
        name: "CreateContainerRequest".to_owned(),
        input: web_with("/OCI/Root/Readonly", json!(false)),
    };
    let faults = policy.remark("faults", &request).unwrap();
    let of_web: Vec<&Value> =
        faults.as_array().unwrap().iter().filter(|fault| fault["container"] == "web").collect();
    assert_eq!(
        of_web,
        [
            &json!({ "container": "web", "what": "its root is not the image that it pulls, is somewhere else, or can be written to" })
        ]
    );
}

#[test]
fn manifest_without_one_pod_is_refused_with_what_it_has() {
    let fault = |text: &str| manifest::containers("x.yaml", text).unwrap_err().to_string();
    assert_eq!(fault("kind: Service\n"), "x.yaml has no pod and nothing that makes pods");
    let pod = "kind: Pod\nmetadata: { name: N }\nspec: { containers: [] }\n";
    assert_eq!(
        fault(&format!("{}---\n{}", pod.replace('N', "a"), pod.replace('N', "b"))),
        "x.yaml has 2 pods, Pod a, Pod b: a policy is for one, so give one alone"
    );
    assert!(fault("a: [").contains("x.yaml is not YAML"));
    assert_eq!(fault(&pod.replace("[]", "[{ name: c }]")), "container c: it has no image");
    let odd = pod.replace("[]", "[{ name: c, command: 1 }]");
    assert_eq!(fault(&odd), "container c: command is not a list of strings");
    assert_eq!(fault(&pod.replace("[]", "[{ image: c }]")), "a container: it has no name");
}

#[test]
fn bundle_is_the_container_that_it_describes() {
    let spec: oci_spec::runtime::Spec = serde_json::from_value(json!({
        "ociVersion": "1.2.0", "hostname": "web", "root": { "path": "rootfs", "readonly": true },
        "mounts": [
            { "destination": "/data", "type": "bind", "source": "/d" },
            { "destination": "/scratch", "type": "bind", "source": "/k/volumes/kubernetes.io~empty-dir/tmp" },
            { "destination": "/layers", "type": "overlay", "source": "overlay", "options": ["lowerdir=/d"] },
            { "destination": "/run", "type": "tmpfs", "source": "tmpfs" },
        ],
        "process": {
            "cwd": "/", "args": ["sleep", "1"], "env": ["A=1", "HOSTNAME=web"], "user": { "uid": 5, "gid": 5 },
            "capabilities": { "bounding": ["CAP_CHOWN"] },
        },
    }))
    .unwrap();
    let container = Container::of_spec(&spec);
    assert_eq!(container.command, Some(vec![Some("sleep".to_owned()), Some("1".to_owned())]));
    assert_eq!((container.env, container.uid), (vec!["A=1".to_owned()], Some(5)));
    assert_eq!((container.capabilities, container.read_only), (Some(vec!["CAP_CHOWN".to_owned()]), true));
    let sources =
        |place: &str| container.mounts.get(place).into_iter().flatten().cloned().collect::<Vec<_>>();
    assert_eq!(sources("/data"), ["volume"]);
    assert_eq!(sources("/scratch"), ["emptyDir:tmp"]);
    assert_eq!(sources("/run"), ["kernel:tmpfs"]);
    assert_eq!(sources("/layers"), Vec::<String>::new());
    assert_eq!(container.notes.len(), 1, "{:?}", container.notes);
}
