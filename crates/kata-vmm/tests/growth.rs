//! A machine of the library boots, gets more CPUs and memory while it runs, stands still, goes on, and turns itself off. What it wants
//! is said in `initrd`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends at the first surprise")]

mod initrd;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::{Duration, Instant};

use initrd::{initrd, stock_kernel};
use kata_vmm::kvm::End;
use kata_vmm::machine::{Descriptors, Machine, MachineError, Place};
use kata_vmm_api::{Descriptor, EndReason, KernelSpec, MachineSpec, MemorySpec, Size, Start};

const SCRIPT: &str = r#"#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys
/modules
say() { echo "GUEST $*"; }
say has $(nproc) of $(cat /sys/devices/system/cpu/possible)
new=/sys/devices/system/cpu/cpu2
until [ -e $new ]; do usleep 20000; done
echo 1 > /sys/devices/system/cpu/cpu1/online; echo 1 > $new/online
say has $(nproc) and cpu2 counts $(taskset 4 sh -c 'cut -d" " -f39 /proc/self/stat')
has() { awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo; }
echo online_movable > /sys/devices/system/memory/auto_online_blocks
before=$(has); say memory
until [ $(has) -ge $((before + 120)) ]; do usleep 20000; done
say grew
until [ $(has) -le $((before + 8)) ]; do usleep 20000; done
say shrank
say told $(dmesg | grep -ci "acpi.*error")
poweroff -f
"#;

#[test]
fn cpus_come_and_memory_comes_and_goes_while_the_guest_runs() {
    let Some(kernel) = stock_kernel() else { return };
    let directory = tempfile::tempdir().unwrap();
    let (console, output) = std::io::pipe().unwrap();
    let files = vec![
        File::open(kernel).unwrap().into(),
        initrd(SCRIPT, &["virtio_mem"], &directory.path().join("initrd")).into(),
        output.into(),
    ];
    let spec = MachineSpec {
        cpus: 1,
        max_cpus: 3,
        memory: MemorySpec {
            size_mib: 192,
            max_mib: 450,
            prealloc: false,
            hugepages: false,
            reporting: false,
        },
        start: Start::Kernel(KernelSpec {
            kernel: Descriptor(0),
            initrd: Some(Descriptor(1)),
            command_line: "console=ttyS0 reboot=t panic=-1".to_owned(),
        }),
        console: Some(Descriptor(2)),
        vsock: None,
        shared_fs: None,
        disks: Vec::new(),
        nics: Vec::new(),
        host_devices: Vec::new(),
    };
    let place = Place { kvm: None, sockets: None };
    let mut machine = Machine::new(&spec, Descriptors::new(files), place).unwrap();
    machine.resume().unwrap();
    let mut lines = BufReader::new(console).lines().map(Result::unwrap);
    let mut said = || {
        let mut all = Vec::new();
        loop {
            let line = lines.next().unwrap_or_else(|| panic!("the guest ended: {all:#?}"));
            match line.split_once("GUEST ") {
                Some((_, text)) => return text.trim().to_owned(),
                None => all.push(line),
            }
        }
    };
    assert_eq!(said(), "has 1 of 0-2");
    for (cpus, memory_mib) in [(4, 192), (0, 192), (1, 191), (1, 451)] {
        let refused = machine.resize(Size { cpus, memory_mib }, &|| false);
        assert!(
            matches!(refused, Err(MachineError::Unsupported { .. } | MachineError::Field { .. })),
            "{cpus} {memory_mib}"
        );
    }
    machine.pause();
    machine.resume().unwrap();
    machine.resize(Size { cpus: 3, memory_mib: 192 }, &|| false).unwrap();
    let threads = machine.cpu_threads();
    assert_eq!(threads.len(), 3);
    assert!(threads.iter().all(|thread| Path::new(&format!("/proc/self/task/{thread}")).exists()));
    assert_eq!(said(), "has 3 and cpu2 counts 2");
    assert_eq!(said(), "memory");
    machine.resize(Size { cpus: 3, memory_mib: 320 }, &|| false).unwrap();
    assert_eq!((said(), machine.memory() >> 20), ("grew".to_owned(), 320));
    machine.resize(Size { cpus: 3, memory_mib: 192 }, &|| false).unwrap();
    assert_eq!(said(), "shrank");
    // It gives up the blocks after it has stopped to count them.
    let until = Instant::now() + Duration::from_secs(30);
    while machine.memory() >> 20 != 192 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(machine.memory() >> 20, 192);
    assert_eq!(said(), "told 0");
    assert_eq!(machine.ending().wait(), End { reason: EndReason::Shutdown, detail: String::new() });
}
