//! `[hypervisor.*]`: upstream's keys that this version does not act on.

use super::Reach::{Arguments, Path, Program};
use super::kind::Kind::{Boolean, List, Text, Word};
use super::{HYPERVISOR, Key, Kind};

const COUNT: Kind = Kind::COUNT;
const PATH: Kind = Kind::Path;
const PORT: &[&str] = &["no-port", "root-port", "switch-port", "bridge-port"];
const BLOCK: &[&str] = &[
    "virtio-blk",
    "virtio-blk-pci",
    "virtio-blk-mmio",
    "virtio-blk-ccw",
    "virtio-scsi",
    "virtio-pmem",
    "virtio-mmio",
    "nvdimm",
];
const CLH: &[&str] = &["clh", "cloud-hypervisor"];
const FC: &[&str] = &["firecracker", "fc"];
const QEMU: &[&str] = &["qemu"];
const REMOTE: &[&str] = &["remote"];
const SWAP: &[&str] = &["clh", "cloud-hypervisor", "dragonball", "openvmm", "qemu"];
const TEMPLATE: &[&str] = &["qemu", "clh", "cloud-hypervisor", "dragonball"];

const fn key(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Key {
    Key::planned(HYPERVISOR, name, kind, default, doc)
}

const fn integer(least: i64, most: u64) -> Kind {
    Kind::Integer { least, most }
}

pub(super) const KEYS: &[Key] = &[
    // What is booted.
    key("pflashes", List, "[]", "Flash images of the machine.").on(QEMU),
    key("rootfs_type", Word(&["ext4", "xfs", "erofs"]), "\"ext4\"", "File system of the guest's root image.").harmless(&["\"erofs\""]),
    key("vm_rootfs_driver", Word(BLOCK), "\"virtio-pmem\"", "Device that the guest's root image is behind; here always virtio-blk.")
        .rust()
        .harmless(&["\"virtio-blk-pci\"", "\"virtio-blk-ccw\"", "\"virtio-mmio\"", "\"virtio-blk-mmio\""]),
    key("disable_image_nvdimm", Boolean, "false", "Puts the root image behind virtio-blk instead of an NVDIMM, as this version always does.")
        .harmless(&["true"])
        .annotated(),
    key("kernel_verity_params", Text, "\"\"", "dm-verity of the root image: `root_hash=…,salt=…,data_blocks=…,data_block_size=…,hash_block_size=…`.")
        .annotated(),
    // How large.
    key("memory_offset", COUNT, "0", "Address space set aside for NVDIMMs.").unit("MiB").annotated(),
    key("enable_virtio_mem", Boolean, "false", "Lets memory grow and shrink by virtio-mem.").annotated(),
    key("enable_guest_swap", Boolean, "false", "Gives the guest a swap device.").on(SWAP).annotated(),
    key("guest_swap_path", PATH, "\"/run/kata-containers/swap\"", "Directory of the guests' swap files on the host.").rust().on(SWAP).inert(),
    key("guest_swap_size_percent", COUNT, "100", "Size of the swap device, in parts of the memory.").rust().on(SWAP).unit("%").inert(),
    key("guest_swap_create_threshold_secs", COUNT, "60", "How long to wait before there is swap.").rust().on(SWAP).unit("s").inert(),
    // The machine.
    key("machine_accelerators", Text, "\"\"", "Further options of the machine, separated by commas.")
        .on(QEMU)
        .annotated()
        .reach(Arguments),
    key("cpu_features", Text, "\"\"", "Features added to or taken from the processor, separated by commas.")
        .on(QEMU)
        .harmless(&["\"pmu=off\""])
        .annotated()
        .reach(Arguments),
    key("default_bridges", integer(0, 5), "1", "PCI bridges for what is plugged in later.").harmless(&["0"]),
    key("pcie_root_port", integer(0, 16), "0", "PCIe root ports for what is plugged in later.").on(QEMU).annotated(),
    key("pcie_switch_port", integer(0, 16), "0", "PCIe switch ports for what is plugged in later.").on(QEMU).annotated(),
    key("cold_plug_vfio", Word(PORT), "\"no-port\"", "Port that devices of the host are behind from the start.").on(QEMU).annotated(),
    key("enable_iommu", Boolean, "false", "An IOMMU in the guest.").annotated(),
    key("enable_iommu_platform", Boolean, "false", "Has virtio devices use the guest's IOMMU.").on(QEMU).annotated(),
    key("entropy_source", PATH, "\"/dev/urandom\"", "Where the guest's entropy comes from; here always the machine monitor's own generator.")
        .annotated()
        .reach(Path("valid_entropy_sources")),
    key("disable_nested_virtualization", Boolean, "false", "Hides virtualisation from the guest.").on(CLH),
    key("disable_nesting_checks", Boolean, "false", "Ignores that the host is a virtual machine itself. Nothing here depends on it.").inert(),
    // Files and disks.
    key("virtio_fs_cache_size", COUNT, "0", "Window of virtio-fs for direct access; 0 is none.").unit("MiB").annotated(),
    key("virtio_fs_queue_size", COUNT, "1024", "Length of virtio-fs's queues.").inert(),
    key("virtio_fs_inode_file_handles", Word(&["never", "prefer", "mandatory"]), "\"prefer\"", "Whether the virtio-fs daemon uses file handles.")
        .inert(),
    key("disable_block_device_use", Boolean, "false", "Shares a root file system that is on a block device by virtio-fs, instead of plugging the device.")
        .annotated()
        .harmless(&["true"]),
    key("block_device_driver", Word(BLOCK), "\"virtio-scsi\"", "Device that disks are behind; here always virtio-blk.")
        .annotated()
        .harmless(&["\"virtio-blk-pci\"", "\"virtio-blk-ccw\"", "\"virtio-blk\"", "\"virtio-blk-mmio\"", "\"virtio-mmio\""]),
    key("block_device_aio", Word(&["threads", "native", "io_uring"]), "\"io_uring\"", "How the machine monitor reads and writes disks.")
        .annotated()
        .inert(),
    key("block_device_cache_set", Boolean, "false", "Whether the two cache settings below are given to disks.").annotated(),
    key("block_device_cache_direct", Boolean, "false", "Goes past the host's page cache.").annotated(),
    key("block_device_cache_noflush", Boolean, "false", "Ignores the guest's requests to flush.").annotated(),
    key("block_device_logical_sector_size", COUNT, "0", "Logical sector of disks; 0 is the machine monitor's default.")
        .rust()
        .unit("byte")
        .annotation("blk_logical_sector_size"),
    key("block_device_physical_sector_size", COUNT, "0", "Physical sector of disks; 0 is the machine monitor's default.")
        .rust()
        .unit("byte")
        .annotation("blk_physical_sector_size"),
    key("queue_size", COUNT, "128", "Length of a disk's queues.").rust().annotation("block_device_queue_size").inert(),
    key("num_queues", COUNT, "1", "Queues of a disk.").rust().annotation("block_device_num_queues").inert(),
    key("enable_iothreads", Boolean, "false", "Serves disks from threads of their own.").annotated(),
    key("indep_iothreads", COUNT, "0", "Threads for disks that are plugged in later.").rust().annotated(),
    key("enable_vhost_user_store", Boolean, "false", "Disks served by other processes over vhost-user.").annotated(),
    key("vhost_user_store_path", PATH, "\"/var/run/kata-containers/vhost-user\"", "Directory of vhost-user disks and their sockets.")
        .annotated()
        .reach(Path("valid_vhost_user_store_paths"))
        .inert(),
    key("disk_rate_limiter_bw_one_time_burst", COUNT, "0", "What of the bandwidth may be used at once at first.").unit("bit"),
    key("disk_rate_limiter_ops_one_time_burst", COUNT, "0", "What of the operations may be used at once at first."),
    // Confinement and confidence.
    key("rootless", Boolean, "false", "Runs the machine monitor as a user of its own, as this version always does: see runtime.uid_range.")
        .harmless(&["true"])
        .annotated(),
    key("rootless_user", Text, "\"\"", "The user that a machine monitor runs as.").rust(),
    key("disable_seccomp", Boolean, "false", "Leaves the machine monitor without its seccomp filter.")
        .on(&["clh", "cloud-hypervisor", "firecracker", "fc", "dragonball", "openvmm"]),
    key("disable_selinux", Boolean, "false", "Leaves the machine monitor's SELinux label as it is.").harmless(&["true"]),
    key("selinux_label", Text, "\"\"", "SELinux label of the machine monitor."),
    key("disable_guest_selinux", Boolean, "true", "Leaves containers in the guest without SELinux labels."),
    // Allow-lists of what is not carried.
    key("valid_ctlpaths", List, "[]", "Patterns of control programs that an annotation may name.").inert(),
    key("valid_jailer_paths", List, "[]", "Patterns of jailers that an annotation may name.").on(FC).inert(),
    key("valid_vhost_user_store_paths", List, "[]", "Patterns of directories that the annotation vhost_user_store_path may name.").inert(),
    key("ctlpath", PATH, "\"\"", "Control program of the machine monitor.").reach(Program("valid_ctlpaths")),
    key("jailer_path", PATH, "\"\"", "Firecracker's jailer.").on(FC).annotated().reach(Program("valid_jailer_paths")),
    // Looking into it.
    key("log_level", integer(0, 4), "1", "Verbosity of the machine monitor.").rust().inert(),
    key("extra_monitor_socket", Word(&["", "hmp", "qmp", "qmp-pretty"]), "\"\"", "A further socket that rules the machine.").on(QEMU),
    key("guest_memory_dump_path", PATH, "\"\"", "Directory for a dump of the guest's memory when its kernel panics.").on(QEMU),
    key("guest_memory_dump_paging", Boolean, "false", "Dumps with the guest's virtual addresses.").on(QEMU),
    // Starting fast.
    key("boot_to_be_template", Boolean, "false", "Boots the machine that others will be copies of. Set by upstream's runtime itself.").rust().on(TEMPLATE),
    key("boot_from_template", Boolean, "false", "Starts as a copy. Set by upstream's runtime itself.").rust().on(TEMPLATE),
    key("memory_path", PATH, "\"\"", "Memory of the machine to copy.").rust().on(TEMPLATE),
    key("device_state_path", PATH, "\"\"", "State of the machine to copy.").rust().on(TEMPLATE),
    // The remote driver.
    key("remote_hypervisor_socket", PATH, "\"/run/peerpod/hypervisor.sock\"", "Socket of the service that makes machines elsewhere.").on(REMOTE),
    key("remote_hypervisor_timeout", COUNT, "600", "Bound on making a machine elsewhere.").on(REMOTE).unit("s"),
    key("default_gpus", COUNT, "0", "GPUs of a machine elsewhere.").on(REMOTE).annotated(),
    key("default_gpu_model", Text, "\"\"", "Model of those GPUs.").on(REMOTE).annotated(),
];
