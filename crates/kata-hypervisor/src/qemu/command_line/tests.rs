use std::num::NonZeroU64;

use super::*;
use crate::vm::{Confidential, ConfidentialKind};

const PARAMS: [&str; 3] = ["console=ttyS0", "quiet", "agent.log=debug"];

fn text(machine: Machine, accelerator: Accelerator, change: impl FnOnce(&mut Plan<'_>)) -> String {
    text_of(machine, accelerator, &PARAMS.map(str::to_owned), change)
}

fn text_of<'a>(
    machine: Machine,
    accelerator: Accelerator,
    params: &'a [String],
    change: impl FnOnce(&mut Plan<'a>),
) -> String {
    let mut plan = Plan {
        id: "pod-1",
        machine,
        accelerator,
        vcpus: 2,
        memory_mib: 256,
        growth: None,
        backing: Backing::default(),
        kernel_params: params,
        shared_fs_tag: Some("kataShared"),
        nics: &[],
        disks: &[],
        disk_limits: DiskLimits::default(),
        seccomp_sandbox: "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        tsc_khz: (accelerator == Accelerator::Tcg).then_some(2_596_120),
        confidential: None,
        fds: Fds {
            qmp: 3,
            console: 4,
            vsock: 5,
            kernel: 6,
            initrd: Some(7),
            firmware: None,
            shared_fs: Some(8),
        },
    };
    change(&mut plan);
    // One option with its value a line.
    command_line(&plan).join(" ").replace(" -", "\n-")
}

#[test]
fn q35_with_tcg() {
    insta::assert_snapshot!(text(Machine::Q35, Accelerator::Tcg, |_| {}));
}

#[test]
fn only_a_single_emulated_processor_ticks_by_the_hpet() {
    for (accelerator, vcpus, expected) in
        [(Accelerator::Tcg, 1, true), (Accelerator::Tcg, 2, false), (Accelerator::Kvm, 1, false)]
    {
        let line = text(Machine::Q35, accelerator, |plan| plan.vcpus = vcpus);
        assert_eq!(line.contains("hpet=on") && line.contains(" noapictimer "), expected, "{line}");
        assert_eq!(line.contains("hpet=off") && !line.contains("noapictimer"), !expected, "{line}");
    }
}

#[test]
fn a_machine_that_can_grow_has_room_and_no_timer_for_one_processor_alone() {
    let line = text(Machine::Q35, Accelerator::Tcg, |plan| {
        plan.vcpus = 1;
        plan.growth = Some(Growth { vcpus: 4, memory_mib: 4096, slots: 10 });
    });
    for option in ["-smp 1,maxcpus=4\n", "-m 256M,slots=10,maxmem=4096M\n", "hpet=off"] {
        assert!(line.contains(option), "{option}: {line}");
    }
}

#[test]
fn memory_is_taken_at_once_on_huge_pages_or_given_back_where_that_is_asked_for() {
    let line = text(Machine::Q35, Accelerator::Tcg, |plan| {
        plan.backing = Backing { prealloc: true, hugepages: true, reporting: true };
    });
    assert!(line.contains("size=256M,share=on,prealloc=on,hugetlb=on\n"), "{line}");
    assert!(line.contains("-device virtio-balloon-pci,free-page-reporting=on\n"), "{line}");
}

#[test]
fn q35_with_kvm() {
    insta::assert_snapshot!(text(Machine::Q35, Accelerator::Kvm, |_| {}));
}

#[test]
fn microvm_with_tcg() {
    insta::assert_snapshot!(text(Machine::Microvm, Accelerator::Tcg, |_| {}));
}

#[test]
fn microvm_with_kvm() {
    insta::assert_snapshot!(text(Machine::Microvm, Accelerator::Kvm, |_| {}));
}

#[test]
fn q35_with_an_image_and_without_files_shared() {
    let (params, image) = (PARAMS.map(str::to_owned), [disk("image", 7)]);
    insta::assert_snapshot!(text_of(Machine::Q35, Accelerator::Tcg, &params, |plan| {
        plan.shared_fs_tag = None;
        plan.fds.shared_fs = None;
        plan.fds.initrd = None;
        plan.disks = &image;
    }));
}

fn disk(id: &str, fd: i32) -> DiskPlan {
    DiskPlan { id: id.to_owned(), fd }
}

#[test]
fn disks_of_the_start_are_found_by_their_serial_numbers() {
    let params = PARAMS.map(str::to_owned);
    let disks = [disk("image", 7), disk("initdata", 9), disk("a-name-of-more-than-twenty-characters", 10)];
    for (machine, bus) in [(Machine::Q35, "pci"), (Machine::Microvm, "device")] {
        let lines = text_of(machine, Accelerator::Kvm, &params, |plan| plan.disks = &disks);
        for (set, node, fd, serial) in
            [(1, "image", 7, "image"), (2, "cold1", 9, "initdata"), (3, "cold2", 10, "a-name-of-more-than-")]
        {
            for line in [
                format!("-add-fd fd={fd},set={set}"),
                format!(
                    "-blockdev driver=file,node-name={node}-file,filename=/dev/fdset/{set},read-only=on,locking=off"
                ),
                format!("-device virtio-blk-{bus},drive={node},serial={serial}"),
            ] {
                assert!(lines.lines().any(|found| found == line), "{line} in {lines}");
            }
        }
    }
}

fn nics() -> [NicPlan; 2] {
    let mac = [0x52, 0x54, 0x00, 0xab, 0x00, 0x01];
    [
        NicPlan { mac, mtu: 1500, fds: vec![9], vhost: Vec::new() },
        NicPlan { mac: [0x02, 0, 0, 0, 0, 0x0a], mtu: 9000, fds: vec![10, 11], vhost: Vec::new() },
    ]
}

/// The lines of the network interfaces alone.
fn network_lines(machine: Machine, nics: &[NicPlan]) -> String {
    let params = PARAMS.map(str::to_owned);
    let all = text_of(machine, Accelerator::Kvm, &params, |plan| plan.nics = nics);
    all.lines().filter(|line| line.contains("nic")).map(|line| format!("{line}\n")).collect()
}

#[test]
fn q35_starts_with_network_interfaces() {
    insta::assert_snapshot!(network_lines(Machine::Q35, &nics()));
}

#[test]
fn microvm_starts_with_network_interfaces() {
    insta::assert_snapshot!(network_lines(Machine::Microvm, &nics()));
}

#[test]
fn kernel_moves_the_packets_of_interfaces_that_have_its_descriptors() {
    let mut nics = nics();
    nics[0].vhost = vec![12];
    nics[1].vhost = vec![13, 14];
    for machine in [Machine::Q35, Machine::Microvm] {
        let lines = network_lines(machine, &nics);
        assert!(lines.contains("-netdev tap,id=nic0,fds=9,vhost=on,vhostfds=12\n"), "{lines}");
        assert!(lines.contains("-netdev tap,id=nic1,fds=10:11,vhost=on,vhostfds=13:14\n"), "{lines}");
    }
}

#[test]
fn image_is_held_to_the_limits_of_disks() {
    let (params, image) = (PARAMS.map(str::to_owned), [disk("image", 7)]);
    insta::assert_snapshot!(text_of(Machine::Q35, Accelerator::Kvm, &params, |plan| {
        plan.fds.initrd = None;
        plan.disks = &image;
        plan.disk_limits = DiskLimits {
            bytes_per_second: NonZeroU64::new(1 << 20),
            requests_per_second: NonZeroU64::new(50),
        };
    }));
}

#[test]
fn only_q35_has_a_bridge_to_plug_into() {
    assert!(
        text(Machine::Q35, Accelerator::Tcg, |_| {}).contains("pci-bridge,id=bridge,bus=pcie.0,addr=10,")
    );
    assert!(!text(Machine::Microvm, Accelerator::Tcg, |_| {}).contains("bridge"));
}

#[test]
fn names_with_commas_stay_one_value() {
    let line = text(Machine::Q35, Accelerator::Tcg, |plan| {
        plan.id = "a,b";
        plan.shared_fs_tag = Some("c,dax=on");
    });
    assert!(line.contains("guest=a,,b\n") && line.contains("tag=c,,dax=on"), "{line}");
}

#[test]
fn empty_sandbox_means_none() {
    let line = text(Machine::Q35, Accelerator::Tcg, |plan| plan.seccomp_sandbox = "");
    assert!(!line.contains("-sandbox"));
}

/// Options that newer releases have removed (QEMU's documentation, about/removed-features) and ones that 7.2 lacks.
#[test]
fn no_option_is_missing_in_qemu_7_2_or_10_0() {
    for machine in [Machine::Q35, Machine::Microvm] {
        for accelerator in [Accelerator::Kvm, Accelerator::Tcg] {
            let line = text(machine, accelerator, |_| {});
            let removed =
                ["-no-hpet", "-no-acpi", "-runas", "-chroot", "-singlestep", "-async-teardown", "virtiofsd"];
            let newer = ["-run-with", "kvm,device=", "aes-key-wrap", "one-insn-per-tb"];
            for option in removed.into_iter().chain(newer) {
                assert!(!line.contains(option), "{option} in {line}");
            }
        }
    }
}

#[test]
fn machine_whose_memory_the_host_cannot_read() {
    let kinds = [
        (
            "snp",
            ConfidentialKind::SevSnp { policy: 0x3_0000, id_block: String::new(), id_auth: String::new() },
        ),
        ("tdx", ConfidentialKind::Tdx { quote_port: 4050 }),
    ];
    for (name, kind) in kinds {
        let host_data = Some(vec![7; kind.host_data_size()]);
        let object = confidential::object(&Confidential { kind, host_data }, 51);
        let line = text(Machine::Q35, Accelerator::Kvm, |plan| {
            (plan.confidential, plan.fds.firmware) = (Some(object), Some(9));
            (plan.shared_fs_tag, plan.fds.shared_fs) = (None, None);
        });
        let measured = on_kvm(&PARAMS.map(str::to_owned));
        assert!(line.ends_with(&measured) || line.contains(&format!("-append {measured}\n")), "{line}");
        insta::assert_snapshot!(format!("machine_whose_memory_the_host_cannot_read_{name}"), line);
    }
}
