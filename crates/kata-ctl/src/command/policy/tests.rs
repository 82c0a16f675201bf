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
      securityContext: { runAsUser: 1000 }
      initContainers:
        - { name: init, image: "registry.example/tools@sha256:00", args: ["prepare", "$(SECRET)"], env: [{ name: SECRET, valueFrom: { secretKeyRef: { name: s, key: k } } }] }
      containers:
        - name: web
          image: nginx
          command: ["/bin/web", "--greeting=$(GREETING)", "$$(HOME)"]
          env: [{ name: GREETING, value: hello }]
          volumeMounts: [{ name: data, mountPath: /data/ }]
          securityContext: { readOnlyRootFilesystem: true, capabilities: { add: [NET_ADMIN] } }
          livenessProbe: { exec: { command: [alive] } }
"#;

fn of(manifest: &str, wishes: Wishes) -> Policy {
    let containers = manifest::containers("pod.yaml", manifest).unwrap();
    let text = rego::policy("pod.yaml", &containers, wishes).unwrap();
    Policy::parse("generated.rego", &text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

const PLAIN: Wishes = Wishes { exec: false, logs: true, forward: false };

fn allows(policy: &mut Policy, name: &str, input: Value) -> bool {
    policy.check(&Request { name: name.to_owned(), input }).is_ok()
}

/// The request for the container `web`, as a runtime would make it.
fn web() -> Value {
    json!({
        "container_id": "c",
        "storages": [{ "driver": "overlayfs", "source": "none", "mount_point": "/run/kata-containers/shared/containers/c/rootfs" }],
        "OCI": {
            "Process": {
                "Args": ["/bin/web", "--greeting=hello", "$(HOME)"],
                "Env": ["PATH=/bin", "GREETING=hello", "KUBERNETES_PORT=1"],
                "User": { "UID": 1000 },
                "Capabilities": { "Bounding": ["CAP_CHOWN", "CAP_NET_ADMIN"], "Effective": [] },
            },
            "Root": { "Path": "/run/kata-containers/shared/containers/c/rootfs", "Readonly": true },
            "Mounts": [{ "destination": "/proc" }, { "destination": "/data" }],
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

#[test]
fn container_of_the_pod_is_created_and_any_other_is_not() {
    let mut policy = of(POD, PLAIN);
    assert!(
        allows(&mut policy, "CreateContainerRequest", web()),
        "{:?}",
        policy.remark("faults", &Request { name: String::new(), input: web() })
    );
    for (place, value) in [
        ("/OCI/Process/Args/0", json!("/bin/sh")),
        ("/OCI/Process/Args", json!(["/bin/web", "--greeting=hello"])),
        ("/OCI/Process/Env", json!(["GREETING=hello", "GREETING=bye"])),
        ("/OCI/Process/Env", json!(["PATH=/bin"])),
        ("/OCI/Process/Env", json!(["GREETING=hello", "LD_PRELOAD=/x.so"])),
        ("/OCI/Process/User/UID", json!(0)),
        ("/OCI/Process/Capabilities/Effective", json!(["CAP_SYS_ADMIN"])),
        ("/OCI/Root/Readonly", json!(false)),
        ("/OCI/Root/Path", json!("/")),
        ("/OCI/Root/Path", json!("/run/kata-containers/../../etc")),
        ("/OCI/Mounts/1/destination", json!("/bin")),
        ("/OCI/Hooks", json!({ "StartContainer": [{ "Path": "/x" }] })),
        ("/OCI/Annotations", json!({ "io.kubernetes.cri.image-name": "docker.io/library/other:latest" })),
        ("/storages/0/mount_point", json!("/usr")),
        ("/storages/0/driver", json!("image_guest_pull")),
    ] {
        assert!(
            !allows(&mut policy, "CreateContainerRequest", web_with(place, value.clone())),
            "{place} {value}"
        );
    }
    assert!(!allows(&mut policy, "CreateContainerRequest", json!({})));
    let mut pulled = web_with("/storages/0/driver", json!("image_guest_pull"));
    *pulled.pointer_mut("/storages/0/source").unwrap() = json!("nginx");
    assert!(allows(&mut policy, "CreateContainerRequest", pulled));
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
        *request.pointer_mut("/OCI/Annotations").unwrap() =
            json!({ "io.kubernetes.cri.image-name": "registry.example/tools@sha256:00" });
        request
    };
    assert!(allows(&mut policy, "CreateContainerRequest", init(json!(["/entry", "prepare", "hunter2"]))));
    assert!(!allows(&mut policy, "CreateContainerRequest", init(json!(["/entry", "other", "hunter2"]))));
    assert!(!allows(&mut policy, "CreateContainerRequest", init(json!(["hunter2"]))));
}

#[test]
fn pause_container_is_the_pods_own() {
    let mut policy = of(POD, PLAIN);
    let mut pause = web_with("/OCI/Process/Args", json!(["/pause"]));
    *pause.pointer_mut("/OCI/Process/Capabilities/Bounding").unwrap() = json!([]);
    *pause.pointer_mut("/OCI/Mounts").unwrap() = json!([{ "destination": "/dev/shm" }]);
    *pause.pointer_mut("/OCI/Annotations").unwrap() = json!({});
    assert!(allows(&mut policy, "CreateContainerRequest", pause.clone()));
    *pause.pointer_mut("/storages/0/driver").unwrap() = json!("image_guest_pull");
    *pause.pointer_mut("/storages/0/source").unwrap() = json!("evil");
    assert!(!allows(&mut policy, "CreateContainerRequest", pause.clone()));
    *pause.pointer_mut("/storages/0/source").unwrap() = json!("pause");
    assert!(allows(&mut policy, "CreateContainerRequest", pause));
}

#[test]
fn only_probes_are_executed_unless_everything_may_be() {
    let exec = |args: Value| json!({ "container_id": "c", "process": { "Args": args } });
    let mut policy = of(POD, PLAIN);
    assert!(allows(&mut policy, "ExecProcessRequest", exec(json!(["alive"]))));
    assert!(!allows(&mut policy, "ExecProcessRequest", exec(json!(["sh"]))));
    assert!(!allows(&mut policy, "WriteStreamRequest", json!({})));
    assert!(allows(&mut policy, "ReadStreamRequest", json!({})));
    assert!(!allows(&mut policy, "ForwardRequest", json!({})));
    let mut open = of(POD, Wishes { exec: true, logs: false, forward: true });
    assert!(allows(&mut open, "ExecProcessRequest", exec(json!(["sh"]))));
    assert!(allows(&mut open, "WriteStreamRequest", json!({})));
    assert!(!allows(&mut open, "ReadStreamRequest", json!({})));
    assert!(allows(&mut open, "ForwardRequest", json!({})));
}

#[test]
fn files_are_copied_beside_containers_and_not_into_them() {
    let mut policy = of(POD, PLAIN);
    let copy = |path: &str, link: &str| json!({ "path": path, "symlink_src": link });
    let dir = "/run/kata-containers/shared/containers";
    assert!(allows(&mut policy, "CopyFileRequest", copy(&format!("{dir}/c-hosts"), "")));
    assert!(allows(&mut policy, "CopyFileRequest", copy(&format!("{dir}/v/..data"), "..2026_11_29")));
    for (path, link) in [("/etc/passwd", ""), ("/run/kata-containers/shared/containers/../x", "")] {
        assert!(!allows(&mut policy, "CopyFileRequest", copy(path, link)), "{path}");
    }
    assert!(!allows(&mut policy, "CopyFileRequest", copy(&format!("{dir}/c/rootfs/bin/sh"), "")));
    assert!(!allows(&mut policy, "CopyFileRequest", copy(&format!("{dir}/l"), "/etc")));
    assert!(!allows(&mut policy, "CopyFileRequest", copy(&format!("{dir}/l"), "../../x")));
    assert!(!allows(&mut policy, "SetPolicyRequest", json!({})));
    let sandbox = json!({ "guest_hook_path": "", "kernel_modules": [], "storages": [] });
    assert!(allows(&mut policy, "CreateSandboxRequest", sandbox));
    let hooked = json!({ "guest_hook_path": "/x", "kernel_modules": [], "storages": [] });
    assert!(!allows(&mut policy, "CreateSandboxRequest", hooked));
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
        [&json!({ "container": "web", "what": "its root is somewhere else, or can be written to" })]
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
    let odd = pod.replace("[]", "[{ name: c, command: 1 }]");
    assert_eq!(fault(&odd), "container c: command is not a list of strings");
    assert_eq!(fault(&pod.replace("[]", "[{ image: c }]")), "a container: it has no name");
}

#[test]
fn bundle_is_the_container_that_it_describes() {
    let spec: oci_spec::runtime::Spec = serde_json::from_value(json!({
        "ociVersion": "1.2.0", "hostname": "web", "root": { "path": "rootfs", "readonly": true },
        "mounts": [{ "destination": "/data", "type": "bind", "source": "/d" }],
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
    assert!(container.mounts.contains(&"/data".to_owned()));
}
