//! Real QEMUs, under TCG. They need no guest kernel: QEMU refuses a bad one by itself, and an executable that only has the
//! entry note of a PVH kernel is enough to have the CPU running.

mod devices;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Instant;

use super::*;
use crate::host_devices::HostDevice;
use crate::process::Exit;
use crate::vm::{Backing, DiskLimits, Machine};

const NOBODY: u32 = 65_534;

struct Bench {
    dir: tempfile::TempDir,
    record: Record,
    qemu: PathBuf,
    vsock: PathBuf,
}

impl Bench {
    /// `None`, said aloud, where something that the tests need is missing. `vsock` is a shell script; unset, `kata-vmm`.
    fn new(vsock: Option<&str>) -> Option<Self> {
        let missing = |what: &str| eprintln!("skipped: {what}");
        let qemu = Path::new("/usr/bin/qemu-system-x86_64");
        if !qemu.exists() {
            missing("there is no /usr/bin/qemu-system-x86_64");
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            missing("namespaces and another user need root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let program = match vsock {
            Some(script) => {
                let path = dir.path().join("kata-vmm");
                fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
                path
            }
            None => match built("kata-vmm") {
                Some(path) => path,
                None => {
                    missing("kata-vmm is not built in this target directory");
                    return None;
                }
            },
        };
        let record = Record::open(dir.path().join("resources.jsonl")).unwrap();
        Some(Self { dir, record, qemu: qemu.to_owned(), vsock: program })
    }

    fn spec(&self, machine: Machine, kernel: &[u8]) -> VmSpec {
        let path = self.dir.path().join("kernel");
        fs::write(&path, kernel).unwrap();
        fs::write(self.dir.path().join("initrd"), b"initrd").unwrap();
        VmSpec {
            id: "test".to_owned(),
            run_dir: self.dir.path().to_owned(),
            program: self.qemu.clone(),
            vsock_program: self.vsock.clone(),
            machine,
            accelerator: Accelerator::Tcg,
            kernel: path,
            initrd: Some(self.dir.path().join("initrd")),
            image: None,
            disks: Vec::new(),
            kernel_params: vec!["console=ttyS0".to_owned()],
            vcpus: 1,
            memory_mib: 64,
            growth: None,
            backing: Backing::default(),
            vsock: self.dir.path().join("kata.hvsock"),
            shared_fs: None,
            nics: Vec::new(),
            host_devices: Vec::new(),
            firmware: None,
            confidential: None,
            disk_limits: DiskLimits::default(),
            identity: Identity { uid: NOBODY, gid: NOBODY, groups: Vec::new() },
            seccomp_sandbox: "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
                .to_owned(),
            template: None,
        }
    }
}

/// A test that fails must not leave a guest that runs for ever.
impl Drop for Bench {
    fn drop(&mut self) {
        if let Err(error) = Record::release(self.record.path()) {
            eprintln!("{error}");
        }
    }
}

/// A program built in the target directory of this test.
fn built(name: &str) -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    let path = own.parent()?.parent()?.join(name);
    path.exists().then_some(path)
}

/// A PVH kernel of a few instructions at 1 MiB: it says `text` on the first serial port and then does `then`.
fn kernel_that_says(text: &str, then: &[u8]) -> Vec<u8> {
    // mov edx, 0x3f8; then for each character: mov al, c; out dx, al
    let mut code = vec![0xba, 0xf8, 0x03, 0x00, 0x00];
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]);
    }
    code.extend(then);

    let load = 0x0010_0000_u64;
    let headers = 64 + 2 * 56;
    // XEN_ELFNOTE_PHYS32_ENTRY (18): where to enter in 32-bit mode (Xen, public/elfnote.h).
    let mut note = Vec::new();
    note.extend(4_u32.to_le_bytes());
    note.extend(8_u32.to_le_bytes());
    note.extend(18_u32.to_le_bytes());
    note.extend(b"Xen\0");
    note.extend(load.to_le_bytes());

    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend(2_u16.to_le_bytes());
    elf.extend(62_u16.to_le_bytes());
    elf.extend(1_u32.to_le_bytes());
    for word in [load, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    let mut program_header = |kind: u32, offset: usize, address: u64, size: usize| {
        elf.extend(kind.to_le_bytes());
        elf.extend(5_u32.to_le_bytes());
        for word in [offset as u64, address, address, size as u64, size as u64, 4] {
            elf.extend(word.to_le_bytes());
        }
    };
    let code_at = headers + note.len();
    program_header(1, code_at, load, code.len());
    program_header(4, headers, load + code.len() as u64, note.len());
    elf.extend(note);
    elf.extend(code);
    elf
}

/// `jmp .`
const FOR_EVER: &[u8] = &[0xeb, 0xfe];
/// An empty interrupt table and a trap: a triple fault.
const RESET: &[u8] = &[0x6a, 0x00, 0x6a, 0x00, 0x0f, 0x01, 0x1c, 0x24, 0xcc];

/// The same after a second or more, emulated: the guest runs before QEMU is spoken to.
/// mov ecx, 2²⁹; dec ecx; jnz -3
fn reset_later() -> Vec<u8> {
    [&[0xb9, 0, 0, 0, 0x20, 0x49, 0x75, 0xfd], RESET].concat()
}

async fn console_says(vm: &QemuVm, text: &str) {
    let since = Instant::now();
    while !vm.console_tail().contains(text) {
        assert!(since.elapsed() < Duration::from_secs(60), "console: {:?}", vm.console_tail());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn status(vm: &QemuVm) -> String {
    let qmp = vm.0.state().qmp.clone().unwrap();
    let status = qmp.execute("query-status", Value::Null, COMMAND_BOUND).await.unwrap();
    status["status"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn kernel_that_is_none_is_refused_with_qemus_words_and_nothing_is_left() {
    let Some(bench) = Bench::new(Some("exec sleep 600")) else { return };
    let vm = QemuVm::new();
    let error = vm.boot(bench.spec(Machine::Q35, b"not a kernel"), &bench.record).await.unwrap_err();
    assert!(matches!(&error, HypervisorError::Refused { exit: Exit::Code(1), .. }), "{error:?}");
    assert!(error.to_string().contains("kernel"), "{error}");
    assert_eq!(vm.processes(), []);
}

#[tokio::test]
async fn refused_arguments_are_in_the_error() {
    let Some(bench) = Bench::new(Some("exec sleep 600")) else { return };
    let spec = VmSpec { seccomp_sandbox: "on,nonsense=1".to_owned(), ..bench.spec(Machine::Q35, b"") };
    let error = QemuVm::new().boot(spec, &bench.record).await.unwrap_err();
    assert!(error.to_string().contains("nonsense"), "{error}");
}

#[tokio::test]
async fn missing_qemu_missing_kernel_and_impossible_machine_are_told_apart() {
    let Some(bench) = Bench::new(Some("exec sleep 600")) else { return };
    let spec = VmSpec { program: "/no/such/qemu".into(), ..bench.spec(Machine::Q35, b"") };
    let vm = QemuVm::new();
    let error = vm.boot(spec, &bench.record).await.unwrap_err();
    assert!(error.to_string().contains("install QEMU"), "{error}");
    assert_eq!(vm.processes(), [], "the vsock process is ended again");

    fs::remove_file(bench.dir.path().join("kata.hvsock")).unwrap();
    let spec = VmSpec { kernel: "/no/such/kernel".into(), ..bench.spec(Machine::Q35, b"") };
    let error = QemuVm::new().boot(spec, &bench.record).await.unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with(r#"guest kernel "/no/such/kernel" cannot be used; "#), "{text}");
    assert!(text.contains("hypervisor.qemu.kernel"), "{text}");

    let spec = VmSpec { vcpus: 0, ..bench.spec(Machine::Q35, b"") };
    let error = QemuVm::new().boot(spec, &bench.record).await.unwrap_err();
    assert!(matches!(error, HypervisorError::InvalidSpec { .. }));

    let drive = HostDevice { id: "drive".to_owned(), address: "0000:01:00.0".to_owned() };
    let spec = VmSpec { host_devices: vec![drive.clone()], ..bench.spec(Machine::Q35, b"") };
    let error = QemuVm::new().boot(spec, &bench.record).await.unwrap_err();
    assert!(error.to_string().ends_with("set runtime.hypervisor_name to \"builtin\""), "{error}");
    let error = QemuVm::new().add_device(drive.into()).await.unwrap_err();
    assert!(matches!(error, HypervisorError::Unsupported { .. }), "{error}");
}

#[tokio::test]
async fn vsock_process_that_fails_is_named_with_its_words() {
    let Some(bench) = Bench::new(Some("echo no room >&2; exit 3")) else { return };
    let vm = QemuVm::new();
    let kernel = kernel_that_says("", FOR_EVER);
    let error = vm.boot(bench.spec(Machine::Q35, &kernel), &bench.record).await.unwrap_err();
    let expected = "the vsock process ended before the guest ran: it exited with code 3: no room";
    assert_eq!(error.to_string(), expected);
    assert_eq!(vm.processes(), []);
}

#[tokio::test]
async fn stop_during_boot_ends_it() {
    // Never answers over vhost-user, so QEMU never gets to its greeting.
    let Some(bench) = Bench::new(Some("exec sleep 600")) else { return };
    let vm = QemuVm::new();
    let kernel = kernel_that_says("", FOR_EVER);
    let stop = async {
        while vm.processes().len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        vm.stop().await.unwrap();
    };
    let (booted, ()) = tokio::join!(vm.boot(bench.spec(Machine::Q35, &kernel), &bench.record), stop);
    assert!(matches!(booted.unwrap_err(), HypervisorError::Ended(VmExit::Stopped)));
    assert_eq!((vm.processes(), vm.exited().await), (vec![], VmExit::Stopped));
}

async fn runs_pauses_and_stops(machine: Machine) {
    let Some(bench) = Bench::new(None) else { return };
    let vm = QemuVm::new();
    vm.boot(bench.spec(machine, &kernel_that_says("hello", FOR_EVER)), &bench.record).await.unwrap();
    console_says(&vm, "hello").await;
    let names: Vec<String> = vm.processes().into_iter().map(|process| process.name).collect();
    assert_eq!(names, ["vsock", "qemu"]);
    for ProcessInfo { name, pid } in vm.processes() {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        for line in
            ["Uid:\t65534\t65534", "CapBnd:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"]
        {
            assert!(text.contains(line), "{name}: {line} not in {text}");
        }
    }
    assert_eq!(status(&vm).await, "running");
    vm.pause().await.unwrap();
    assert_eq!(status(&vm).await, "paused");
    vm.resume().await.unwrap();
    assert_eq!(status(&vm).await, "running");
    let again = vm.boot(bench.spec(machine, b""), &bench.record).await.unwrap_err();
    assert!(matches!(again, HypervisorError::WrongState { .. }));

    vm.stop().await.unwrap();
    assert_eq!((vm.processes(), vm.exited().await), (vec![], VmExit::Stopped));
    vm.stop().await.unwrap();
    assert!(matches!(vm.pause().await.unwrap_err(), HypervisorError::Ended(VmExit::Stopped)));
    Record::release(bench.record.path()).unwrap();
    assert!(!bench.dir.path().join("kata.hvsock").exists());
}

#[tokio::test]
async fn q35_runs_pauses_and_stops() {
    runs_pauses_and_stops(Machine::Q35).await;
}

#[tokio::test]
async fn microvm_runs_pauses_and_stops() {
    runs_pauses_and_stops(Machine::Microvm).await;
}

/// Boots a kernel that runs for ever, does something to one of the processes, and gives back the reason of the end.
async fn end_after(signal: rustix::process::Signal, process: &str) -> Option<VmExit> {
    let bench = Bench::new(None)?;
    let vm = QemuVm::new();
    vm.boot(bench.spec(Machine::Q35, &kernel_that_says("", FOR_EVER)), &bench.record).await.unwrap();
    let child = vm.0.life.children().iter().find(|child| child.name() == process).cloned().unwrap();
    child.signal(signal).unwrap();
    let exit = tokio::time::timeout(Duration::from_secs(20), vm.exited()).await.unwrap();
    assert_eq!(vm.processes(), []);
    Some(exit)
}

#[tokio::test]
async fn killed_qemu_is_told_by_its_signal() {
    if let Some(exit) = end_after(rustix::process::Signal::KILL, "qemu").await {
        assert_eq!(exit, VmExit::Signal(9));
    }
}

#[tokio::test]
async fn terminated_qemu_is_no_clean_end() {
    if let Some(exit) = end_after(rustix::process::Signal::TERM, "qemu").await {
        assert!(matches!(&exit, VmExit::Code(0, said) if said.contains("signal 15")), "{exit:?}");
    }
}

#[tokio::test]
async fn lost_vsock_process_ends_the_machine_and_is_named() {
    if let Some(exit) = end_after(rustix::process::Signal::KILL, "vsock").await {
        assert!(
            matches!(&exit, VmExit::BackEndLost { name, exit: Exit::Signal(9), .. } if name == "vsock"),
            "{exit:?}"
        );
    }
}

async fn end_of(kernel: &[u8]) -> Option<VmExit> {
    let bench = Bench::new(None)?;
    let vm = QemuVm::new();
    vm.boot(bench.spec(Machine::Q35, kernel), &bench.record).await.unwrap();
    Some(tokio::time::timeout(Duration::from_secs(20), vm.exited()).await.unwrap())
}

#[tokio::test]
async fn guest_that_resets_itself_has_ended_cleanly() {
    if let Some(exit) = end_of(&kernel_that_says("bye", &reset_later())).await {
        assert_eq!(exit, VmExit::Clean);
    }
}

#[tokio::test]
async fn guest_that_panics_is_told_with_its_last_words() {
    if let Some(exit) =
        end_of(&kernel_that_says("first\r\nKernel panic - not syncing: no init\r\n", &reset_later())).await
    {
        assert_eq!(exit, VmExit::GuestPanic("first\nKernel panic - not syncing: no init".to_owned()));
    }
}

/// A real kernel and an initramfs whose init prints `INIT` and reboots, from `KATA_TEST_KERNEL` and `KATA_TEST_INITRD`.
async fn boots_linux(machine: Machine, initrd: bool) -> Option<(String, VmExit)> {
    let (Some(kernel), Some(init)) =
        (std::env::var_os("KATA_TEST_KERNEL"), std::env::var_os("KATA_TEST_INITRD"))
    else {
        eprintln!("skipped: KATA_TEST_KERNEL and KATA_TEST_INITRD are not set");
        return None;
    };
    let bench = Bench::new(None)?;
    let spec = bench.spec(machine, b"");
    let spec = VmSpec {
        kernel: kernel.into(),
        initrd: if initrd { Some(init.into()) } else { spec.initrd },
        kernel_params: ["console=ttyS0", "quiet", "panic=1", "reboot=k"].map(str::to_owned).to_vec(),
        memory_mib: 256,
        ..spec
    };
    let vm = QemuVm::new();
    let since = Instant::now();
    vm.boot(spec, &bench.record).await.unwrap();
    let booted = since.elapsed();
    let exit = tokio::time::timeout(Duration::from_secs(60), vm.exited()).await;
    eprintln!("{machine}: boot() {booted:?}, end {:?}", since.elapsed());
    let exit = exit.unwrap_or_else(|_| panic!("{machine} hangs: {}", vm.console_tail()));
    Some((vm.console_tail(), exit))
}

#[tokio::test]
async fn linux_boots_to_its_init_on_both_machines() {
    for machine in [Machine::Q35, Machine::Microvm] {
        if let Some((console, exit)) = boots_linux(machine, true).await {
            assert!(console.contains("INIT"), "{console}");
            assert_eq!(exit, VmExit::Clean);
        }
    }
}

#[tokio::test]
async fn linux_without_an_init_panics_and_says_so() {
    for machine in [Machine::Q35, Machine::Microvm] {
        if let Some((_, exit)) = boots_linux(machine, false).await {
            assert!(matches!(&exit, VmExit::GuestPanic(console) if console.contains("VFS")), "{exit:?}");
        }
    }
}
