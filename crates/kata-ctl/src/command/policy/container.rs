//! What a policy lets be created.

use oci_spec::runtime::{Capability, Spec};
use serde::Serialize;

use crate::bundle::CAPABILITIES;

/// Where container runtimes mount something without being asked.
const MOUNTS: [&str; 14] = [
    "/dev",
    "/dev/mqueue",
    "/dev/pts",
    "/dev/shm",
    "/dev/termination-log",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/proc",
    "/run/secrets/kubernetes.io/serviceaccount",
    "/sys",
    "/sys/fs/cgroup",
    "/tmp/.kata-resolv.conf",
    "/var/run/secrets/kubernetes.io/serviceaccount",
];

/// Variables that are another value each time.
const PASSING: [&str; 2] = ["HOSTNAME", "TERM"];

/// A container as the policy expects it. What is `None` may be anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Container {
    /// Its name in the policy.
    pub name: String,
    /// Names of its image; empty where none is compared.
    pub images: Vec<String>,
    /// Its whole command line. A word that is `None` is known only once the pod runs.
    pub command: Option<Vec<Option<String>>>,
    /// Where the command line begins with the image's entry point: what it ends with.
    pub arguments: Option<Vec<Option<String>>>,
    /// Variables that it has to have, `NAME=value`.
    pub env: Vec<String>,
    /// The user that it has to run as.
    pub uid: Option<i64>,
    /// Its root has to be read-only.
    pub read_only: bool,
    /// Most capabilities.
    pub capabilities: Option<Vec<String>>,
    /// Where something may be mounted.
    pub mounts: Vec<String>,
    /// Commands that may be executed in it.
    pub commands: Vec<Vec<String>>,
    /// Whether it reads what the host sends.
    #[serde(skip)]
    pub stdin: bool,
}

impl Container {
    /// One that may be anything but privileged.
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            images: Vec::new(),
            command: None,
            arguments: None,
            env: Vec::new(),
            uid: None,
            read_only: false,
            capabilities: Some(CAPABILITIES.map(str::to_owned).to_vec()),
            mounts: MOUNTS.map(str::to_owned).to_vec(),
            commands: Vec::new(),
            stdin: false,
        }
    }

    /// The container that holds a pod of Kubernetes together.
    pub fn pause() -> Self {
        let command = Some(vec![Some("/pause".to_owned())]);
        Self { command, ..Self::named("the pod's own (pause)") }
    }

    /// What the configuration of a bundle has.
    pub fn of_spec(spec: &Spec) -> Self {
        let mut container = Self::named(spec.hostname().as_deref().unwrap_or("container"));
        let of_spec = |mount: &oci_spec::runtime::Mount| mount.destination().display().to_string();
        container.may_mount(spec.mounts().iter().flatten().map(of_spec));
        container.read_only = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
        let Some(process) = spec.process() else { return container };
        let args = process.args().clone().unwrap_or_default();
        container.command = Some(args.into_iter().map(Some).collect());
        let lasting = |entry: &String| !PASSING.contains(&entry.split('=').next().unwrap_or_default());
        container.env = process.env().iter().flatten().filter(|entry| lasting(entry)).cloned().collect();
        container.uid = Some(i64::from(process.user().uid()));
        let bounding = process.capabilities().as_ref().and_then(|all| all.bounding().clone());
        let mut names: Vec<String> = bounding.iter().flatten().map(capability).collect();
        names.sort();
        container.capabilities = Some(names);
        container
    }

    /// Adds places of mounts.
    pub fn may_mount(&mut self, places: impl Iterator<Item = String>) {
        self.mounts.extend(places);
        self.mounts.sort();
        self.mounts.dedup();
    }

    /// Adds capabilities; `ALL` takes the bound away.
    pub fn may_have<'a>(&mut self, names: impl Iterator<Item = &'a str>) {
        for name in names {
            let name = name.to_ascii_uppercase();
            let Some(list) = &mut self.capabilities else { return };
            match name.strip_prefix("CAP_").unwrap_or(&name) {
                "ALL" => self.capabilities = None,
                bare => list.push(format!("CAP_{bare}")),
            }
        }
    }
}

/// As the agent is told it: the name of the kernel's.
fn capability(capability: &Capability) -> String {
    let name = capability.to_string();
    if name.starts_with("CAP_") { name } else { format!("CAP_{name}") }
}
