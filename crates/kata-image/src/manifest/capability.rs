//! What guests of an image can do: the names that this project asks for, and how it asks.
//!
//! The first group is what the kernel and its modules bring, the second what is in the root.

/// The guest mounts virtio-fs.
pub const VIRTIO_FS: &str = "virtio-fs";
/// The guest has a virtio vsock device driver: without it there is no way to the agent.
pub const VSOCK: &str = "vsock";
/// The guest kernel filters system calls.
pub const SECCOMP: &str = "seccomp";
/// The guest kernel has the unified cgroup hierarchy.
pub const CGROUP_V2: &str = "cgroup-v2";
/// The guest mounts overlayfs.
pub const OVERLAY: &str = "overlay";
/// The guest mounts erofs.
pub const EROFS: &str = "erofs";
/// The guest mounts ext4.
pub const EXT4: &str = "ext4";
/// The guest has a virtio block driver.
pub const VIRTIO_BLK: &str = "virtio-blk";
/// The guest has a virtio network driver.
pub const VIRTIO_NET: &str = "virtio-net";
/// The guest finds virtio devices on a memory-mapped bus, as QEMU's `microvm` has them.
pub const VIRTIO_MMIO: &str = "virtio-mmio";
/// The guest finds virtio devices on PCI.
pub const VIRTIO_PCI: &str = "virtio-pci";
/// The guest has dm-verity.
pub const DM_VERITY: &str = "dm-verity";
/// The guest kernel starts hot-plugged processors.
pub const CPU_HOTPLUG: &str = "cpu-hotplug";
/// The guest kernel takes hot-plugged memory.
pub const MEMORY_HOTPLUG: &str = "memory-hotplug";

/// Something reads the disk with initdata before the agent starts.
pub const INITDATA: &str = "initdata";
/// The guest pulls container images itself.
pub const GUEST_PULL: &str = "guest-pull";
/// The agent asks a policy before it does what the host wants.
pub const POLICY: &str = "policy";
/// The guest runs services beside the agent.
pub const GUEST_SERVICES: &str = "guest-services";
/// The guest takes extension images: disks with further services.
pub const EXTENSIONS: &str = "extensions";

/// Something that an image has to be able to do, see [`Manifest::require`](super::Manifest::require).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need<'a> {
    /// One of the names of this module.
    pub capability: &'static str,
    /// The key or the annotation that asks for it, for the message.
    pub asked_by: &'a str,
}

impl<'a> Need<'a> {
    /// `asked_by`, a key or an annotation, needs `capability`.
    #[must_use]
    pub fn new(capability: &'static str, asked_by: &'a str) -> Self {
        Self { capability, asked_by }
    }
}

/// Which images have a capability, as the subject of a sentence.
pub(super) fn whose(capability: &str) -> &'static str {
    match capability {
        INITDATA | GUEST_SERVICES | EXTENSIONS => {
            "one of flavour services (`kata-ctl image build --flavour services`)"
        }
        GUEST_PULL => {
            "one of flavour services that was given a pull service (`kata-ctl image build --flavour services --image-pull PATH`)"
        }
        POLICY => {
            "one whose agent was built with the feature policy, as that of flavour services is (`kata-ctl image build --flavour services`)"
        }
        _ => "one with another kernel (`kata-ctl image build --kernel …`)",
    }
}
