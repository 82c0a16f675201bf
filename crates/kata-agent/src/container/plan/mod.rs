//! A spec, checked whole and reduced to what the helper has to do.
//!
//! Everything that can be refused is refused here, in the agent, before a process or a cgroup exists. The helper gets
//! numbers and paths only; it does not know the OCI runtime specification.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxNamespaceType, LinuxPersonalityDomain, LinuxSeccomp, Spec};
use serde::{Deserialize, Serialize};

use super::EngineError;
use super::hooks::HooksPlan;

mod mounts;
mod process;

pub(super) use mounts::{DeviceKind, DevicePlan, MountPlan, MountSource};
pub(super) use process::{ProcessPlan, Rlimit, TerminalPlan};

/// One container, as the helper builds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ContainerPlan {
    /// Root of the container in the guest; absolute.
    pub rootfs: PathBuf,
    /// Whether the root is read-only in the end.
    pub readonly_rootfs: bool,
    /// `MS_*` propagation of the new root, `MS_REC` included.
    pub propagation: Option<u32>,
    /// `CLONE_NEW*` of the namespaces to make.
    pub create: u32,
    /// `CLONE_NEW*` and path of each namespace to join.
    pub join: Vec<(u32, PathBuf)>,
    /// For the UTS namespace.
    pub hostname: Option<String>,
    /// For the UTS namespace.
    pub domainname: Option<String>,
    /// In order.
    pub mounts: Vec<MountPlan>,
    /// Device nodes beside the default ones.
    pub devices: Vec<DevicePlan>,
    /// Paths in the container that read as empty.
    pub masked: Vec<PathBuf>,
    /// Paths in the container that cannot be written.
    pub readonly: Vec<PathBuf>,
    /// Path below `/proc/sys` and value.
    pub sysctls: BTreeMap<PathBuf, String>,
    /// The profile; the helper makes a filter of it and hands it back for later processes.
    pub seccomp: Option<LinuxSeccomp>,
    /// Programs to run on the way.
    pub hooks: HooksPlan,
}

/// What the spec says: the part for the helper, and the part for the agent.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plan {
    pub container: ContainerPlan,
    pub process: ProcessPlan,
    /// Relative to the cgroup root.
    pub cgroup: PathBuf,
}

impl ContainerPlan {
    /// `CLONE_NEW*` of every namespace that is the container's own or joined.
    pub(super) fn namespaces(&self) -> u32 {
        self.join.iter().fold(self.create, |all, (flag, _)| all | flag)
    }
}

impl Plan {
    /// Checks `spec` and takes what is needed from it.
    pub(super) fn of(id: &str, spec: &Spec, bundle: &Path) -> Result<Self, EngineError> {
        check_id(id)?;
        refuse_foreign(spec)?;
        let root = spec.root().as_ref().ok_or_else(|| EngineError::invalid("root", "is missing"))?;
        let rootfs = bundle.join(root.path());
        if !rootfs.is_absolute() {
            return Err(EngineError::invalid("root.path", "is relative and so is the bundle"));
        }
        let process = spec.process().as_ref().ok_or_else(|| EngineError::invalid("process", "is missing"))?;
        let linux = spec.linux().as_ref().ok_or_else(|| EngineError::invalid("linux", "is missing"))?;
        refuse_linux(linux)?;
        let (create, join) = namespaces(linux)?;
        let names = join.iter().fold(create, |all, (flag, _)| all | flag);
        let container = ContainerPlan {
            rootfs,
            readonly_rootfs: root.readonly().unwrap_or(false),
            propagation: propagation(linux.rootfs_propagation().as_deref())?,
            create,
            join,
            hostname: uts_name("hostname", spec.hostname().as_deref(), names)?,
            domainname: uts_name("domainname", spec.domainname().as_deref(), names)?,
            mounts: mounts::mounts(spec.mounts().as_deref().unwrap_or_default())?,
            devices: mounts::devices(linux.devices().as_deref().unwrap_or_default())?,
            masked: paths("linux.maskedPaths", linux.masked_paths().as_deref())?,
            readonly: paths("linux.readonlyPaths", linux.readonly_paths().as_deref())?,
            sysctls: sysctls(linux, names)?,
            seccomp: linux.seccomp().clone(),
            hooks: HooksPlan::of(id, spec, bundle)?,
        };
        let process = ProcessPlan::of(process)?;
        Ok(Self { container, process, cgroup: cgroup_path(id, linux.cgroups_path().as_deref())? })
    }
}

/// An id names a cgroup when the spec gives no path, and appears in messages: keep it one plain path component.
fn check_id(id: &str) -> Result<(), EngineError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-+.".contains(c);
    let named = id.chars().any(|c| c != '.');
    if id.len() <= 1024 && named && id.chars().all(plain) {
        return Ok(());
    }
    Err(EngineError::invalid("container id", format!("{id:?} is not made of letters, digits and _-+.")))
}

/// Refuses the parts of a spec that are for another platform.
fn refuse_foreign(spec: &Spec) -> Result<(), EngineError> {
    let foreign = [
        ("solaris", spec.solaris().is_some()),
        ("windows", spec.windows().is_some()),
        ("vm", spec.vm().is_some()),
        ("zos", spec.zos().is_some()),
    ];
    if let Some((key, _)) = foreign.into_iter().find(|(_, present)| *present) {
        return Err(EngineError::unsupported(key, "this is a Linux container engine"));
    }
    Ok(())
}

/// Refuses what cannot be given. An AppArmor profile is looked at in `process`, where it is named.
fn refuse_linux(linux: &Linux) -> Result<(), EngineError> {
    let asked: [(&str, bool, &str); 7] = [
        ("linux.uidMappings", filled(linux.uid_mappings()), "there are no user namespaces in the guest"),
        ("linux.gidMappings", filled(linux.gid_mappings()), "there are no user namespaces in the guest"),
        ("linux.intelRdt", linux.intel_rdt().is_some(), "a guest has no cache or bandwidth control"),
        ("linux.memoryPolicy", linux.memory_policy().is_some(), "NUMA policies are not set"),
        (
            "linux.netDevices",
            linux.net_devices().as_ref().is_some_and(|all| !all.is_empty()),
            "the pod's devices are the sandbox's",
        ),
        (
            "linux.timeOffsets",
            linux.time_offsets().as_ref().is_some_and(|all| !all.is_empty()),
            "clocks are the guest's",
        ),
        (
            "linux.mountLabel",
            linux.mount_label().as_ref().is_some_and(|label| !label.is_empty()),
            "the guest kernel does not run SELinux",
        ),
    ];
    if let Some((key, _, reason)) = asked.into_iter().find(|(_, asked, _)| *asked) {
        return Err(EngineError::unsupported(key, reason));
    }
    if let Some(personality) = linux.personality()
        && (personality.domain() != LinuxPersonalityDomain::PerLinux || filled(personality.flags()))
    {
        return Err(EngineError::unsupported("linux.personality", "only PER_LINUX without flags"));
    }
    Ok(())
}

fn filled<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_some_and(|list| !list.is_empty())
}

type Joined = Vec<(u32, PathBuf)>;

fn namespaces(linux: &Linux) -> Result<(u32, Joined), EngineError> {
    let (mut create, mut join, mut seen) = (0_u32, Vec::new(), 0_u32);
    for namespace in linux.namespaces().as_deref().unwrap_or_default() {
        let (flag, name) = clone_flag(namespace.typ());
        let key = format!("linux.namespaces[{name}]");
        if seen & flag != 0 {
            return Err(EngineError::invalid(key, "is listed twice"));
        }
        seen |= flag;
        let path = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty());
        match (namespace.typ(), path) {
            (LinuxNamespaceType::User, _) => {
                return Err(EngineError::unsupported(key, "containers run in the guest's user namespace"));
            }
            (LinuxNamespaceType::Mount | LinuxNamespaceType::Cgroup | LinuxNamespaceType::Time, Some(_)) => {
                return Err(EngineError::unsupported(key, "this kind cannot be joined by path"));
            }
            (_, Some(path)) => join.push((flag, path.clone())),
            (_, None) => create |= flag,
        }
    }
    if create & flag_of(libc::CLONE_NEWNS) == 0 {
        return Err(EngineError::invalid("linux.namespaces", "a container needs its own mount namespace"));
    }
    Ok((create, join))
}

/// The kernel's flag and the specification's name.
fn clone_flag(kind: LinuxNamespaceType) -> (u32, &'static str) {
    let (flag, name) = match kind {
        LinuxNamespaceType::Mount => (libc::CLONE_NEWNS, "mount"),
        LinuxNamespaceType::Cgroup => (libc::CLONE_NEWCGROUP, "cgroup"),
        LinuxNamespaceType::Uts => (libc::CLONE_NEWUTS, "uts"),
        LinuxNamespaceType::Ipc => (libc::CLONE_NEWIPC, "ipc"),
        LinuxNamespaceType::User => (libc::CLONE_NEWUSER, "user"),
        LinuxNamespaceType::Pid => (libc::CLONE_NEWPID, "pid"),
        LinuxNamespaceType::Network => (libc::CLONE_NEWNET, "network"),
        LinuxNamespaceType::Time => (libc::CLONE_NEWTIME, "time"),
    };
    (flag_of(flag), name)
}

/// A `CLONE_*` constant as the bits it is.
pub(super) const fn flag_of(flag: libc::c_int) -> u32 {
    flag.cast_unsigned()
}

fn propagation(name: Option<&str>) -> Result<Option<u32>, EngineError> {
    let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(None) };
    let option = [name.to_owned()];
    let parsed = crate::mount::options::parse(&option).propagation;
    parsed.map(|flags| Some(flags.bits())).ok_or_else(|| {
        EngineError::invalid("linux.rootfsPropagation", format!("{name:?} is not a propagation"))
    })
}

fn uts_name(key: &str, name: Option<&str>, namespaces: u32) -> Result<Option<String>, EngineError> {
    let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(None) };
    if name.len() > 64 {
        return Err(EngineError::invalid(key, "is longer than 64 bytes"));
    }
    if namespaces & flag_of(libc::CLONE_NEWUTS) == 0 {
        return Err(EngineError::invalid(key, "is set and the container shares the guest's UTS namespace"));
    }
    Ok(Some(name.to_owned()))
}

fn paths(key: &str, list: Option<&[String]>) -> Result<Vec<PathBuf>, EngineError> {
    let list = list.unwrap_or_default().iter();
    list.map(|path| {
        let bad = !path.starts_with('/') || path.contains('\0');
        if bad {
            Err(EngineError::invalid(key, format!("{path:?} is not an absolute path")))
        } else {
            Ok(path.into())
        }
    })
    .collect()
}

/// System V and POSIX IPC parameters, which belong to the IPC namespace.
const IPC_SYSCTLS: [&str; 8] = [
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
];

/// Only parameters of a namespace that is the container's; those of the network, because the pod's network is the
/// guest's own. Others would change the other containers of the pod.
fn sysctls(linux: &Linux, namespaces: u32) -> Result<BTreeMap<PathBuf, String>, EngineError> {
    let mut accepted = BTreeMap::new();
    for (name, value) in linux.sysctl().iter().flatten() {
        let key = || format!("linux.sysctl[{name:?}]");
        let path =
            sysctl_path(name).ok_or_else(|| EngineError::invalid(key(), "is not the name of a parameter"))?;
        let has = |flag| namespaces & flag_of(flag) != 0;
        let allowed = path.starts_with("net/")
            || (IPC_SYSCTLS.contains(&path.as_str()) || path.starts_with("fs/mqueue/"))
                && has(libc::CLONE_NEWIPC)
            || path == "kernel/domainname" && has(libc::CLONE_NEWUTS);
        if !allowed {
            return Err(EngineError::unsupported(
                key(),
                "it does not belong to a namespace of this container",
            ));
        }
        accepted.insert(PathBuf::from(path), value.clone());
    }
    Ok(accepted)
}

/// `net.ipv4.ip_forward` and `net/ipv4/conf/eth0.1/forwarding` are both valid: the first separator decides.
fn sysctl_path(name: &str) -> Option<String> {
    let dotted = name.find(['.', '/']).and_then(|at| name.get(at..=at)) == Some(".");
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    let path: String = if dotted { name.chars().map(swap).collect() } else { name.to_owned() };
    let plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    (path.contains('/') && path.split('/').all(plain)).then_some(path)
}

/// `cgroupsPath` as a path below the cgroup root. systemd's `slice:prefix:name` is taken apart: there is no systemd
/// to ask. Without a path, `kata/<id>`.
fn cgroup_path(id: &str, asked: Option<&Path>) -> Result<PathBuf, EngineError> {
    let Some(asked) = asked.filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(Path::new("kata").join(id));
    };
    let text = asked.to_str().ok_or_else(|| EngineError::invalid("linux.cgroupsPath", "is not UTF-8"))?;
    let units: Vec<&str> = text.split(':').collect();
    let path = match units.as_slice() {
        [slice, prefix, name] if !text.contains('/') => format!("{slice}/{prefix}-{name}.scope"),
        _ => text.to_owned(),
    };
    let mut relative = PathBuf::new();
    for component in Path::new(&path).components() {
        match component {
            Component::Normal(name) => relative.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(EngineError::invalid(
                    "linux.cgroupsPath",
                    format!("{text:?} leaves the cgroup root"),
                ));
            }
        }
    }
    if relative.as_os_str().is_empty() || path.contains('\0') {
        return Err(EngineError::invalid("linux.cgroupsPath", format!("{text:?} names no cgroup")));
    }
    Ok(relative)
}

#[cfg(test)]
mod tests;
