//! Which system calls each kind of thread makes.

use libc::c_long;

/// A system call, the number of an argument, and what that has to be. Any of several tests of a call is enough.
pub(super) type Checked = (c_long, u8, Test);

/// A test of an argument's lower 32 bits.
#[derive(Clone, Copy, Debug)]
pub(super) enum Test {
    Is(u64),
    Masked { mask: u64, value: u64 },
}

/// What a thread may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    /// Whatever the arguments.
    pub calls: &'static [&'static [c_long]],
    /// With these alone.
    pub checked: &'static [&'static [Checked]],
}

pub(super) const VHOST_USER: Table =
    Table { calls: &[LOOP, SOCKETS], checked: &[MEMORY, UNIX_SOCKETS, DESCRIPTORS] };

/// The main thread of a VMM, which makes the machine and all other threads, and so can do all of what those can.
pub(super) const API: Table = Table {
    calls: &[ABSENT, LOOP, SOCKETS, THREADS, MACHINE, DEVICES, FILES],
    checked: &[MEMORY, UNIX_SOCKETS, DESCRIPTORS, THREAD_FLAGS, OWN_THREAD, KVM, TAP, VHOST, DISK, VFIO],
};

/// A virtual processor. By its writes to a device's registers the guest starts and stops devices, so threads come from here too,
/// and a thread has its starter's filter beside its own: so all that devices do is let through here. Machines are made elsewhere.
const VCPU: Table = Table { calls: &[ABSENT, LOOP, SOCKETS, THREADS, DEVICES, FILES], ..API };
/// Memory that comes is for devices of the host, too.
const MEM: Table = Table { checked: &[MEMORY, INTERRUPTS, DMA], ..OTHER };
const VSOCK: Table =
    Table { calls: &[ABSENT, LOOP, SOCKETS], checked: &[MEMORY, INTERRUPTS, UNIX_SOCKETS, DESCRIPTORS] };
const BLOCK: Table =
    Table { calls: &[ABSENT, LOOP, FILES], checked: &[MEMORY, INTERRUPTS, DESCRIPTORS, DISK] };
const NET: Table = Table { calls: &[ABSENT, LOOP, VECTORS], checked: &[MEMORY, INTERRUPTS, TAP, VHOST] };
/// A vhost-user front end, which talks to its back end.
const SHARED_FS: Table =
    Table { calls: &[ABSENT, LOOP, SOCKETS, VECTORS], checked: &[MEMORY, INTERRUPTS, DESCRIPTORS] };
const OTHER: Table = Table { calls: &[ABSENT, LOOP, VECTORS], checked: &[MEMORY, INTERRUPTS] };

/// By the thread's name; `vcpu` has a number behind it.
pub(super) fn of_thread(name: &str) -> Table {
    match name {
        "virtio-vsock" => VSOCK,
        "virtio-block" => BLOCK,
        "virtio-net" => NET,
        "virtio-fs" => SHARED_FS,
        "virtio-mem" => MEM,
        name if name.starts_with("vcpu") => VCPU,
        _ => OTHER,
    }
}

/// An event loop over eventfds, and what the language's runtime does in it.
const LOOP: &[c_long] = &[
    // The loop and its descriptors.
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_create1,
    libc::SYS_timerfd_settime,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    // Mapping guest memory asks for its file's size first.
    libc::SYS_fstat,
    libc::SYS_statx,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_newfstatat,
    libc::SYS_lseek,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // The runtime: locks, hash seeds, clocks without vDSO, the end.
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Of sockets that are there.
const SOCKETS: &[c_long] = &[
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_getsockname,
];

/// A thread's start and end, its own filter, and waking another.
const THREADS: &[c_long] = &[
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_sched_getaffinity,
    libc::SYS_seccomp,
];

/// A thread's name, and what its filter wants first; not whether others may look into the process.
const OWN_THREAD: &[Checked] = &[
    (libc::SYS_prctl, 0, Test::Is(bits(libc::PR_SET_NAME))),
    (libc::SYS_prctl, 0, Test::Is(bits(libc::PR_SET_NO_NEW_PRIVS))),
];

/// Making a machine.
const MACHINE: &[c_long] = &[libc::SYS_memfd_create, libc::SYS_ftruncate, libc::SYS_sendfile];

/// Making devices, and having them begin.
const DEVICES: &[c_long] = &[
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_dup,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
];

/// Of files that are open.
const FILES: &[c_long] = &[
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
];
const VECTORS: &[c_long] = &[libc::SYS_readv, libc::SYS_writev];

/// Let through here, and then answered as not there, see [`super::apply`].
pub(super) const ABSENT: &[c_long] = &[libc::SYS_clone3, libc::SYS_openat];

const EXECUTABLE: Test = Test::Masked { mask: bits(libc::PROT_EXEC), value: 0 };
const MEMORY: &[Checked] = &[(libc::SYS_mmap, 2, EXECUTABLE), (libc::SYS_mprotect, 2, EXECUTABLE)];
const UNIX_SOCKETS: &[Checked] = &[(libc::SYS_socket, 0, Test::Is(bits(libc::AF_UNIX)))];
const DESCRIPTORS: &[Checked] = &[
    (libc::SYS_fcntl, 1, Test::Is(bits(libc::F_DUPFD_CLOEXEC))),
    (libc::SYS_fcntl, 1, Test::Is(bits(libc::F_GETFD))),
    (libc::SYS_fcntl, 1, Test::Is(bits(libc::F_SETFD))),
    (libc::SYS_fcntl, 1, Test::Is(bits(libc::F_GETFL))),
    (libc::SYS_fcntl, 1, Test::Is(bits(libc::F_SETFL))),
];

/// A thread, as opposed to a process, and nothing in a namespace of its own.
const THREAD_FLAGS: &[Checked] = &[(
    libc::SYS_clone,
    0,
    Test::Masked {
        mask: bits(
            libc::CLONE_THREAD
                | libc::CLONE_NEWUSER
                | libc::CLONE_NEWNS
                | libc::CLONE_NEWNET
                | libc::CLONE_NEWPID
                | libc::CLONE_NEWIPC
                | libc::CLONE_NEWUTS
                | libc::CLONE_NEWCGROUP,
        ),
        value: bits(libc::CLONE_THREAD),
    },
)];

/// Requests whose second byte is this, by which the kernel tells devices apart.
const fn requests_of(device: u64) -> Test {
    Test::Masked { mask: 0xff00, value: device << 8 }
}
const KVM: &[Checked] = &[(libc::SYS_ioctl, 1, requests_of(0xae))];
/// A device's thread routes its interrupt when it first raises it: KVM_SET_GSI_ROUTING and KVM_IRQFD, and nothing else of KVM's.
const INTERRUPTS: &[Checked] =
    &[(libc::SYS_ioctl, 1, Test::Is(0x4008_ae6a)), (libc::SYS_ioctl, 1, Test::Is(0x4020_ae76))];
const VHOST: &[Checked] = &[(libc::SYS_ioctl, 1, requests_of(0xaf))];
/// TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNSETQUEUE, TUNGETFEATURES and TUNGETIFF: the terminal's requests have the same second byte. And
/// whether to block (FIONBIO).
const TAP: &[Checked] = &[
    (libc::SYS_ioctl, 1, Test::Is(0x4004_54d0)),
    (libc::SYS_ioctl, 1, Test::Is(0x4004_54d8)),
    (libc::SYS_ioctl, 1, Test::Is(0x4004_54d9)),
    (libc::SYS_ioctl, 1, Test::Is(0x8004_54cf)),
    (libc::SYS_ioctl, 1, Test::Is(0x8004_54d2)),
    (libc::SYS_ioctl, 1, Test::Is(0x5421)),
];
/// Block devices: sizes, discard, zeroes.
const DISK: &[Checked] = &[(libc::SYS_ioctl, 1, requests_of(0x12))];

/// Devices of the host, from their container to their reset.
#[cfg(feature = "vfio")]
const VFIO: &[Checked] = &[(libc::SYS_ioctl, 1, requests_of(0x3b))];
#[cfg(not(feature = "vfio"))]
const VFIO: &[Checked] = &[];
/// VFIO_IOMMU_MAP_DMA and VFIO_IOMMU_UNMAP_DMA.
#[cfg(feature = "vfio")]
const DMA: &[Checked] = &[(libc::SYS_ioctl, 1, Test::Is(0x3b71)), (libc::SYS_ioctl, 1, Test::Is(0x3b72))];
#[cfg(not(feature = "vfio"))]
const DMA: &[Checked] = &[];

/// A flag of the kernel's as the register has it.
const fn bits(flag: i32) -> u64 {
    flag.cast_unsigned() as u64
}
