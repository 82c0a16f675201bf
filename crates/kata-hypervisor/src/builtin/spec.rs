//! From a [`VmSpec`] to what the VMM is told: descriptors instead of paths.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;

use kata_vmm_api::{
    Descriptor, DiskSpec, HostDeviceSpec, KernelSpec, MachineSpec, MemorySpec, NicSpec, SharedFsSpec,
    SnapshotSpec, Start, VsockSpec,
};

use super::client::Descriptors;
use crate::files::{DiskFile, open_for};
use crate::host_devices::{HostDevice, Ready};
use crate::process::Identity;
use crate::vm::{Disk, DiskLimits, Growth, HypervisorError, Nic, Template, VmSpec};

/// Name of the root disk among the devices.
const IMAGE: &str = "image";
/// Context id of every guest: the device leads to this machine's sockets alone, so there is nobody to tell it from.
const CID: u64 = 3;
/// Most virtual CPUs that the VMM's tables can tell of.
const MOST_CPUS: u32 = 254;

/// What the machine is, and the descriptors that it is made of.
pub(super) fn machine(
    spec: VmSpec,
    console: OwnedFd,
    vsock: OwnedFd,
) -> Result<(MachineSpec, Descriptors), HypervisorError> {
    let most = most(&spec);
    let mut descriptors = Descriptors::default();
    let vsock_name = spec.vsock.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    let Some(vsock_name) = vsock_name else {
        let reason = format!("{} is no path of a socket", spec.vsock.display());
        return Err(HypervisorError::InvalidSpec { id: spec.id, reason });
    };
    let mut disks = Vec::new();
    if let Some(path) = spec.image {
        let file = DiskFile::open(&path, true)?.fd;
        disks.push(disk_spec(IMAGE, descriptors.add(file), true, spec.disk_limits));
    }
    for cold in &spec.disks {
        let file = DiskFile::open(&cold.path, cold.readonly)?.fd;
        disks.push(disk_spec(&cold.id, descriptors.add(file), cold.readonly, spec.disk_limits));
    }
    let shared_fs = match spec.shared_fs {
        Some(shared) => {
            let socket = descriptors.add(shared.connect(&spec.run_dir)?);
            Some(SharedFsSpec { tag: shared.tag, socket })
        }
        None => None,
    };
    let console = Some(descriptors.add(console));
    let vsock = Some(VsockSpec { cid: CID, listener: descriptors.add(vsock), name: vsock_name });
    let nics = spec.nics.into_iter().map(|nic| nic_spec(nic, &mut descriptors)).collect();
    // It reads what it is given, and opens nothing anew.
    let root = Identity { uid: 0, gid: 0, groups: Vec::new() };
    // Last of all: a machine that starts from a template has other descriptors instead.
    let start = Start::Kernel(KernelSpec {
        kernel: descriptors.add(open_for(&root, &spec.kernel, "guest kernel")?),
        initrd: match &spec.initrd {
            Some(path) => Some(descriptors.add(open_for(&root, path, "initrd")?)),
            None => None,
        },
        command_line: command_line(&spec.kernel_params, most.memory_mib > spec.memory_mib),
    });
    let machine = MachineSpec {
        cpus: spec.vcpus,
        max_cpus: most.vcpus,
        memory: MemorySpec {
            size_mib: spec.memory_mib,
            max_mib: most.memory_mib,
            prealloc: spec.backing.prealloc,
            hugepages: spec.backing.hugepages,
            reporting: spec.backing.reporting,
        },
        start,
        console,
        vsock,
        shared_fs,
        disks,
        nics,
        host_devices: Vec::new(),
    };
    match descriptors.fit() {
        true => Ok((machine, descriptors)),
        false => Err(HypervisorError::InvalidSpec {
            id: spec.id,
            reason: "its network interfaces have more queues than the virtual machine monitor takes at once; lower \
                     hypervisor.qemu.network_queues"
                .to_owned(),
        }),
    }
}

/// How large it can become, at least as large as it is.
pub(super) fn most(spec: &VmSpec) -> Growth {
    let Growth { vcpus, memory_mib, slots } = spec.growth.unwrap_or_default();
    let vcpus = vcpus.min(MOST_CPUS).max(spec.vcpus);
    Growth { vcpus, memory_mib: memory_mib.max(spec.memory_mib), slots }
}

/// The same machine, and its descriptors, from a template.
pub(super) fn copied(
    machine: &MachineSpec,
    descriptors: &Descriptors,
    template: Template,
) -> io::Result<(MachineSpec, Descriptors)> {
    let mut descriptors = match &machine.start {
        Start::Kernel(KernelSpec { kernel, .. }) => descriptors.before(*kernel)?,
        Start::Snapshot(SnapshotSpec { state, .. }) => descriptors.before(*state)?,
    };
    let start = Start::Snapshot(snapshot(template, &mut descriptors));
    Ok((MachineSpec { start, ..machine.clone() }, descriptors))
}

/// Where a machine is written to, or starts from. The memory's checksum is not looked at: who keeps the files does.
pub(super) fn snapshot(Template { state, memory }: Template, descriptors: &mut Descriptors) -> SnapshotSpec {
    SnapshotSpec { state: descriptors.add(state), memory: descriptors.add(memory), verify: false }
}

/// A disk that is added, and its descriptor.
pub(super) fn disk(disk: &Disk, limits: DiskLimits) -> Result<(DiskSpec, Descriptors), HypervisorError> {
    let mut descriptors = Descriptors::default();
    let file = descriptors.add(DiskFile::open(&disk.path, disk.readonly)?.fd);
    Ok((disk_spec(&disk.id, file, disk.readonly, limits), descriptors))
}

/// A network interface that is added, and its descriptors.
pub(super) fn nic(nic: Nic) -> Result<(NicSpec, Descriptors), HypervisorError> {
    let mut descriptors = Descriptors::default();
    let spec = nic_spec(nic, &mut descriptors);
    match descriptors.fit() {
        true => Ok((spec, descriptors)),
        false => {
            let reason = "it has more queues than the virtual machine monitor takes";
            Err(HypervisorError::InvalidDevice { id: spec.id, reason })
        }
    }
}

/// A device of the host, and its descriptors among the others.
pub(super) fn host_device(
    device: &HostDevice,
    ready: Ready,
    descriptors: &mut Descriptors,
) -> HostDeviceSpec {
    HostDeviceSpec {
        id: device.id.clone(),
        address: device.address.clone(),
        container: descriptors.add(ready.container_file),
        group: descriptors.add(ready.group_file),
        group_number: ready.group,
    }
}

fn disk_spec(id: &str, file: Descriptor, readonly: bool, limits: DiskLimits) -> DiskSpec {
    DiskSpec {
        id: id.to_owned(),
        file,
        readonly,
        bytes_per_second: limits.bytes_per_second.map(NonZeroU64::get),
        requests_per_second: limits.requests_per_second.map(NonZeroU64::get),
    }
}

fn nic_spec(Nic { id, mac, mtu, queues, vhost }: Nic, descriptors: &mut Descriptors) -> NicSpec {
    let mut add = |files: Vec<OwnedFd>| files.into_iter().map(|file| descriptors.add(file)).collect();
    NicSpec { id, mac, mtu, queues: add(queues), vhost: add(vhost) }
}

/// The spec's parameters, and what the machine needs:
///
/// - how it is reset: there is no keyboard controller, and looking for one takes a kernel more than a second. The last of several
///   `reboot=` counts;
/// - no look at PCI before its time, for devices whose faults have to be known early and for AMD's bridges: 107 registers of which
///   none is there, each of them two exits;
/// - lock prefixes stay where they are: taking them out, for a machine of one CPU, takes a kernel a tenth of its boot;
/// - memory that comes is brought to use by the kernel itself: it takes only 1 GiB at once as long as somebody else has to.
fn command_line(params: &[String], grows: bool) -> String {
    let own = ["reboot=t", "pci=noearly", "noreplace-smp"];
    let memory = grows.then_some("memhp_default_state=online");
    params.iter().map(String::as_str).chain(own).chain(memory).collect::<Vec<_>>().join(" ")
}
