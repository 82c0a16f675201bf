use crate::builtin::BuiltinVm;
use crate::cloud_hypervisor::CloudHypervisorVm;
use crate::firecracker::FirecrackerVm;
use crate::qemu::QemuVm;
use crate::{Capabilities, Machine, Vm};

/// A row of the table in the docs, and the answer that it is about.
type Row = (&'static str, fn(&Capabilities) -> bool);

const ROWS: [Row; 8] = [
    ("files shared with the guest (`shared_fs`)", |can| can.shared_fs),
    ("pause and resume", |can| can.pause),
    ("disks added while it runs", |can| can.hotplug_block),
    ("network interfaces added while it runs", |can| can.hotplug_network),
    ("virtual CPUs added while it runs", |can| can.hotplug_cpu),
    ("memory added while it runs", |can| can.hotplug_memory),
    ("PCI devices of the host, from the start and added while it runs", |can| can.host_devices),
    ("started from a [template](factory.md)", |can| can.snapshot),
];

#[test]
fn table_of_the_docs_is_what_the_drivers_say_of_themselves() {
    let page = include_str!("../../../docs/hypervisors.md");
    let drivers = [
        BuiltinVm::as_if_running(),
        QemuVm::as_if_running(Machine::Q35),
        QemuVm::as_if_running(Machine::Microvm),
        CloudHypervisorVm::as_if_running(),
        FirecrackerVm::new().capabilities(),
    ];
    for (what, can) in ROWS {
        let cells = drivers.iter().map(|driver| if can(driver) { "yes" } else { "no" }).collect::<Vec<_>>();
        let row = format!("| {what} | {} |", cells.join(" | "));
        assert!(page.lines().any(|line| line == row), "the page lacks: {row}");
    }
}
