//! A machine of the library boots, gets more CPUs and memory while it runs, stands still, goes on, and turns itself off. Wants KVM that boots
//! kernels, and:
//!
//! | variable | what |
//! |---|---|
//! | `KATA_TEST_REAL_KVM` | set: `/dev/kvm` boots kernels here |
//! | `KATA_TEST_KERNEL` | a guest kernel |
//! | `KATA_TEST_BUSYBOX` | a busybox that needs no libraries; else `/usr/bin/busybox` |

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends at the first surprise")]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use kata_vmm::kvm::End;
use kata_vmm::machine::{Descriptors, Machine, MachineError, Place};
use kata_vmm_api::{Descriptor, EndReason, MachineSpec, MemorySpec, Size};

const SCRIPT: &str = r#"#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys
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

/// An entry of a cpio archive (`newc`).
fn entry(archive: &mut Vec<u8>, name: &str, mode: usize, content: &[u8]) {
    archive.extend(b"070701");
    for field in [0, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0] {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes().chain([0]));
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

fn initrd(busybox: &Path, at: &Path) -> File {
    let mut archive = Vec::new();
    entry(&mut archive, "bin", 0o040_755, &[]);
    entry(&mut archive, "bin/busybox", 0o100_755, &std::fs::read(busybox).unwrap());
    entry(&mut archive, "init", 0o100_755, SCRIPT.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    std::fs::write(at, archive).unwrap();
    File::open(at).unwrap()
}

#[test]
fn cpus_come_and_memory_comes_and_goes_while_the_guest_runs() {
    let kernel = std::env::var_os("KATA_TEST_KERNEL").map(PathBuf::from).filter(|path| path.exists());
    let busybox = std::env::var_os("KATA_TEST_BUSYBOX");
    let busybox = busybox.map_or_else(|| "/usr/bin/busybox".into(), PathBuf::from);
    let (Some(kernel), true, true) =
        (kernel, busybox.exists(), std::env::var_os("KATA_TEST_REAL_KVM").is_some())
    else {
        return eprintln!("skipped: wants KATA_TEST_REAL_KVM, a kernel and busybox, see the top of the test");
    };
    let directory = tempfile::tempdir().unwrap();
    let (console, output) = std::io::pipe().unwrap();
    let files = vec![
        File::open(kernel).unwrap().into(),
        initrd(&busybox, &directory.path().join("initrd")).into(),
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
        kernel: Descriptor(0),
        initrd: Some(Descriptor(1)),
        command_line: "console=ttyS0 reboot=t panic=-1".to_owned(),
        console: Some(Descriptor(2)),
        vsock: None,
        shared_fs: None,
        disks: Vec::new(),
        nics: Vec::new(),
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
        let refused = machine.resize(Size { cpus, memory_mib });
        assert!(
            matches!(refused, Err(MachineError::Unsupported { .. } | MachineError::Field { .. })),
            "{cpus} {memory_mib}"
        );
    }
    machine.pause();
    machine.resume().unwrap();
    machine.resize(Size { cpus: 3, memory_mib: 192 }).unwrap();
    let threads = machine.cpu_threads();
    assert_eq!(threads.len(), 3);
    assert!(threads.iter().all(|thread| Path::new(&format!("/proc/self/task/{thread}")).exists()));
    assert_eq!(said(), "has 3 and cpu2 counts 2");
    assert_eq!(said(), "memory");
    machine.resize(Size { cpus: 3, memory_mib: 320 }).unwrap();
    assert_eq!((said(), machine.memory() >> 20), ("grew".to_owned(), 320));
    machine.resize(Size { cpus: 3, memory_mib: 192 }).unwrap();
    assert_eq!((said(), machine.memory() >> 20), ("shrank".to_owned(), 192));
    assert_eq!(said(), "told 0");
    assert_eq!(machine.ending().wait(), End { reason: EndReason::Shutdown, detail: String::new() });
}
