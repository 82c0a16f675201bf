//! `[runtime]`: upstream's keys that this version does not act on.

use super::kind::Kind::{Boolean, List, Text, Word};
use super::{Key, Kind};

const COUNT: Kind = Kind::COUNT;

const fn key(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Key {
    Key::planned("runtime", name, kind, default, doc)
}

pub(super) const KEYS: &[Key] = &[
    key(
        "name",
        Word(&["virt_container", "linux_container", "wasm_container"]),
        "\"virt_container\"",
        "Kind of runtime: containers in a virtual machine, as this version always has them.",
    )
    .rust()
    .annotated(),
    key("agent_name", Text, "\"kata\"", "Section of the agent.").rust().annotated(),
    key("disable_new_netns", Boolean, "false", "Leaves the machine in the host's network namespace.")
        .annotated(),
    key(
        "vfio_mode",
        Word(&["guest-kernel", "vfio"]),
        "\"guest-kernel\"",
        "How devices of the host appear in a container.",
    )
    .harmless(&["\"vfio\""])
    .annotated(),
    key("sandbox_bind_mounts", List, "[]", "Paths of the host that every pod's shared directory holds.")
        .annotated(),
    key("shared_mounts", List, "[]", "Mounts of one container that others of the pod see.")
        .rust()
        .annotated(),
    key("jaeger_endpoint", Text, "\"\"", "Collector of those spans."),
    key("jaeger_user", Text, "\"\"", "User at the collector."),
    key("jaeger_password", Text, "\"\"", "Password at the collector."),
    key("enable_pprof", Boolean, "false", "Profiles of the runtime over its monitor socket.").annotated(),
    key("keep_abnormal", Boolean, "false", "Leaves a failed pod as it is, to be looked at.").rust(),
    key(
        "use_passfd_io",
        Boolean,
        "false",
        "Streams over vsock connections of their own, as this version always has them.",
    )
    .rust()
    .harmless(&["true"]),
    key("passfd_listener_port", COUNT, "1027", "vsock port of those connections.").rust(),
    key(
        "pod_resource_api_sock",
        Kind::Path,
        "\"\"",
        "kubelet's socket that tells which devices a pod was given.",
    )
    .rust(),
];
