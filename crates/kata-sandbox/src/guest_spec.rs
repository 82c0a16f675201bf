//! The specification as it is meant for the guest: what belongs to the host is dropped, replaced or refused.
//!
//! | in the specification | in the guest |
//! |---|---|
//! | `root.path` | the container's directory in the share, or where its disks are mounted |
//! | bind mounts of host paths, `directvol` mounts | volumes, each by its own way, see [`crate::storage::volume`] |
//! | a bind mount at `/dev/shm` | one tmpfs of the guest for the pod: shared memory cannot span kernels |
//! | bind mounts of `/dev`, `/proc`, `/sys` and below | left alone: they mean the guest's own |
//! | network namespace | dropped: the machine's network is the pod's |
//! | paths of ipc, uts, mount, cgroup namespaces | dropped: they name namespaces of the host; the type stays |
//! | path of a pid namespace | dropped: the container joins the pod's, or another container's, see `lifecycle/pids.rs` |
//! | no pid or no ipc namespace | refused: the host's cannot be seen from a machine |
//! | path of a user namespace | refused: the guest has one for all |
//! | `cgroupsPath` | `/<container id>`: the host's hierarchy does not exist there |
//! | cpusets | dropped: they name the host's processors |
//! | `prestart`, `createRuntime`, `poststart`, `poststop` hooks | dropped: they are programs of the host, see [`crate::hooks`] |
//! | `createContainer`, `startContainer` hooks | kept: the guest runs them |
//! | AppArmor and SELinux labels | dropped: the profiles are the host's, the guest's kernel has none of them |
//! | seccomp | kept, unless `runtime.disable_guest_seccomp` |
//! | device rules and nodes, limits, sysctls, capabilities | kept |
//!
//! `FIELDS` in `guest_spec/fields.rs` has every field of the specification with its fate.

use std::path::{Path, PathBuf};

use kata_api::guest;
use oci_spec::runtime::{Hooks, LinuxNamespaceType, LinuxResources, Mount, Process, Spec};

use crate::error::ErrorKind;

#[cfg(test)]
mod coverage;
#[cfg(test)]
mod fields;
mod refused;

/// Why a specification cannot be carried out in the guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestSpecError {
    /// A part that every container has.
    #[error("the specification has no {0}")]
    Missing(&'static str),
    /// A part that this release cannot carry out.
    #[error("{field} is not supported: {reason}")]
    Unsupported {
        /// The part, as it is called in config.json.
        field: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// What a machine of its own cannot have.
    #[error(
        "linux.namespaces has no {kind}: the container asks for the host's {what}, which a virtual machine cannot share; give \
         it a namespace (Kubernetes: {pod_field}: false, Docker: without --{kind} host)"
    )]
    HostNamespace {
        /// The namespace's kind.
        kind: &'static str,
        /// What is in it.
        what: &'static str,
        /// What a pod's specification calls it.
        pod_field: &'static str,
    },
    /// The host tells all containers of a pod by one pid.
    #[error(
        "the pid namespace {path} is that of the pod's owner, which speaks for {count} containers: which of them is meant cannot \
         be told; share the processes of the whole pod (Kubernetes: shareProcessNamespace: true)", path = .path.display()
    )]
    AmbiguousPids {
        /// As the specification names it.
        path: PathBuf,
        /// How many containers run.
        count: usize,
    },
}

impl GuestSpecError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing(_) => ErrorKind::InvalidArgument,
            Self::Unsupported { .. } | Self::HostNamespace { .. } | Self::AmbiguousPids { .. } => {
                ErrorKind::Unimplemented
            }
        }
    }
}

/// A host path that the container wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Where it is on the host.
    pub(crate) source: PathBuf,
    /// Its place among the specification's mounts.
    pub(crate) mount: usize,
    pub(crate) readonly: bool,
    /// Whether mounts made on the host later shall appear.
    pub(crate) follows_host: bool,
}

/// What a container's specification means for guest and host.
#[derive(Clone, Debug)]
pub(crate) struct GuestSpec {
    /// For the agent.
    pub(crate) spec: Spec,
    /// For the host to bring into the guest, and then to be [placed](Self::place).
    pub(crate) volumes: Vec<Volume>,
    /// The host's directory behind the pod's shared memory, where the container takes part in it.
    pub(crate) shm: Option<PathBuf>,
}

impl GuestSpec {
    /// Whether the container may not write its root.
    pub(crate) fn root_readonly(&self) -> bool {
        self.spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false)
    }

    /// Says where in the guest a volume is.
    pub(crate) fn place(&mut self, volume: &Volume, path: PathBuf) {
        let mounts = self.spec.mounts_mut().as_mut();
        if let Some(mount) = mounts.and_then(|mounts| mounts.get_mut(volume.mount)) {
            mount.set_typ(Some("bind".to_owned())).set_source(Some(path));
        }
    }

    /// Puts the root elsewhere in the guest.
    pub(crate) fn set_root(&mut self, path: &str, readonly: bool) {
        if let Some(root) = self.spec.root_mut() {
            root.set_path(path.into());
            root.set_readonly(Some(readonly));
        }
    }
}

/// The container's root file system below its directory in the share.
pub(crate) const ROOTFS: &str = "rootfs";

/// The container's directory in the share, as the guest sees it.
pub(crate) fn in_share(id: &str) -> PathBuf {
    Path::new(guest::SHARE_DIR).join(id)
}

/// Where the guest mounts the pod's shared memory.
pub(crate) fn pod_shm() -> PathBuf {
    Path::new(guest::SANDBOX_DIR).join("shm")
}

/// Translates `spec` for a container called `id`.
pub(crate) fn translate(
    id: &str,
    mut spec: Spec,
    disable_seccomp: bool,
) -> Result<GuestSpec, GuestSpecError> {
    refused::spec(&spec)?;
    let in_guest = in_share(id);

    let mut root = spec.root().clone().ok_or(GuestSpecError::Missing("root"))?;
    root.set_path(in_guest.join(ROOTFS));
    spec.set_root(Some(root));
    let process = spec.process().clone().ok_or(GuestSpecError::Missing("process"))?;
    spec.set_process(Some(guest_process(process)?));
    let hooks = spec.hooks().as_ref().and_then(guest_hooks);
    spec.set_hooks(hooks);
    let (mut volumes, mut shm) = (Vec::new(), None);
    if let Some(mounts) = spec.mounts_mut() {
        for (number, mount) in mounts.iter_mut().enumerate().filter(|(_, mount)| is_bind(mount)) {
            if mount.destination() == Path::new("/dev/shm") {
                shm = mount.source().clone();
                mount.set_typ(Some("bind".to_owned())).set_source(Some(pod_shm()));
            } else {
                volumes.extend(volume(number, mount)?);
            }
        }
    }
    translate_linux(id, &mut spec, disable_seccomp)?;
    Ok(GuestSpec { spec, volumes, shm })
}

/// A process as it is meant for the guest.
pub(crate) fn guest_process(mut process: Process) -> Result<Process, GuestSpecError> {
    refused::process(&process)?;
    let dropped = [
        ("AppArmor profile", process.apparmor_profile().as_deref().filter(|name| *name != "unconfined")),
        ("SELinux label", process.selinux_label().as_deref()),
    ];
    for (kind, name) in dropped {
        if let Some(name) = name.filter(|name| !name.is_empty()) {
            tracing::info!(kind, name, "a label of the host's has no meaning in the guest");
        }
    }
    process.user_mut().set_username(None);
    process.set_apparmor_profile(None).set_selinux_label(None);
    Ok(process)
}

/// Limits as they are meant for the guest.
pub(crate) fn guest_resources(mut resources: LinuxResources) -> Result<LinuxResources, GuestSpecError> {
    refused::resources(&resources)?;
    if let Some(mut cpu) = resources.cpu().clone() {
        let pinned = [cpu.cpus(), cpu.mems()].into_iter().flatten().any(|list| !list.is_empty());
        if pinned {
            tracing::info!(cpus = ?cpu.cpus(), mems = ?cpu.mems(), "a cpuset of the host's has no meaning in the guest");
        }
        cpu.set_cpus(None).set_mems(None);
        resources.set_cpu(Some(cpu));
    }
    if let Some(mut memory) = *resources.memory() {
        memory.set_use_hierarchy(None);
        resources.set_memory(Some(memory));
    }
    Ok(resources)
}

/// Hooks that are programs of the guest or of the container.
fn guest_hooks(given: &Hooks) -> Option<Hooks> {
    let mut kept = Hooks::default();
    kept.set_create_container(given.create_container().clone().filter(|hooks| !hooks.is_empty()))
        .set_start_container(given.start_container().clone().filter(|hooks| !hooks.is_empty()));
    (kept != Hooks::default()).then_some(kept)
}

fn translate_linux(id: &str, spec: &mut Spec, disable_seccomp: bool) -> Result<(), GuestSpecError> {
    let Some(mut linux) = spec.linux().clone() else { return Ok(()) };
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
    for (typ, kind, what, pod_field) in [
        (LinuxNamespaceType::Pid, "pid", "processes", "hostPID"),
        (LinuxNamespaceType::Ipc, "ipc", "shared memory and queues", "hostIPC"),
    ] {
        if !namespaces.iter().any(|namespace| namespace.typ() == typ) {
            return Err(GuestSpecError::HostNamespace { kind, what, pod_field });
        }
    }
    for namespace in &mut namespaces {
        let given = namespace.path().is_some();
        match namespace.typ() {
            LinuxNamespaceType::User if given => {
                return Err(GuestSpecError::Unsupported {
                    field: "linux.namespaces[].path",
                    reason: "the guest has one user namespace for all",
                });
            }
            _ => namespace.set_path(None),
        };
    }
    if let Some(resources) = linux.resources().clone() {
        linux.set_resources(Some(guest_resources(resources)?));
    }
    if disable_seccomp {
        linux.set_seccomp(None);
    }
    linux
        .set_namespaces(Some(namespaces))
        .set_cgroups_path(Some(Path::new("/").join(id)))
        .set_mount_label(None);
    spec.set_linux(Some(linux));
    Ok(())
}

/// The path of the pid namespace that the container shall join, if it names one.
pub(crate) fn pid_namespace(spec: &Spec) -> Option<&Path> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let mut pid = namespaces.into_iter().flatten().filter(|it| it.typ() == LinuxNamespaceType::Pid);
    pid.find_map(|namespace| namespace.path().as_deref()).filter(|path| !path.as_os_str().is_empty())
}

fn has_option(mount: &Mount, names: &[&str]) -> bool {
    mount.options().iter().flatten().any(|option| names.contains(&option.as_str()))
}

/// What upstream's runtimes call a mount of a direct volume.
const DIRECT_VOLUME: &str = "directvol";

fn is_bind(mount: &Mount) -> bool {
    matches!(mount.typ().as_deref(), Some("bind" | DIRECT_VOLUME)) || has_option(mount, &["bind", "rbind"])
}

/// The volume that a bind mount asks for; `None` where it means the guest's own.
fn volume(number: usize, mount: &Mount) -> Result<Option<Volume>, GuestSpecError> {
    let source = mount.source().clone().ok_or(GuestSpecError::Missing("source of a bind mount"))?;
    if ["/dev", "/proc", "/sys"].iter().any(|own| source.starts_with(own)) {
        return Ok(None);
    }
    if has_option(mount, &["shared", "rshared"]) {
        return Err(GuestSpecError::Unsupported {
            field: "mounts[].options: shared",
            reason: "mounts that a container makes exist in the guest's kernel and cannot appear on the host \
                     (Kubernetes: mountPropagation Bidirectional); use HostToContainer or None",
        });
    }
    Ok(Some(Volume {
        source,
        mount: number,
        readonly: has_option(mount, &["ro", "rro"]),
        follows_host: has_option(mount, &["slave", "rslave"]),
    }))
}

#[cfg(test)]
mod tests;
