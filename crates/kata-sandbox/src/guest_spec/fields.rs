//! Every field of the OCI runtime specification for Linux, and what becomes of it.
//!
//! The tests beside it hold the list against the specification (none is missing, none is too much) and against the
//! translation (what is in the guest reaches the wire, what means nothing does not, what is refused is refused by this
//! name). `cargo xtask docs` makes a page of it, and reads this file as it is: it uses the standard library only.

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The guest does it; how, where that needs a word.
    Guest(&'static str),
    /// The host does it; how.
    Host(&'static str),
    /// It is not told to the guest, and no container can tell; why.
    Meaningless(&'static str),
    /// A container that asks for it is not made; why.
    Refused(&'static str),
}

/// One row.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// As in `config.json`; all fields below it are meant too, unless they have a row. `[]` is each of a list.
    pub path: &'static str,
    /// What becomes of it.
    pub fate: Fate,
    /// The test that saw it; for what means nothing and what is refused, the test of all such rows.
    pub test: &'static str,
}

use Fate::{Guest, Host, Meaningless, Refused};

/// The test of all rows that say `Meaningless`.
pub const DROPPED: &str = "what_means_nothing_in_the_guest_is_not_told_to_it";
/// The test of all rows that say `Refused`.
pub const REFUSED: &str = "each_field_that_is_refused_is_refused_by_its_name";

const fn guest(path: &'static str, how: &'static str, test: &'static str) -> Field {
    Field { path, fate: Guest(how), test }
}

const fn host(path: &'static str, how: &'static str, test: &'static str) -> Field {
    Field { path, fate: Host(how), test }
}

const fn meaningless(path: &'static str, why: &'static str) -> Field {
    Field { path, fate: Meaningless(why), test: DROPPED }
}

const fn refused(path: &'static str, why: &'static str) -> Field {
    Field { path, fate: Refused(why), test: REFUSED }
}

const NO_FIELD: &str = "the guest protocol has no field for it";
const NO_LIMIT: &str = "control groups of version 2, which the guest has, know no such limit";
const HOST_DISK: &str = "names a disk of the host";
const PLATFORM: &str = "another platform";

/// All rows, in the order of the specification.
pub const FIELDS: &[Field] = &[
    guest(
        "ociVersion",
        "in the state that hooks are told",
        "a_hook_before_the_root_is_entered_sees_guest_and_container",
    ),
    host(
        "root.path",
        "shared with the guest, or a disk of its machine",
        "root_file_system_may_be_a_directory",
    ),
    guest("root.readonly", "", "security_context_of_a_container_is_in_force"),
    guest(
        "mounts[]",
        "sources on the host come through the share or as disks",
        "directory_environment_and_mounts_are_as_asked",
    ),
    refused("mounts[].uidMappings", NO_FIELD),
    refused("mounts[].gidMappings", NO_FIELD),
    guest("process.terminal", "", "terminal_has_the_clients_size"),
    guest("process.consoleSize", "", "a_terminal_has_its_size_from_the_start"),
    guest("process.user", "", "security_context_of_a_container_is_in_force"),
    guest("process.user.umask", "this project's agent only", "security_context_of_a_container_is_in_force"),
    meaningless("process.user.username", "users have names on Windows only; on Linux they are numbers"),
    guest("process.args", "", "output_errors_and_exit_code_reach_the_client"),
    refused("process.commandLine", PLATFORM),
    guest("process.env", "", "directory_environment_and_mounts_are_as_asked"),
    guest("process.cwd", "", "directory_environment_and_mounts_are_as_asked"),
    guest("process.capabilities", "", "security_context_of_a_container_is_in_force"),
    guest("process.rlimits[]", "", "security_context_of_a_container_is_in_force"),
    guest("process.noNewPrivileges", "", "security_context_of_a_container_is_in_force"),
    meaningless(
        "process.apparmorProfile",
        "a profile is loaded into the kernel of the host, and Kubernetes names one for every container there; the guest's \
         kernel has none. It confines a container from its host, as the machine does",
    ),
    guest("process.oomScoreAdj", "", "security_context_of_a_container_is_in_force"),
    meaningless(
        "process.selinuxLabel",
        "a label is of the host's policy, and every container has one there; the guest's kernel has no policy",
    ),
    refused("process.ioPriority", NO_FIELD),
    refused("process.scheduler", NO_FIELD),
    refused("process.execCPUAffinity", "names processors of the host"),
    guest("hostname", "", "names_limits_and_hooks_of_a_specification_reach_the_guest"),
    guest(
        "domainname",
        "this project's agent only",
        "names_limits_and_hooks_of_a_specification_reach_the_guest",
    ),
    host("hooks.prestart[]", "programs of the host", "prestart_hooks_come_before_create_runtime_hooks"),
    host("hooks.createRuntime[]", "programs of the host", "hooks_of_a_container_run_at_their_moments"),
    guest(
        "hooks.createContainer[]",
        "programs of the guest image, run in the container's namespaces before its root is entered",
        "a_hook_before_the_root_is_entered_sees_guest_and_container",
    ),
    guest(
        "hooks.startContainer[]",
        "programs of the container, run before its command and with its rights",
        "names_limits_and_hooks_of_a_specification_reach_the_guest",
    ),
    host("hooks.poststart[]", "programs of the host", "hooks_of_a_container_run_at_their_moments"),
    host("hooks.poststop[]", "programs of the host", "hooks_of_a_container_run_at_their_moments"),
    guest(
        "annotations",
        "in the state that hooks are told",
        "a_hook_before_the_root_is_entered_sees_guest_and_container",
    ),
    refused("linux.netDevices", "the pod's interfaces are its machine's"),
    refused("linux.uidMappings[]", "users of the guest are none of the host already"),
    refused("linux.gidMappings[]", "users of the guest are none of the host already"),
    guest(
        "linux.sysctl",
        "of the container's namespaces and the pod's network; others are refused",
        "names_limits_and_hooks_of_a_specification_reach_the_guest",
    ),
    guest("linux.resources.devices[]", "", "a_device_that_no_rule_allows_cannot_be_opened"),
    guest("linux.resources.memory.limit", "", "memory_beyond_the_limit_is_137_and_an_oom_event"),
    guest("linux.resources.memory.reservation", "", "memory_limits_become_their_files"),
    guest("linux.resources.memory.swap", "", "swap_is_what_is_left_above_memory"),
    refused("linux.resources.memory.kernel", NO_LIMIT),
    refused("linux.resources.memory.kernelTCP", NO_LIMIT),
    refused("linux.resources.memory.swappiness", NO_LIMIT),
    refused("linux.resources.memory.disableOOMKiller", NO_LIMIT),
    meaningless("linux.resources.memory.useHierarchy", "control groups of version 2 always are hierarchical"),
    refused("linux.resources.memory.checkBeforeUpdate", NO_FIELD),
    guest("linux.resources.cpu.shares", "", "cpu_limits_become_their_files"),
    guest("linux.resources.cpu.quota", "", "cpu_limits_become_their_files"),
    guest("linux.resources.cpu.period", "", "cpu_limits_become_their_files"),
    refused("linux.resources.cpu.burst", NO_FIELD),
    refused("linux.resources.cpu.idle", NO_FIELD),
    refused("linux.resources.cpu.realtimeRuntime", NO_LIMIT),
    refused("linux.resources.cpu.realtimePeriod", NO_LIMIT),
    meaningless(
        "linux.resources.cpu.cpus",
        "processors of the host; Kubernetes' static policy names some for every container. The guest has its own",
    ),
    meaningless("linux.resources.cpu.mems", "memory nodes of the host; the guest has its own"),
    guest("linux.resources.pids.limit", "", "names_limits_and_hooks_of_a_specification_reach_the_guest"),
    guest("linux.resources.blockIO.weight", "", "io_weight_falls_back_to_the_other_scheduler"),
    refused("linux.resources.blockIO.leafWeight", NO_LIMIT),
    refused("linux.resources.blockIO.weightDevice[]", HOST_DISK),
    refused("linux.resources.blockIO.throttleReadBpsDevice[]", HOST_DISK),
    refused("linux.resources.blockIO.throttleWriteBpsDevice[]", HOST_DISK),
    refused("linux.resources.blockIO.throttleReadIOPSDevice[]", HOST_DISK),
    refused("linux.resources.blockIO.throttleWriteIOPSDevice[]", HOST_DISK),
    guest("linux.resources.hugepageLimits[]", "", "pids_io_and_huge_pages_become_their_files"),
    refused("linux.resources.network.classID", NO_LIMIT),
    refused("linux.resources.network.priorities[]", NO_LIMIT),
    refused("linux.resources.rdma", NO_FIELD),
    guest(
        "linux.resources.unified",
        "this project's agent only; another is not told `memory.oom.group`, which Kubernetes sets for every container, and \
         everything else is refused there",
        "names_limits_and_hooks_of_a_specification_reach_the_guest",
    ),
    host(
        "linux.cgroupsPath",
        "the pod's group on the host; in the guest each container has one by its id",
        "what_belongs_to_the_host_does_not_reach_the_guest",
    ),
    guest(
        "linux.namespaces[]",
        "the network is the machine's; paths name the host's namespaces, and mean the pod's",
        "further_container_joins_the_pods_owner_and_machine",
    ),
    guest("linux.devices[]", "", "security_context_of_a_container_is_in_force"),
    guest(
        "linux.seccomp",
        "unless runtime.disable_guest_seccomp",
        "security_context_of_a_container_is_in_force",
    ),
    refused(
        "linux.seccomp.defaultErrnoRet",
        "the guest protocol has no field for it, and EPERM, which is the default, needs none",
    ),
    refused("linux.seccomp.listenerPath", NO_FIELD),
    refused("linux.seccomp.listenerMetadata", NO_FIELD),
    guest("linux.rootfsPropagation", "", "propagation_of_the_root_and_of_mounts_is_set"),
    guest("linux.maskedPaths[]", "", "security_context_of_a_container_is_in_force"),
    guest("linux.readonlyPaths[]", "", "security_context_of_a_container_is_in_force"),
    meaningless("linux.mountLabel", "a label of the host's policy; the guest's kernel has none"),
    refused(
        "linux.intelRdt",
        "caches and bandwidth are the host's, and all of a pod's containers share its machine",
    ),
    refused("linux.memoryPolicy", NO_FIELD),
    refused(
        "linux.personality",
        "the guest protocol has no field for it; LINUX without flags, the default, needs none",
    ),
    refused("linux.timeOffsets", NO_FIELD),
    refused("solaris", PLATFORM),
    refused("windows", PLATFORM),
    refused("vm", PLATFORM),
    refused("zos", PLATFORM),
];
