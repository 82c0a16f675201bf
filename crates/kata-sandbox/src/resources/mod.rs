//! What a pod has of the host's processors and memory.
//!
//! ```text
//!   specification ─▶ promise ─▶ sizing ─▶ the machine's size at its start
//!                       │                    │ static_sandbox_resource_mgmt = false
//!   containers ───▶ tally of limits ─────▶ resize ─▶ the agent brings CPUs and memory to use
//!                       │
//!                       └─ cpusets ─▶ the pod's cgroup on the host, and each virtual CPU on one of the host's
//! ```
//!
//! Limits themselves act in the guest, in the container's cgroup there. On the host the pod has a cgroup too, see
//! [`crate::cgroup`]: what the whole machine takes is counted there, and bounded by whoever made the cgroup above it.

mod pin;
mod promise;
mod sizing;

use kata_config::Config;
use kata_hypervisor::process::Record;
use kata_hypervisor::{Backing, Growth, Host, HypervisorError, Size, Vm};
use oci_spec::runtime::{LinuxResources, Spec};
use tokio::sync::Mutex;

use crate::agent_client::{Agent, AgentError};
use crate::cgroup::{Cgroup, CgroupError};
use crate::error::ErrorKind;
use promise::{CpuSet, Share, Tally};
pub use promise::{PromiseError, ResourceSpec};
pub use sizing::SizingError;
use sizing::{Bounds, Demand};

/// What the processes beside the guest take on the host at most, in MiB: QEMU's own memory with its translated code, the file
/// server, the vsock device and the owner.
const PROCESSES_MIB: u64 = 160;
const MIB: u64 = 1 << 20;
/// Linux adds memory in such blocks on most machines.
const USUAL_BLOCK_MIB: u64 = 128;
/// Linux adds memory in no larger blocks, on machines of 64 GiB and more.
const MOST_BLOCK: u64 = 2 << 30;

/// Why a pod does not get what it was promised.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// The promise itself.
    #[error(transparent)]
    Promise(#[from] PromiseError),
    /// The host or the configuration does not hold it.
    #[error(transparent)]
    Sizing(#[from] SizingError),
    /// The pod's cgroup on the host.
    #[error("the pod's cgroup on the host cannot be used")]
    Cgroup(#[from] CgroupError),
    /// The machine was sized before it booted.
    #[error(
        "the containers' limits would come to {wanted}, and the machine has {has}: it does not grow while it runs, because \
         runtime.static_sandbox_resource_mgmt is true"
    )]
    Static {
        /// What the limits come to.
        wanted: String,
        /// What the machine has.
        has: String,
    },
    /// A change of limits that nobody has.
    #[error(
        "no limits of it are kept: it is being created or deleted, or is the container that only stands for its pod; update \
         the pod's other containers"
    )]
    Unknown,
    /// The machine cannot be resized.
    #[error("the virtual machine cannot be resized")]
    Machine(#[from] HypervisorError),
    /// The guest does not bring to use what it was given.
    #[error("the guest cannot use the processors or the memory that were added")]
    Guest(#[from] AgentError),
    /// The guest's word for its blocks of memory is none that a kernel would give. The host's memory does not follow from it.
    #[error(
        "the guest's agent says that memory is added in blocks of {bytes} bytes, which is no power of two from 1 MiB to 2 GiB: \
         the machine is not grown; see whether guest image and kernel are the installed ones"
    )]
    Block {
        /// The agent's answer.
        bytes: u64,
    },
}

impl ResourceError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Promise(_) | Self::Cgroup(CgroupError::Path { .. }) => ErrorKind::InvalidArgument,
            Self::Sizing(_) | Self::Static { .. } => ErrorKind::FailedPrecondition,
            Self::Unknown => ErrorKind::NotFound,
            Self::Machine(HypervisorError::TooLarge { .. }) => ErrorKind::FailedPrecondition,
            Self::Machine(HypervisorError::Unsupported { .. }) => ErrorKind::Unimplemented,
            Self::Guest(error) => error.kind(),
            Self::Cgroup(_) | Self::Machine(_) | Self::Block { .. } => ErrorKind::Internal,
        }
    }
}

/// The limits that a container adds to its pod's; nothing for the one that only stands for the pod.
pub(crate) fn own_share(spec: &Spec) -> Option<Option<LinuxResources>> {
    if spec.annotations().as_ref().is_some_and(promise::is_pod) {
        return None;
    }
    Some(spec.linux().as_ref().and_then(|linux| linux.resources().clone()))
}

/// The resources of one pod.
pub(crate) struct Resources {
    config: Config,
    host: Host,
    /// What the machine boots with.
    start: Size,
    cgroup: Option<Cgroup>,
    /// The host's CPUs that the pod's cgroup has where no container bounds them; `None` for those of the cgroup above.
    cpus: Option<String>,
    changing: Mutex<Changing>,
}

/// What changes with the pod's containers.
struct Changing {
    tally: Tally,
    has: Size,
    /// Of that, what the guest has brought to use.
    online: Size,
    pinned: bool,
    /// The pod's cgroup has the containers' CPUs instead of its own.
    confined: bool,
}

impl Resources {
    /// Decides about the machine's size, makes the pod's cgroup and takes this process there, so that all it starts is in it too.
    pub(crate) fn prepare(
        id: &str,
        spec: &ResourceSpec,
        config: &Config,
        record: &Record,
    ) -> Result<Self, ResourceError> {
        let (config, host) = (config.clone(), Host::probe());
        let only = config.runtime.sandbox_cgroup_only;
        let cgroup = match &spec.cgroups_path {
            Some(path) => Cgroup::make(path, id, only, record)?,
            None => None,
        };
        let bounds = Bounds::new(&config.hypervisor.qemu, &host);
        let start = if config.runtime.static_sandbox_resource_mgmt {
            bounds.size(&of_kubelet(spec, cgroup.as_ref()))?
        } else {
            bounds.default()
        };
        if let Some(cgroup) = &cgroup {
            if let Some(cpus) = &spec.cpus {
                cgroup.set_cpus(cpus)?;
            }
            if let Some(mems) = &spec.mems {
                cgroup.set_mems(mems)?;
            }
            cgroup.enter()?;
            warn_of_tight_limit(id, cgroup, start);
        }
        let changing =
            Changing { tally: Tally::default(), has: start, online: start, pinned: false, confined: false };
        let cpus = spec.cpus.clone();
        Ok(Self { config, host, start, cgroup, cpus, changing: Mutex::new(changing) })
    }

    /// What the machine is to boot with.
    pub(crate) fn start(&self) -> Size {
        self.start
    }

    /// How far it may grow.
    pub(crate) fn growth(&self) -> Option<Growth> {
        (!self.config.runtime.static_sandbox_resource_mgmt).then(|| self.bounds().growth())
    }

    /// The size of a template's machine and how far it may grow, if this pod can start as its copy. The machine then has to be
    /// [made larger](Self::grow_to_start).
    pub(crate) fn template(&self) -> Result<(Size, Growth), &'static str> {
        let (bounds, start) = (self.bounds(), self.start);
        let (size, growth) = (bounds.default(), bounds.growth());
        let more = start.memory_mib.saturating_sub(size.memory_mib).next_multiple_of(USUAL_BLOCK_MIB);
        if start.vcpus < size.vcpus || start.memory_mib < size.memory_mib {
            Err("the pod was promised less than a template's machine has (default_vcpus, default_memory)")
        } else if size.memory_mib + more > growth.memory_mib.max(size.memory_mib) {
            Err("the pod was promised so much that a template's machine cannot be made as large")
        } else {
            Ok((size, growth))
        }
    }

    /// The machine has started with `size`, as its template had it.
    pub(crate) async fn started_with(&self, size: Size) {
        let mut changing = self.changing.lock().await;
        (changing.has, changing.online) = (size, size);
    }

    /// Makes a machine that started with less as large as the pod was promised. The answer is whether it was smaller.
    pub(crate) async fn grow_to_start(&self, vm: &dyn Vm, agent: &Agent) -> Result<bool, ResourceError> {
        let mut changing = self.changing.lock().await;
        let has = changing.has;
        if self.start.vcpus <= has.vcpus && self.start.memory_mib <= has.memory_mib {
            return Ok(false);
        }
        self.grow_to(self.start, vm, agent, &mut changing).await?;
        Ok(true)
    }

    pub(crate) fn backing(&self) -> Backing {
        backing(&self.config)
    }

    fn bounds(&self) -> Bounds<'_> {
        Bounds::new(&self.config.hypervisor.qemu, &self.host)
    }

    /// Puts the virtual CPUs of a machine that was just started where they belong.
    pub(crate) async fn settle(&self, vm: &dyn Vm) -> Result<(), ResourceError> {
        let mut changing = self.changing.lock().await;
        self.arrange(vm, &mut changing, None).await
    }

    /// Makes room for a container, before the guest is asked for it.
    pub(crate) async fn admit(
        &self,
        container: &str,
        resources: Option<&LinuxResources>,
        vm: &dyn Vm,
        agent: &Agent,
    ) -> Result<(), ResourceError> {
        let share = Share::of(resources)?;
        let mut changing = self.changing.lock().await;
        let before = changing.tally.clone();
        changing.tally.set(container, share);
        let made = self.grow(vm, agent, &mut changing).await;
        if made.is_err() {
            self.take_back(&mut changing, before);
        }
        made
    }

    /// Makes room for other limits of a container. What was before is the answer, for [`Resources::restore`].
    ///
    /// # Errors
    /// [`ResourceError::Unknown`] where the container was not admitted.
    pub(crate) async fn change(
        &self,
        container: &str,
        resources: &LinuxResources,
        vm: &dyn Vm,
        agent: &Agent,
    ) -> Result<Before, ResourceError> {
        let mut changing = self.changing.lock().await;
        let before = changing.tally.clone();
        let share = before.get(container).cloned().ok_or(ResourceError::Unknown)?;
        let mut changed = share.clone();
        changed.change(resources)?;
        changing.tally.set(container, changed);
        let result = match self.refuse_static(&before, &changing) {
            Ok(()) => self.grow(vm, agent, &mut changing).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            self.take_back(&mut changing, before);
            return Err(error);
        }
        Ok(Before { container: container.to_owned(), share })
    }

    /// After a change that the guest has refused.
    pub(crate) async fn restore(&self, before: Before) {
        let mut changing = self.changing.lock().await;
        let mut tally = changing.tally.clone();
        before.put_back(&mut tally);
        self.take_back(&mut changing, tally);
    }

    /// After a failure: what the containers have is `tally` again.
    fn take_back(&self, changing: &mut Changing, tally: Tally) {
        changing.tally = tally;
        if let Err(error) = self.confine(changing) {
            tracing::warn!(%error, "the pod's cgroup keeps the CPUs of a change that failed");
        }
    }

    /// Takes back what no container's limit needs any more, as far as the guest lets go of it: processors. Memory stays.
    pub(crate) async fn shrink(&self, vm: &dyn Vm) {
        let mut changing = self.changing.lock().await;
        let Ok(wanted) = self.wanted(&changing.tally) else { return };
        if self.growth().is_none() || wanted.vcpus >= changing.has.vcpus {
            return;
        }
        let size = Size { vcpus: wanted.vcpus, memory_mib: changing.has.memory_mib };
        if let Err(error) = self.arrange(vm, &mut changing, Some(size)).await {
            tracing::warn!(%error, "processors that nobody needs any more stay with the machine");
        }
    }

    /// A container is gone. What the machine has stays with it, for the next one; the host's CPUs follow those that are left.
    pub(crate) async fn dismiss(&self, container: &str, vm: &dyn Vm) {
        let mut changing = self.changing.lock().await;
        let before = changing.tally.cpus();
        changing.tally.remove(container);
        if changing.tally.cpus() == before {
            return;
        }
        match self.arrange(vm, &mut changing, None).await {
            // What goes with the machine needs no place.
            Ok(()) | Err(ResourceError::Machine(HypervisorError::Ended(_))) => {}
            Err(error) => {
                tracing::warn!(container, %error, "the pod stays on the CPUs of a container that is gone")
            }
        }
    }

    fn wanted(&self, tally: &Tally) -> Result<Size, SizingError> {
        let (bounds, demand) = (self.bounds(), tally.demand());
        let size = bounds.size(&demand)?;
        let start = self.start;
        Ok(Size { vcpus: size.vcpus.max(start.vcpus), memory_mib: size.memory_mib.max(start.memory_mib) })
    }

    /// A machine of fixed size takes no larger limits than it has room for. Those that it was made for are not looked at again.
    fn refuse_static(&self, before: &Tally, changing: &Changing) -> Result<(), ResourceError> {
        if self.growth().is_some() {
            return Ok(());
        }
        let (old, new, has) = (before.demand(), changing.tally.demand(), changing.has);
        let larger = |old: Option<u64>, new: Option<u64>| new.is_some() && new > old;
        if larger(old.cpu_limit, new.cpu_limit) && new.cpu_limit > Some(u64::from(has.vcpus) * 1000) {
            let wanted = format!("{} thousandths of a CPU", new.cpu_limit.unwrap_or_default());
            return Err(ResourceError::Static { wanted, has: format!("{} CPUs", has.vcpus) });
        }
        let mib = new.memory_limit.map(|bytes| bytes.div_ceil(MIB));
        if larger(old.memory_limit, new.memory_limit) && mib > Some(has.memory_mib) {
            let wanted = format!("{} MiB", mib.unwrap_or_default());
            return Err(ResourceError::Static { wanted, has: format!("{} MiB", has.memory_mib) });
        }
        Ok(())
    }

    async fn grow(&self, vm: &dyn Vm, agent: &Agent, changing: &mut Changing) -> Result<(), ResourceError> {
        if self.growth().is_none() {
            return self.arrange(vm, changing, None).await;
        }
        let wanted = self.wanted(&changing.tally)?;
        self.grow_to(wanted, vm, agent, changing).await
    }

    async fn grow_to(
        &self,
        mut wanted: Size,
        vm: &dyn Vm,
        agent: &Agent,
        changing: &mut Changing,
    ) -> Result<(), ResourceError> {
        let has = changing.has;
        wanted.vcpus = wanted.vcpus.max(has.vcpus);
        if wanted.memory_mib > has.memory_mib {
            let block = block_mib(agent.memory_block().await?)?;
            // Less than a whole block no guest takes. Where that is more than the machine has room for, it refuses.
            let more = (wanted.memory_mib - has.memory_mib).next_multiple_of(block);
            wanted.memory_mib = has.memory_mib.saturating_add(more);
        }
        self.arrange(vm, changing, (wanted > has).then_some(wanted)).await?;
        if changing.has != has {
            tracing::info!(?has, now = ?changing.has, "the virtual machine has grown");
        }
        bring_to_use(agent, changing).await
    }

    /// Gives the pod's cgroup the CPUs that its containers have together, or what it had before one was bound to some.
    fn confine(&self, changing: &mut Changing) -> Result<(), CgroupError> {
        let Some(cgroup) = &self.cgroup else { return Ok(()) };
        let cpus = changing.tally.cpus();
        match &cpus {
            Some(cpus) => cgroup.set_cpus(&cpus.text())?,
            None if !changing.confined => {}
            None => match &self.cpus {
                Some(cpus) => cgroup.set_cpus(cpus)?,
                None => cgroup.inherit_cpus()?,
            },
        }
        changing.confined = cpus.is_some();
        Ok(())
    }

    /// Brings machine, cgroup and CPUs together; with `size`, the machine to that size.
    async fn arrange(
        &self,
        vm: &dyn Vm,
        changing: &mut Changing,
        size: Option<Size>,
    ) -> Result<(), ResourceError> {
        self.confine(changing)?;
        let cpus = changing.tally.cpus();
        let pins = self.config.runtime.enable_vcpus_pinning;
        let places = self.cgroup.as_ref().is_some_and(Cgroup::takes_vcpus);
        if size.is_none() && !pins && !places {
            return Ok(());
        }
        let layout = vm.resize(size.unwrap_or(changing.has)).await?;
        changing.has = layout.size;
        changing.online.vcpus = changing.online.vcpus.min(layout.size.vcpus);
        if let Some(cgroup) = self.cgroup.as_ref().filter(|_| places) {
            cgroup.place_vcpus(&layout.vcpu_threads)?;
        }
        if pins {
            changing.pinned = pin::arrange(&layout.vcpu_threads, cpus.as_ref(), changing.pinned);
        }
        Ok(())
    }

    /// Whether the host's kernel has killed something of the pod for want of memory, as the end of a sentence about its death.
    pub(crate) fn oom(&self) -> Option<String> {
        let kill = self.cgroup.as_ref()?.oom()?;
        let need = self.start.memory_mib + PROCESSES_MIB;
        let advice = format!(
            "a machine of {} MiB and its processes may take {need} MiB on the host: raise overhead.podFixed.memory of the pod's \
             RuntimeClass, or lower hypervisor.qemu.default_memory or overhead_memory",
            self.start.memory_mib
        );
        Some(match kill.limit {
            Some((path, bytes)) => format!(
                "the host's out-of-memory killer ended it: the limit of cgroup {} is {} MiB, and {advice}",
                path.display(),
                bytes / MIB
            ),
            None => {
                format!("the host's out-of-memory killer ended it: the host has no memory left, and {advice}")
            }
        })
    }

    /// Takes this process out of the pod's cgroup, which can be removed then.
    pub(crate) fn leave(&self) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.leave();
        }
    }
}

/// What the guest's memory is made of.
pub(crate) fn backing(config: &Config) -> Backing {
    let qemu = &config.hypervisor.qemu;
    Backing {
        prealloc: qemu.enable_mem_prealloc,
        hugepages: qemu.enable_hugepages,
        reporting: qemu.reclaim_guest_freed_memory,
    }
}

/// The size of a template's machine: that of a pod without limits. It can grow to any other pod's.
pub(crate) fn template_size(config: &Config) -> (Size, Growth) {
    let host = Host::probe();
    let bounds = Bounds::new(&config.hypervisor.qemu, &host);
    (bounds.default(), bounds.growth())
}

/// Has the guest use all that its machine has, also what an earlier try has left unused.
async fn bring_to_use(agent: &Agent, changing: &mut Changing) -> Result<(), ResourceError> {
    let (has, online) = (changing.has, changing.online);
    let cpus = has.vcpus.saturating_sub(online.vcpus);
    let cpu_only = has.memory_mib <= online.memory_mib;
    if cpus > 0 || !cpu_only {
        agent.online(cpus, cpu_only).await?;
        changing.online = has;
    }
    Ok(())
}

/// The size of the guest's blocks of memory, in MiB. Linux has them from 2 MiB to 2 GiB; 0 is said where it does not tell.
fn block_mib(bytes: u64) -> Result<u64, ResourceError> {
    match bytes {
        0 => Ok(1),
        MIB..=MOST_BLOCK if bytes.is_power_of_two() => Ok(bytes / MIB),
        _ => Err(ResourceError::Block { bytes }),
    }
}

/// What a container was promised before a change.
pub(crate) struct Before {
    container: String,
    share: Share,
}

impl Before {
    /// Others may have come and gone since, and so may the container itself.
    fn put_back(self, tally: &mut Tally) {
        if tally.get(&self.container).is_some() {
            tally.set(&self.container, self.share);
        }
    }
}

/// The annotations tell the sum of the limits that there are. Whether every container has one, kubelet's own cgroup of the pod
/// tells: it has a limit only then.
fn of_kubelet(spec: &ResourceSpec, cgroup: Option<&Cgroup>) -> Demand {
    let mut demand = spec.demand;
    if let Some(pod) = cgroup.filter(|_| spec.is_pod).and_then(Cgroup::of_kubelet) {
        demand.memory_open = demand.memory_limit.is_some() && !pod.has_memory_limit;
        demand.cpu_open = demand.cpu_limit.is_some() && !pod.has_cpu_limit;
    }
    demand
}

/// Kubernetes bounds the pod as a whole on the host, by what its RuntimeClass declares as overhead. Where that is too little, the
/// machine is killed as soon as its guest uses what it has: better said before.
fn warn_of_tight_limit(id: &str, cgroup: &Cgroup, size: Size) {
    let need = size.memory_mib.saturating_add(PROCESSES_MIB);
    if let Some((path, bytes)) = cgroup.memory_limit()
        && bytes / MIB < need
    {
        tracing::warn!(
            pod = id,
            cgroup = %path.display(),
            limit_mib = bytes / MIB,
            need_mib = need,
            "the pod's cgroup has less memory than its machine and processes may take: the host may kill it; raise \
             overhead.podFixed.memory of its RuntimeClass"
        );
    }
}

#[cfg(test)]
mod tests;
