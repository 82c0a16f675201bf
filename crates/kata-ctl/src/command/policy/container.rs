//! What a policy lets be created.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use oci_spec::runtime::{Capability, Mount, Spec};
use serde::Serialize;

use crate::bundle::CAPABILITIES;

/// Where container runtimes mount something without being asked, and from where: see [`Container::mounts`].
const MOUNTS: [(&str, &str); 18] = [
    ("/dev", "kernel:tmpfs"),
    ("/dev/mqueue", "kernel:mqueue"),
    ("/dev/pts", "kernel:devpts"),
    ("/dev/shm", "kernel:tmpfs"),
    ("/dev/shm", SHM),
    ("/dev/termination-log", HOST),
    ("/etc/hostname", HOST),
    ("/etc/hosts", HOST),
    ("/etc/resolv.conf", HOST),
    ("/proc", "kernel:proc"),
    ("/run", "kernel:tmpfs"),
    ("/run/.containerenv", HOST),
    ("/run/secrets/kubernetes.io/serviceaccount", HOST),
    ("/sys", "kernel:sysfs"),
    ("/sys", "guest:/sys"),
    ("/sys/fs/cgroup", "kernel:cgroup"),
    ("/sys/fs/cgroup", "kernel:cgroup2"),
    ("/var/run/secrets/kubernetes.io/serviceaccount", HOST),
];

/// The pod's shared memory.
pub const SHM: &str = "shm";
/// Files of the host, copied or shared.
pub const HOST: &str = "host";
/// The same, or a disk.
pub const VOLUME: &str = "volume";
/// File systems of the kernel that hold nothing of the host's.
const OF_KERNEL: [&str; 8] = ["cgroup", "cgroup2", "devpts", "mqueue", "proc", "ramfs", "sysfs", "tmpfs"];
/// Directories of which a host's path means the guest's own.
const OF_GUEST: [&str; 3] = ["/dev", "/proc", "/sys"];
/// kubelet's directory of a pod's emptyDirs.
const EMPTY_DIRS: &str = "kubernetes.io~empty-dir";
/// Where whoever speaks CRI writes an image's name.
const IMAGE_NAME: [&str; 2] = ["io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName"];
/// What a guest calls the image of a pod's own container.
const PAUSE: &str = "pause";

/// Variables that are another value each time.
const PASSING: [&str; 2] = ["HOSTNAME", "TERM"];

/// A container as the policy expects it. What is `None` may be anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Container {
    /// Its name in the policy.
    pub name: String,
    /// Whether it is the pod's own, which has no image.
    pub pods_own: bool,
    /// Names of its image; empty where it has none that a guest could pull.
    pub images: Vec<String>,
    /// Its whole command line. A word that is `None` is known only once the pod runs.
    pub command: Option<Vec<Option<String>>>,
    /// Where the command line begins with the image's entry point: what it ends with.
    pub arguments: Option<Vec<Option<String>>>,
    /// Variables that it has to have, `NAME=value`.
    pub env: Vec<String>,
    /// Its working directory.
    pub cwd: Option<String>,
    /// The user that it has to run as.
    pub uid: Option<i64>,
    /// The group that it has to run as.
    pub gid: Option<i64>,
    /// Its root has to be read-only.
    pub read_only: bool,
    /// It may not get more privileges.
    pub no_new_privileges: bool,
    /// Most capabilities.
    pub capabilities: Option<Vec<String>>,
    /// Where something may be mounted, and from where: `kernel:TYPE`, `guest:PATH`, `emptyDir:NAME`, [`SHM`], [`HOST`] or [`VOLUME`].
    pub mounts: BTreeMap<String, BTreeSet<String>>,
    /// Names of its emptyDirs.
    pub empty_dirs: BTreeSet<String>,
    /// Nodes of its raw block volumes.
    pub devices: Vec<String>,
    /// Commands that may be executed in it.
    pub commands: Vec<Vec<String>>,
    /// Whether it reads what the host sends.
    pub stdin: bool,
    /// What about it cannot be held.
    #[serde(skip)]
    pub notes: Vec<String>,
}

impl Container {
    /// One that may be anything but privileged.
    pub fn named(name: &str) -> Self {
        let mut container = Self {
            name: name.to_owned(),
            pods_own: false,
            images: Vec::new(),
            command: None,
            arguments: None,
            env: Vec::new(),
            cwd: None,
            uid: None,
            gid: None,
            read_only: false,
            no_new_privileges: false,
            capabilities: Some(CAPABILITIES.map(str::to_owned).to_vec()),
            mounts: BTreeMap::new(),
            empty_dirs: BTreeSet::new(),
            devices: Vec::new(),
            commands: Vec::new(),
            stdin: false,
            notes: Vec::new(),
        };
        for (place, source) in MOUNTS {
            container.may_mount(place, source);
        }
        container
    }

    /// The container that holds a pod of Kubernetes together.
    pub fn pause() -> Self {
        let command = Some(vec![Some("/pause".to_owned())]);
        let images = vec![PAUSE.to_owned()];
        Self { pods_own: true, images, command, ..Self::named("the pod's own (pause)") }
    }

    /// What the configuration of a bundle has.
    pub fn of_spec(spec: &Spec) -> Self {
        let mut container = Self::named(spec.hostname().as_deref().unwrap_or("container"));
        for mount in spec.mounts().iter().flatten() {
            container.may_mount_as(mount);
        }
        let annotations = spec.annotations().as_ref();
        let image = IMAGE_NAME.iter().find_map(|key| annotations?.get(*key));
        container.images = image.cloned().into_iter().collect();
        container.read_only = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
        let Some(process) = spec.process() else { return container };
        let args = process.args().clone().unwrap_or_default();
        container.command = Some(args.into_iter().map(Some).collect());
        let lasting = |entry: &String| !PASSING.contains(&entry.split('=').next().unwrap_or_default());
        container.env = process.env().iter().flatten().filter(|entry| lasting(entry)).cloned().collect();
        container.cwd = Some(process.cwd().display().to_string());
        container.uid = Some(i64::from(process.user().uid()));
        container.gid = Some(i64::from(process.user().gid()));
        container.no_new_privileges = process.no_new_privileges().unwrap_or(false);
        let bounding = process.capabilities().as_ref().and_then(|all| all.bounding().clone());
        let mut names: Vec<String> = bounding.iter().flatten().map(capability).collect();
        names.sort();
        container.capabilities = Some(names);
        container
    }

    /// Lets something from `source` be mounted at a place.
    pub fn may_mount(&mut self, place: &str, source: &str) {
        self.mounts.entry(place.to_owned()).or_default().insert(source.to_owned());
        self.empty_dirs.extend(source.strip_prefix("emptyDir:").map(str::to_owned));
    }

    /// Lets be mounted what a specification of the host's has: the guest has it from elsewhere.
    fn may_mount_as(&mut self, mount: &Mount) {
        let place = mount.destination().display().to_string();
        let kind = mount.typ().as_deref().unwrap_or_default();
        let binds = |option: &String| matches!(option.as_str(), "bind" | "rbind");
        let is_bind = matches!(kind, "bind" | "directvol") || mount.options().iter().flatten().any(binds);
        if is_bind {
            let source = mount.source().clone().unwrap_or_default();
            self.may_mount(&place, &source_of(&place, &source));
        } else if OF_KERNEL.contains(&kind) {
            self.may_mount(&place, &format!("kernel:{kind}"));
        } else {
            self.notes
                .push(format!("nothing may be mounted at {place}: no policy can tell what a {kind:?} shows"));
        }
    }

    /// Takes capabilities away; `ALL` is each of them.
    pub fn may_not_have<'a>(&mut self, names: impl Iterator<Item = &'a str>) {
        let Some(list) = &mut self.capabilities else { return };
        for name in names {
            let name = name.to_ascii_uppercase();
            let bare = name.strip_prefix("CAP_").unwrap_or(&name);
            list.retain(|known| bare != "ALL" && known.strip_prefix("CAP_") != Some(bare));
        }
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

/// Where the guest has a path of the host from, which is bound at `place`.
fn source_of(place: &str, path: &Path) -> String {
    if place == "/dev/shm" {
        return SHM.to_owned();
    }
    if is_of_guest(path) {
        return format!("guest:{}", path.display());
    }
    let of = path.parent().and_then(Path::file_name);
    match path.file_name().filter(|_| of.is_some_and(|of| of == EMPTY_DIRS)) {
        Some(name) => format!("emptyDir:{}", name.display()),
        None => VOLUME.to_owned(),
    }
}

/// Whether a path of the host means the guest's own.
pub fn is_of_guest(path: &Path) -> bool {
    OF_GUEST.iter().any(|own| path.starts_with(own))
}

/// As the agent is told it: the name of the kernel's.
fn capability(capability: &Capability) -> String {
    let name = capability.to_string();
    if name.starts_with("CAP_") { name } else { format!("CAP_{name}") }
}
