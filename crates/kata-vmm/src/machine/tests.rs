use std::fs::File;

use kata_vmm_api::{Command, FailureKind, KernelSpec, MemorySpec};

use super::*;
use crate::server::{Client, Monitor};

fn spec() -> MachineSpec {
    MachineSpec {
        cpus: 1,
        max_cpus: 1,
        memory: MemorySpec { size_mib: 64, max_mib: 64, prealloc: false, hugepages: false, reporting: false },
        start: Start::Kernel(KernelSpec { kernel: Descriptor(0), initrd: None, command_line: String::new() }),
        console: None,
        vsock: None,
        shared_fs: None,
        disks: Vec::new(),
        nics: Vec::new(),
        host_devices: Vec::new(),
    }
}

/// A client that is there, as long as this process is.
fn client() -> std::os::unix::net::UnixStream {
    let (client, other) = std::os::unix::net::UnixStream::pair().unwrap();
    std::mem::forget(other);
    client
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn refusal(command: Command, descriptors: Vec<OwnedFd>) -> (FailureKind, String) {
    let failure =
        Vmm::new(Some(null()), None, false).execute(command, descriptors, Client(&client())).unwrap_err();
    (failure.kind, failure.message)
}

#[test]
fn machine_that_makes_no_sense_is_refused_before_anything_is_touched() {
    let disk = |id: &str| DiskSpec {
        id: id.to_owned(),
        file: Descriptor(0),
        readonly: true,
        bytes_per_second: None,
        requests_per_second: None,
    };
    let drive = |id: &str| HostDeviceSpec {
        id: id.to_owned(),
        address: "0000:01:00.0".to_owned(),
        container: Descriptor(0),
        group: Descriptor(1),
        group_number: 1,
    };
    let wrong = [
        MachineSpec { cpus: 0, ..spec() },
        MachineSpec { max_cpus: 0, ..spec() },
        MachineSpec { memory: MemorySpec { max_mib: 1, ..spec().memory }, ..spec() },
        MachineSpec { disks: vec![disk("")], ..spec() },
        MachineSpec { disks: vec![disk("../x")], ..spec() },
        MachineSpec { disks: vec![disk("vsock")], ..spec() },
        MachineSpec { host_devices: vec![drive("rng")], ..spec() },
    ];
    for spec in wrong {
        let (kind, message) = refusal(Command::Create(Box::new(spec)), Vec::new());
        assert_eq!(kind, FailureKind::Invalid, "{message}");
    }
}

#[test]
fn resizing_a_machine_that_does_not_run_is_the_wrong_state() {
    let size = kata_vmm_api::Size { cpus: 2, memory_mib: 64 };
    assert_eq!(refusal(Command::Resize(size), Vec::new()).0, FailureKind::WrongState);
}

#[test]
fn file_that_is_not_kvm_is_named() {
    let (kind, message) = refusal(Command::Create(Box::new(spec())), vec![null()]);
    assert_eq!(kind, FailureKind::Host);
    assert!(message.contains("/dev/kvm"), "{message}");
}

#[test]
fn what_was_not_made_can_be_tried_again() {
    let mut vmm = Vmm::new(Some(null()), None, false);
    for _ in 0..2 {
        let failure =
            vmm.execute(Command::Create(Box::new(spec())), vec![null()], Client(&client())).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Host, "{}", failure.message);
    }
}

#[test]
fn commands_that_need_a_machine_say_so_without_one() {
    let commands =
        [Command::Boot, Command::Pause, Command::Resume, Command::RemoveDevice { id: "a".to_owned() }];
    for command in commands {
        let (kind, message) = refusal(command, Vec::new());
        assert_eq!(kind, FailureKind::WrongState);
        assert!(message.contains("create one first"), "{message}");
    }
}

#[test]
fn descriptors_are_taken_once_and_none_is_left() {
    let mut files = Descriptors::new(vec![null(), null()]);
    assert!(files.take(Descriptor(1)).is_ok());
    assert!(matches!(files.take(Descriptor(1)), Err(MachineError::Descriptor { number: 1, count: 2 })));
    assert!(matches!(files.take(Descriptor(2)), Err(MachineError::Descriptor { number: 2, count: 2 })));
    assert!(matches!(files.finish(), Err(MachineError::Unnamed { count: 1 })));
    let (kind, message) = refusal(Command::Info, vec![null()]);
    assert_eq!(
        (kind, message.as_str()),
        (FailureKind::Invalid, "1 descriptors came along that the command does not name")
    );
}
