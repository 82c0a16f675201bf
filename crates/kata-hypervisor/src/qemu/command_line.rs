//! QEMU's command line: a pure function of the machine wanted and the numbers of its file descriptors.
//!
//! No option here is newer than QEMU 7.2, and none is gone by 10.0, so the version need not be known.
//!
//! Boots measured under TCG on a busy machine: QEMU 7.2, a distribution's kernel 6.1, a 2 MB initramfs, virtio-rng as the only
//! device; CPU seconds from exec to the end, least of 1 to 5 runs. Equal variants differed by up to 0.2 s, so less means nothing.
//!
//! | variant | s | what follows |
//! |---|---|---|
//! | q35, `i8042=off`, `reboot=t` | 1.3–1.5 | |
//! | the same with `reboot=k` | 2.7–3.0 | `reboot=t` is added |
//! | bzImage instead of the ELF kernel | 1.6–1.8 | prefer the ELF kernel |
//! | microvm without `tsc_early_khz` | 1.3, or hangs | the rate is told |
//! | q35, one processor: `hpet=on` and `noapictimer` | 0.1 less | done under TCG |
//! | q35 with qboot | 0.03 less, 0.1 with all our devices | not done: not every distribution's QEMU has it |
//! | q35: hpet alone, i8042, `thread=single`, `tb-size`, pvpanic | 1.3–1.5 | no difference seen; left as they are simplest |
//! | q35 with `-cpu qemu64` | 1.3–1.5 | `max` all the same: containers may need the instructions |

use std::os::fd::RawFd;

use serde_json::Value;

use super::{confidential, throttle};
use crate::slots::BRIDGE_SLOT;
use crate::vm::{Accelerator, Backing, DiskLimits, Growth, Machine, serial};

/// What every machine needs.
const REBOOT: &str = "reboot=t";
/// Identifier of the bridge of a q35 that devices are plugged into while it runs. The root bus itself takes none then.
pub(super) const BRIDGE: &str = "bridge";
/// Name of the disk that the guest boots from.
pub(super) const IMAGE: &str = "image";

/// File descriptors as QEMU sees them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fds {
    /// Connected socket of the control channel.
    pub qmp: RawFd,
    /// Connected socket of the serial console.
    pub console: RawFd,
    /// Connected vhost-user socket of the vsock back end.
    pub vsock: RawFd,
    /// Guest kernel.
    pub kernel: RawFd,
    /// Initial RAM disk.
    pub initrd: Option<RawFd>,
    /// Firmware instead of QEMU's own.
    pub firmware: Option<RawFd>,
    /// Connected vhost-user socket of the virtio-fs daemon.
    pub shared_fs: Option<RawFd>,
}

/// What QEMU is to emulate.
#[derive(Clone, Debug)]
pub(super) struct Plan<'a> {
    pub id: &'a str,
    pub machine: Machine,
    pub accelerator: Accelerator,
    pub vcpus: u32,
    pub memory_mib: u64,
    pub growth: Option<Growth>,
    pub backing: Backing,
    pub kernel_params: &'a [String],
    pub shared_fs_tag: Option<&'a str>,
    pub nics: &'a [NicPlan],
    pub disks: &'a [DiskPlan],
    pub disk_limits: DiskLimits,
    pub seccomp_sandbox: &'a str,
    /// Rate of the time stamp counter where the guest cannot be trusted to find it out, see [`super::clock`].
    pub tsc_khz: Option<u64>,
    /// What keeps the machine's memory from the host, see [`super::confidential`].
    pub confidential: Option<Value>,
    pub fds: Fds,
}

/// A raw disk that the machine starts with, read-only.
#[derive(Clone, Debug)]
pub(super) struct DiskPlan {
    /// Its name, and the serial number that the guest sees.
    pub id: String,
    pub fd: RawFd,
}

/// A network interface that the machine starts with.
#[derive(Clone, Debug)]
pub(super) struct NicPlan {
    pub mac: [u8; 6],
    pub mtu: u16,
    /// The tap, one descriptor a queue pair.
    pub fds: Vec<RawFd>,
    /// `/dev/vhost-net`, as many or none.
    pub vhost: Vec<RawFd>,
}

/// All of QEMU's arguments, without its own name.
pub(super) fn command_line(plan: &Plan<'_>) -> Vec<String> {
    let mut line = Line::default();
    machine(plan, &mut line);
    memory_and_kernel(plan, &mut line);
    channels(plan, &mut line);
    devices(plan, &mut line);
    line.0
}

#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.to_owned());
    }

    fn option(&mut self, option: &str, value: impl Into<String>) {
        self.flag(option);
        self.0.push(value.into());
    }
}

fn machine(plan: &Plan<'_>, line: &mut Line) {
    line.option("-name", format!("guest={}", escaped(plan.id)));
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        line.flag(flag);
    }
    // Unlike -nographic this does not make the firmware talk on the serial line.
    line.option("-display", "none");
    if !plan.seccomp_sandbox.is_empty() {
        line.option("-sandbox", plan.seccomp_sandbox);
    }
    let hpet = if ticks_by_hpet(plan) { "on" } else { "off" };
    let machine = match plan.machine {
        Machine::Q35 => {
            &format!("q35,memory-backend=ram,vmport=off,smbus=off,sata=off,usb=off,hpet={hpet},i8042=off")
        }
        // Without ACPI the guest does not get past its timers.
        Machine::Microvm => "microvm,memory-backend=ram,acpi=on,rtc=on,isa-serial=on",
    };
    let tee = if plan.confidential.is_some() { confidential::MACHINE } else { "" };
    line.option("-machine", format!("{machine}{tee}"));
    match plan.accelerator {
        Accelerator::Kvm => {
            line.option("-accel", "kvm");
            line.option("-cpu", confidential::cpu(plan.confidential.as_ref()));
        }
        Accelerator::Tcg => {
            line.option("-accel", "tcg,thread=multi");
            line.option("-cpu", "max");
        }
    }
    line.option(
        "-smp",
        match plan.growth.filter(|growth| growth.vcpus > plan.vcpus) {
            Some(growth) => format!("{},maxcpus={}", plan.vcpus, growth.vcpus),
            None => plan.vcpus.to_string(),
        },
    );
}

fn memory_and_kernel(plan: &Plan<'_>, line: &mut Line) {
    let room = match plan.growth.filter(|growth| growth.slots > 0 && growth.memory_mib > plan.memory_mib) {
        Some(growth) => format!(",slots={},maxmem={}M", growth.slots, growth.memory_mib),
        None => String::new(),
    };
    line.option("-m", format!("{}M{room}", plan.memory_mib));
    // vhost-user back ends map the guest's memory, so it has to be shareable.
    let mut ram = format!("memory-backend-memfd,id=ram,size={}M,share=on", plan.memory_mib);
    if plan.backing.prealloc {
        ram.push_str(",prealloc=on");
    }
    if plan.backing.hugepages {
        ram.push_str(",hugetlb=on");
    }
    line.option("-object", ram);
    if let Some(object) = &plan.confidential {
        line.option("-object", object.to_string());
    }
    if let Some(firmware) = plan.fds.firmware {
        line.option("-bios", open_file(firmware));
    }
    line.option("-kernel", open_file(plan.fds.kernel));
    if let Some(initrd) = plan.fds.initrd {
        line.option("-initrd", open_file(initrd));
    }
    line.option("-append", kernel_command_line(plan));
}

/// By way of `/proc` a file that QEMU holds open can be named, wherever it is.
fn open_file(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

/// The spec's parameters and what the machine needs. There is no keyboard controller to reset the machine by, and looking for
/// one takes the kernel 1.4 s; a triple fault always works. The last of several `reboot=` counts.
///
/// Of what a kernel does at boot, two things serve nothing under emulation and cost 0.1 s: it tests the wiring of the timer,
/// and patches each lock prefix out of its code where it finds one processor.
///
/// `clearcpuid=141` keeps the kernel (and no program) from cmpxchg16b. Under QEMU 7.2 that instruction can leave rubbish in the
/// flags; a timer's interrupt right behind it then ends the boot in an oops (seen with 20 machines at once on two processors).
fn kernel_command_line(plan: &Plan<'_>) -> String {
    let clock = plan.tsc_khz.map(|khz| format!("tsc_early_khz={khz} tsc=reliable"));
    let emulated: &[&str] = match plan.accelerator {
        Accelerator::Tcg => &["no_timer_check", "noreplace-smp", "clearcpuid=141"],
        Accelerator::Kvm => &[],
    };
    let timer = ticks_by_hpet(plan).then_some("noapictimer");
    let own = clock.as_deref().into_iter().chain(emulated.iter().copied()).chain(timer).chain([REBOOT]);
    let all: Vec<&str> = plan.kernel_params.iter().map(String::as_str).chain(own).collect();
    all.join(" ")
}

/// The command line of a machine on KVM, from the specification's parameters. Nothing of it is this host's own, so whoever measures
/// such a machine can tell it beforehand.
pub(crate) fn on_kvm(kernel_params: &[String]) -> String {
    let all: Vec<&str> = kernel_params.iter().map(String::as_str).chain([REBOOT]).collect();
    all.join(" ")
}

/// Whether the guest's timer is the HPET. The local APIC's rate has to be measured at boot, which takes 0.1 s; the HPET tells
/// its own, and spares an idle guest wake-ups as well. With more processors each needs a timer of its own, and KVM brings a
/// better one.
fn ticks_by_hpet(plan: &Plan<'_>) -> bool {
    let most = plan.growth.map_or(plan.vcpus, |growth| growth.vcpus.max(plan.vcpus));
    plan.machine == Machine::Q35 && plan.accelerator == Accelerator::Tcg && most == 1
}

fn channels(plan: &Plan<'_>, line: &mut Line) {
    line.option("-chardev", format!("socket,id=qmp,fd={}", plan.fds.qmp));
    line.option("-mon", "chardev=qmp,mode=control");
    line.option("-chardev", format!("socket,id=console,fd={}", plan.fds.console));
    line.option("-serial", "chardev:console");
}

fn devices(plan: &Plan<'_>, line: &mut Line) {
    let bus = match plan.machine {
        Machine::Q35 => "pci",
        Machine::Microvm => "device",
    };
    line.option("-object", "rng-builtin,id=rng");
    line.option("-device", format!("virtio-rng-{bus},rng=rng"));
    if plan.backing.reporting {
        line.option("-device", format!("virtio-balloon-{bus},free-page-reporting=on"));
    }
    line.option("-chardev", format!("socket,id=vsock,fd={}", plan.fds.vsock));
    line.option("-device", format!("vhost-user-vsock-{bus},chardev=vsock"));
    if let (Some(tag), Some(fd)) = (plan.shared_fs_tag, plan.fds.shared_fs) {
        line.option("-chardev", format!("socket,id=fs,fd={fd}"));
        line.option("-device", format!("vhost-user-fs-{bus},chardev=fs,tag={}", escaped(tag)));
    }
    for (index, disk) in plan.disks.iter().enumerate() {
        cold_disk(plan, bus, index, disk, line);
    }
    for (index, nic) in plan.nics.iter().enumerate() {
        line.option("-netdev", network_back_end(index, nic));
        line.option("-device", network_device(plan.machine, index, nic));
    }
    if plan.machine == Machine::Q35 {
        // Room for 31 devices has to be set aside: what is plugged in later gets no more. It needs no I/O ports.
        let room = "io-reserve=0,mem-reserve=2M,pref64-reserve=2M";
        line.option(
            "-device",
            format!("pci-bridge,id={BRIDGE},bus=pcie.0,addr={BRIDGE_SLOT:x},chassis_nr=1,shpc=off,{room}"),
        );
    }
}

/// Node names may not begin with a digit or be anybody else's, so only the image goes by its own.
fn cold_disk(plan: &Plan<'_>, bus: &str, index: usize, DiskPlan { id, fd }: &DiskPlan, line: &mut Line) {
    let (set, node) = (index + 1, if id == IMAGE { id.clone() } else { format!("cold{index}") });
    line.option("-add-fd", format!("fd={fd},set={set}"));
    let file = format!("driver=file,node-name={node}-file,filename=/dev/fdset/{set}");
    line.option("-blockdev", format!("{file},read-only=on,locking=off"));
    let group = format!("{node}-limits");
    match throttle::group(&group, plan.disk_limits) {
        Some(limits) => {
            line.option(
                "-blockdev",
                format!("driver=raw,node-name={node}-raw,file={node}-file,read-only=on"),
            );
            line.option("-object", limits.to_string());
            let held = format!("driver=throttle,node-name={node},throttle-group={group},file={node}-raw");
            line.option("-blockdev", format!("{held},read-only=on"));
        }
        None => {
            line.option("-blockdev", format!("driver=raw,node-name={node},file={node}-file,read-only=on"));
        }
    }
    line.option("-device", format!("virtio-blk-{bus},drive={node},serial={}", escaped(&serial(id))));
}

/// Where the kernel does not take its part over, QEMU says so and moves the packets itself.
fn network_back_end(index: usize, nic: &NicPlan) -> String {
    let list = |fds: &[RawFd]| fds.iter().map(ToString::to_string).collect::<Vec<_>>().join(":");
    let vhost = match nic.vhost.as_slice() {
        [] => "vhost=off".to_owned(),
        vhost => format!("vhost=on,vhostfds={}", list(vhost)),
    };
    format!("tap,id=nic{index},fds={},{vhost}", list(&nic.fds))
}

fn network_device(machine: Machine, index: usize, nic: &NicPlan) -> String {
    // The kernel is given: there is nothing to boot from the network, so no option ROM.
    let driver = match machine {
        Machine::Q35 => "virtio-net-pci,romfile=",
        Machine::Microvm => "virtio-net-device",
    };
    let queues = match (nic.fds.len(), machine) {
        (..2, _) => String::new(),
        (count, Machine::Q35) => format!(",mq=on,vectors={}", vectors(count)),
        (_, Machine::Microvm) => ",mq=on".to_owned(),
    };
    format!("{driver},netdev=nic{index},mac={},host_mtu={}{queues}", mac_address(nic.mac), nic.mtu)
}

/// Interrupt vectors of a network device: one for each direction of a queue pair, for changes of its configuration, and for its
/// control queue.
pub(super) fn vectors(queue_pairs: usize) -> usize {
    2 * queue_pairs + 2
}

/// `52:54:00:12:34:56`
pub(super) fn mac_address(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// QEMU's option syntax: a comma ends a value, two stand for one.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests;
