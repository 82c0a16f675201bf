//! What would change a container's behaviour and cannot be carried out in the guest: refused by name, never dropped.
//!
//! `FIELDS` in `fields.rs` has a row for each.

use oci_spec::runtime::{Linux, LinuxPersonalityDomain, LinuxResources, Mount, Process, Spec};

use super::GuestSpecError;

const NO_FIELD: &str = "the guest protocol has no field for it";
const FOREIGN: &str = "it is for another platform than Linux";
const NO_SUCH_LIMIT: &str = "the guest has control groups of version 2, which know no such limit";
const HOST_DISK: &str = "it names a disk of the host, and the disks of the guest are others";

fn first(reason: &'static str, fields: &[(bool, &'static str)]) -> Result<(), GuestSpecError> {
    match fields.iter().find(|(given, _)| *given) {
        Some((_, field)) => Err(GuestSpecError::Unsupported { field, reason }),
        None => Ok(()),
    }
}

/// Whether a list or map is there and has something in it.
fn filled<T>(list: &Option<T>) -> bool
where
    for<'list> &'list T: IntoIterator,
{
    list.as_ref().is_some_and(|list| list.into_iter().next().is_some())
}

/// The specification but its process and limits.
pub(super) fn spec(spec: &Spec) -> Result<(), GuestSpecError> {
    let idmapped = |mount: &Mount| filled(mount.uid_mappings()) || filled(mount.gid_mappings());
    first(
        FOREIGN,
        &[
            (spec.solaris().is_some(), "solaris"),
            (spec.windows().is_some(), "windows"),
            (spec.vm().is_some(), "vm"),
            (spec.zos().is_some(), "zos"),
        ],
    )?;
    first(NO_FIELD, &[(spec.mounts().iter().flatten().any(idmapped), "mounts[].uidMappings")])?;
    spec.linux().as_ref().map_or(Ok(()), linux)
}

fn linux(linux: &Linux) -> Result<(), GuestSpecError> {
    let plain = |it: &oci_spec::runtime::LinuxPersonality| {
        it.domain() == LinuxPersonalityDomain::PerLinux && !filled(it.flags())
    };
    first(
        NO_FIELD,
        &[
            (linux.personality().as_ref().is_some_and(|it| !plain(it)), "linux.personality"),
            (filled(linux.time_offsets()), "linux.timeOffsets"),
            (linux.memory_policy().is_some(), "linux.memoryPolicy"),
        ],
    )?;
    first(
        "the pod's machine stands in its place: users of the guest are none of the host (Kubernetes: leave hostUsers unset)",
        &[
            (filled(linux.uid_mappings()), "linux.uidMappings"),
            (filled(linux.gid_mappings()), "linux.gidMappings"),
        ],
    )?;
    first("the pod's interfaces are its machine's", &[(filled(linux.net_devices()), "linux.netDevices")])?;
    first(
        "caches and memory bandwidth are the host's, and all of a pod's containers share its machine",
        &[(linux.intel_rdt().is_some(), "linux.intelRdt")],
    )?;
    let Some(seccomp) = linux.seccomp() else { return Ok(()) };
    let eperm = u32::try_from(libc::EPERM).unwrap_or_default();
    first(
        NO_FIELD,
        &[
            (seccomp.listener_path().is_some(), "linux.seccomp.listenerPath"),
            (seccomp.listener_metadata().is_some(), "linux.seccomp.listenerMetadata"),
            (
                seccomp.default_errno_ret().is_some_and(|errno| errno != eperm),
                "linux.seccomp.defaultErrnoRet",
            ),
        ],
    )
}

/// A process, a container's first or a later one.
pub(super) fn process(process: &Process) -> Result<(), GuestSpecError> {
    first(FOREIGN, &[(process.command_line().is_some(), "process.commandLine")])?;
    first(
        NO_FIELD,
        &[
            (process.io_priority().is_some(), "process.ioPriority"),
            (process.scheduler().is_some(), "process.scheduler"),
        ],
    )?;
    first(
        "it names processors of the host",
        &[(process.exec_cpu_affinity().is_some(), "process.execCPUAffinity")],
    )
}

/// Limits, of a creation or of an update.
pub(super) fn resources(resources: &LinuxResources) -> Result<(), GuestSpecError> {
    first(NO_FIELD, &[(filled(resources.rdma()), "linux.resources.rdma")])?;
    if let Some(memory) = resources.memory() {
        first(
            NO_SUCH_LIMIT,
            &[
                (memory.kernel().is_some_and(|it| it > 0), "linux.resources.memory.kernel"),
                (memory.kernel_tcp().is_some_and(|it| it > 0), "linux.resources.memory.kernelTCP"),
                (memory.swappiness().is_some_and(|it| it > 0), "linux.resources.memory.swappiness"),
                (memory.disable_oom_killer() == Some(true), "linux.resources.memory.disableOOMKiller"),
            ],
        )?;
        first(
            NO_FIELD,
            &[(memory.check_before_update() == Some(true), "linux.resources.memory.checkBeforeUpdate")],
        )?;
    }
    if let Some(cpu) = resources.cpu() {
        let some = |it: Option<i64>| it.is_some_and(|it| it != 0);
        first(
            NO_FIELD,
            &[
                (some(cpu.idle()), "linux.resources.cpu.idle"),
                (cpu.burst().is_some_and(|it| it != 0), "linux.resources.cpu.burst"),
            ],
        )?;
        first(
            NO_SUCH_LIMIT,
            &[
                (some(cpu.realtime_runtime()), "linux.resources.cpu.realtimeRuntime"),
                (cpu.realtime_period().is_some_and(|it| it != 0), "linux.resources.cpu.realtimePeriod"),
            ],
        )?;
    }
    if let Some(network) = resources.network() {
        first(
            NO_SUCH_LIMIT,
            &[
                (network.class_id().is_some_and(|it| it != 0), "linux.resources.network.classID"),
                (filled(network.priorities()), "linux.resources.network.priorities"),
            ],
        )?;
    }
    let Some(block) = resources.block_io() else { return Ok(()) };
    first(
        NO_SUCH_LIMIT,
        &[(block.leaf_weight().is_some_and(|it| it != 0), "linux.resources.blockIO.leafWeight")],
    )?;
    first(
        HOST_DISK,
        &[
            (filled(block.weight_device()), "linux.resources.blockIO.weightDevice"),
            (filled(block.throttle_read_bps_device()), "linux.resources.blockIO.throttleReadBpsDevice"),
            (filled(block.throttle_write_bps_device()), "linux.resources.blockIO.throttleWriteBpsDevice"),
            (filled(block.throttle_read_iops_device()), "linux.resources.blockIO.throttleReadIOPSDevice"),
            (filled(block.throttle_write_iops_device()), "linux.resources.blockIO.throttleWriteIOPSDevice"),
        ],
    )
}
