//! What a VMM is told, and what it answers: JSON, a line each, over one connected unix socket.
//!
//! ```text
//!   client                                                     kata-vmm
//!   {"id":1,"command":{"create":{…}}}    with descriptors ──▶   has nothing yet but this socket and /dev/kvm
//!                                                        ◀──   {"id":1,"done":"nothing"}
//!   {"id":2,"command":"boot"}                            ──▶   the guest runs
//!                                                        ◀──   {"id":2,"done":"nothing"}
//!                                                        ◀──   {"event":{"ended":{"reason":"shutdown"}}}
//! ```
//!
//! Files, taps and sockets are never named by a path: their descriptors come along with the line (`SCM_RIGHTS`), and the command
//! says which of them by their number among these, from 0. A field that is not known here is refused.

use serde::{Deserialize, Serialize};

/// Longest line, in bytes. A longer one ends the connection.
pub const MAX_LINE: usize = 64 * 1024;
/// Most descriptors that come with one line; the kernel takes no more than 253.
pub const MAX_DESCRIPTORS: usize = 128;

/// Number of a descriptor among those that came with the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Descriptor(pub usize);

/// A line from the client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The answer's `id`.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// What a VMM can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// Makes the machine, once.
    Create(Box<MachineSpec>),
    /// Lets the guest run that was made, or go on where the snapshot stood.
    Boot,
    /// Stops all CPUs and devices.
    Pause,
    /// Lets them go on.
    Resume,
    /// Adds a disk to the running machine; the answer is where the guest finds it.
    AddDisk(DiskSpec),
    /// Adds a network interface.
    AddNic(NicSpec),
    /// Adds a device of the host.
    AddHostDevice(HostDeviceSpec),
    /// Writes the paused machine into two empty files, and leaves it paused. Not for a machine that has memory, processors or
    /// devices which came while it ran, or devices of the host.
    Snapshot(SnapshotSpec),
    /// Takes a device away; answered when the guest has let go of it.
    RemoveDevice {
        /// Which one.
        id: String,
    },
    /// Brings the machine to this size as far as it can.
    Resize(Size),
    /// What there is.
    Info,
    /// Counters of CPUs and devices.
    Metrics,
    /// Ends the process.
    Shutdown,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MachineSpec {
    /// Virtual CPUs, from 1.
    pub cpus: u32,
    /// Most virtual CPUs it can have later; at least `cpus`.
    pub max_cpus: u32,
    /// Memory.
    pub memory: MemorySpec,
    /// What its guest begins with.
    pub start: Start,
    /// Where the serial console's output goes; without it there is no serial port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<Descriptor>,
    /// The socket device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockSpec>,
    /// Files shared by a vhost-user process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_fs: Option<SharedFsSpec>,
    /// Disks that the machine starts with, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSpec>,
    /// Network interfaces that it starts with, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicSpec>,
    /// Devices of the host that it starts with, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_devices: Vec<HostDeviceSpec>,
}

/// What a guest begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// A kernel's first instruction.
    Kernel(KernelSpec),
    /// Where another machine stood. All else in [`MachineSpec`] is as it was for that one, but for the descriptors, the content
    /// and the limits of disks, the vsock device's context id, `prealloc` and `hugepages`; what else differs is [`FailureKind::Stale`].
    Snapshot(SnapshotSpec),
}

/// A kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct KernelSpec {
    /// Uncompressed ELF with a PVH note, or bzImage.
    pub kernel: Descriptor,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<Descriptor>,
    /// The kernel's command line.
    pub command_line: String,
}

/// The two files that a machine is written to and started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SnapshotSpec {
    /// Processors and devices. To write: a regular file without content, open for writing. To start from: open for reading.
    pub state: Descriptor,
    /// Memory, with holes where it is zero. To write: as `state`, open for reading, too, where `verify` is set. To start from: open
    /// for reading; nobody may change the file as long as a machine lives that started from it.
    pub memory: Descriptor,
    /// All of the memory file is read, and its checksum compared: before a machine starts from it, or after it was written.
    /// Otherwise only its size is looked at.
    #[serde(default)]
    pub verify: bool,
}

/// Guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MemorySpec {
    /// At the start, in MiB.
    pub size_mib: u64,
    /// Most that it can have later, in MiB; at least `size_mib`.
    pub max_mib: u64,
    /// All of it is taken from the host before the guest starts.
    #[serde(default)]
    pub prealloc: bool,
    /// It is on huge pages that the host has set aside.
    #[serde(default)]
    pub hugepages: bool,
    /// What the guest frees is given back to the host.
    #[serde(default)]
    pub reporting: bool,
}

/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VsockSpec {
    /// Context id of the guest, from 3.
    pub cid: u64,
    /// Listening unix socket with the `CONNECT <port>` handshake.
    pub listener: Descriptor,
    /// Name of the listener's socket in the directory that the VMM was started with (`--sockets`): the guest reaches the host's
    /// port P at `<name>_P` there. No descriptor of a directory is taken, for it would lead out of the VMM's root.
    pub name: String,
}

/// A virtio-fs share whose server runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SharedFsSpec {
    /// What the guest mounts.
    pub tag: String,
    /// Connected vhost-user socket.
    pub socket: Descriptor,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskSpec {
    /// Name among the machine's devices, and the disk's serial number (its first 20 bytes).
    pub id: String,
    /// Regular file or block device, raw.
    pub file: Descriptor,
    /// The guest may not write.
    pub readonly: bool,
    /// Most bytes a second, both directions together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// Most requests a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<u64>,
}

/// A network interface on taps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NicSpec {
    /// Name among the machine's devices.
    pub id: String,
    /// Hardware address that the guest sees.
    pub mac: [u8; 6],
    /// Largest packet, in bytes.
    pub mtu: u16,
    /// The tap, a descriptor a queue pair, with `IFF_VNET_HDR`.
    pub queues: Vec<Descriptor>,
    /// `/dev/vhost-net`, a descriptor a queue pair; without them this process carries the packets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vhost: Vec<Descriptor>,
}

/// A PCI device of the host, which is bound to `vfio-pci`. From the first one on all memory that the machine can have is pinned: the
/// process's limit of locked memory (`RLIMIT_MEMLOCK`) has to allow that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct HostDeviceSpec {
    /// Name among the machine's devices.
    pub id: String,
    /// Where it is on the host, as in `/sys/bus/pci/devices`: `0000:01:00.0`.
    pub address: String,
    /// `/dev/vfio/vfio`, newly opened.
    pub container: Descriptor,
    /// `/dev/vfio/GROUP`. Of two devices of one group both have the same open file.
    pub group: Descriptor,
    /// Number of its IOMMU group.
    pub group_number: u32,
}

/// How large a machine is, or is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Size {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// A line from the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", untagged)]
pub enum Reply {
    /// A command was carried out.
    Done {
        /// The request's.
        id: u64,
        /// What came of it.
        done: Answer,
    },
    /// A command failed, and changed nothing, but for three: a device that was held may still leave later, of a size that was
    /// not reached some may be there, and a snapshot's files may have been written to.
    Failed {
        /// The request's; 0 for a line that could not be read as a request.
        id: u64,
        /// Why.
        error: Failure,
    },
    /// Something happened by itself.
    Event {
        /// What.
        event: Event,
    },
}

/// What came of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is done.
    Nothing,
    /// Where the guest finds the new device: the number of its slot on the one PCI bus.
    Slot(u8),
    /// What there is.
    Info(Info),
    /// Name and value of each counter.
    Metrics(std::collections::BTreeMap<String, u64>),
}

/// What a VMM has and is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    /// The program's version.
    pub version: String,
    /// What the machine does.
    pub state: State,
    /// How large it is.
    pub size: Size,
    /// Threads of the CPUs, in their order.
    pub cpu_threads: Vec<u32>,
    /// Whether the process is confined, see [`crate`].
    pub jailed: bool,
}

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// There is none.
    Empty,
    /// It was made.
    Created,
    /// Its guest runs.
    Running,
    /// Its guest stands still.
    Paused,
}

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Failure {
    /// For programs.
    pub kind: FailureKind,
    /// For people: the whole chain of causes.
    pub message: String,
}

/// Kinds of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The line is no request, or its fields make no sense.
    Invalid,
    /// It does not fit what the machine does.
    WrongState,
    /// This VMM cannot do that.
    Unsupported,
    /// A device of that name is there already.
    Exists,
    /// No device of that name.
    NotFound,
    /// No slot is free.
    Full,
    /// The guest did not let go of a device in time.
    Held,
    /// No machine can start from this snapshot here: it is damaged, or of another build, another processor or another machine.
    Stale,
    /// The host refused something.
    Host,
}

/// Something that happened by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The machine has ended; the process ends next.
    Ended {
        /// How.
        reason: EndReason,
        /// More about it, for people; empty where there is nothing to add.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        detail: String,
    },
}

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// The guest powered off.
    Shutdown,
    /// The guest reset itself.
    Reset,
    /// A CPU did what cannot be emulated here.
    CpuFault,
    /// A device cannot go on.
    DeviceLost,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_field_is_refused_at_every_level() {
        for line in [
            r#"{"id":1,"command":"boot","x":1}"#,
            r#"{"id":1,"command":{"remove-device":{"id":"a","x":1}}}"#,
            r#"{"id":1,"command":{"resize":{"cpus":1,"memory-mib":64,"x":1}}}"#,
            r#"{"id":1,"command":"dance"}"#,
        ] {
            assert!(serde_json::from_str::<Request>(line).is_err(), "{line}");
        }
    }

    #[test]
    fn lines_read_as_the_documentation_shows_them() {
        let boot: Request = serde_json::from_str(r#"{"id":2,"command":"boot"}"#).unwrap();
        assert_eq!(boot, Request { id: 2, command: Command::Boot });
        let ended =
            Reply::Event { event: Event::Ended { reason: EndReason::Shutdown, detail: String::new() } };
        assert_eq!(serde_json::to_string(&ended).unwrap(), r#"{"event":{"ended":{"reason":"shutdown"}}}"#);
        let done = Reply::Done { id: 1, done: Answer::Nothing };
        assert_eq!(serde_json::to_string(&done).unwrap(), r#"{"id":1,"done":"nothing"}"#);
    }
}
