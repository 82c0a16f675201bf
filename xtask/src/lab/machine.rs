//! The lab's processes: QEMU, and a file server for each of the two trees.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use lab_init::{PORT, ROOT_TAG, SYSTEMD_PARAMETER, TREE_PARAMETER, TREE_TAG};
use rustix::fs::{MemfdFlags, memfd_create};

use super::child::{number, spawn};
use super::{Options, Prepared};
use crate::Chores;
use crate::shell::{ChoreError, at, tree};

/// Devices that no one uses cost the boot time. q35 and not microvm, which hangs in one of three boots under TCG.
const MACHINE: &str = "q35,memory-backend=ram,vmport=off,smbus=off,sata=off,usb=off,i8042=off";
/// Without EPYC's model the guest looks for Intel's virtualisation.
const PROCESSOR: &str = "EPYC,+svm,+npt";
/// The lab guards nothing: mitigations cost an emulated processor a tenth of its time, and a program that is at another address each
/// time is translated anew each time. A panic ends the machine.
const PARAMETERS: &str = "console=ttyS0 mitigations=off norandmaps no_timer_check panic=-1 reboot=t";
/// In front of the drive alone: virtio devices go by it. Interrupts are remapped, without which VFIO lends nothing.
const IOMMU: &str = "intel-iommu,intremap=on,caching-mode=on";
/// Bytes of the drive.
const DRIVE: u64 = 16 << 20;
/// Lines of the console that are kept for an error.
const CONSOLE_LINES: usize = 30;

/// A machine that runs. Dropped, it and its file servers are killed.
pub struct Machine {
    qemu: Child,
    file_servers: Vec<Child>,
    /// Frames.
    pub port: UnixStream,
    console: Console,
}

/// What the machine says on its serial line.
enum Console {
    Unread(PipeReader),
    Read(JoinHandle<VecDeque<String>>),
    Gone,
}

impl Machine {
    /// Starts all processes; the kernel boots meanwhile.
    pub fn start(lab: &Prepared, options: &Options) -> Chores<Self> {
        let socket = |source| ChoreError::Socket { what: "the lab's port", source };
        let (port, qemu_port) = UnixStream::pair().map_err(socket)?;
        let (root_server, root) = serve(&lab.file_server, &lab.debian.root, "always")?;
        let mut file_servers = Servers(vec![root_server]);
        let (tree_server, sources) = serve(&lab.file_server, &tree(), "auto")?;
        file_servers.0.push(tree_server);
        let (console, output) = std::io::pipe().map_err(socket)?;
        let mut command = Command::new("qemu-system-x86_64");
        machine_options(&mut command, options);
        command.arg("-kernel").arg(lab.debian.kernel());
        command.args(["-initrd", &format!("/proc/self/fd/{}", number(&lab.initrd))]);
        command.args(["-append", &parameters(options)?]);
        for (tag, socket) in [(ROOT_TAG, &root), (TREE_TAG, &sources)] {
            command.args(["-chardev", &format!("socket,id={tag},fd={}", number(socket))]);
            command.args(["-device", &format!("vhost-user-fs-pci,chardev={tag},tag={tag}")]);
        }
        command.args(["-chardev", &format!("socket,id={PORT},fd={}", number(&qemu_port))]);
        command.args(["-device", "virtio-serial-pci", "-device"]);
        command.arg(format!("virtserialport,chardev={PORT},name={PORT}"));
        let drive = if options.iommu { Some(drive()?) } else { None };
        if let Some(drive) = &drive {
            let number = number(drive);
            command
                .args(["-blockdev", &format!("driver=file,node-name=drive,filename=/proc/self/fd/{number}")]);
            command.args(["-device", "nvme,serial=lab,drive=drive"]);
        }
        command.stdin(Stdio::null()).stderr(output.try_clone().map_err(socket)?).stdout(output);
        let mut inherited: Vec<&dyn AsFd> = vec![&lab.initrd, &root, &sources, &qemu_port];
        inherited.extend(drive.iter().map(|drive| -> &dyn AsFd { drive }));
        let qemu = spawn(&mut command, &inherited)?;
        let file_servers = std::mem::take(&mut file_servers.0);
        Ok(Self { qemu, file_servers, port, console: Console::Unread(console) })
    }

    /// Begins to read the console, and to show it if somebody wants to see it.
    pub fn read_console(&mut self, show: bool) {
        if let Console::Unread(pipe) = std::mem::replace(&mut self.console, Console::Gone) {
            self.console = Console::Read(std::thread::spawn(move || last_lines(pipe, show)));
        }
    }

    /// Ends the machine; answers what its console said last.
    pub fn last_words(mut self) -> String {
        let _ = self.qemu.kill();
        let lines = match std::mem::replace(&mut self.console, Console::Gone) {
            Console::Read(thread) => thread.join().unwrap_or_default(),
            Console::Unread(_) | Console::Gone => VecDeque::new(),
        };
        lines.into_iter().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.port.shutdown(Shutdown::Both);
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        // They end with their connection, and take longer over being killed: half of each is out of reach.
        for server in &mut self.file_servers {
            let _ = server.wait();
        }
    }
}

/// File servers that no machine uses yet.
struct Servers(Vec<Child>);

impl Drop for Servers {
    fn drop(&mut self) {
        kill(&mut self.0);
    }
}

fn kill(children: &mut [Child]) {
    for child in children {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A file server for `dir`, and the connected socket for QEMU.
fn serve(program: &Path, dir: &Path, cache: &str) -> Chores<(Child, UnixStream)> {
    let socket = |source| ChoreError::Socket { what: "the lab's file server", source };
    // In the abstract namespace: there is no file to remove.
    let name = format!("kata-lab-{}-{cache}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).map_err(socket)?;
    let listener = UnixListener::bind_addr(&address).map_err(socket)?;
    let mut command = Command::new(program);
    command.args([
        "--listen-fd",
        &number(&listener).to_string(),
        "--cache",
        cache,
        "--xattr",
        "--shared-dir",
    ]);
    command.arg(dir).stdin(Stdio::null());
    let child = spawn(&mut command, &[&listener])?;
    let connected = UnixStream::connect_addr(&address).map_err(socket)?;
    Ok((child, connected))
}

fn machine_options(command: &mut Command, options: &Options) {
    command.args(["-name", "kata-lab", "-machine", MACHINE, "-cpu", PROCESSOR, "-accel", "tcg,thread=multi"]);
    let Options { cpus, memory, .. } = options;
    command.args(["-smp", &cpus.to_string(), "-m", &format!("{memory}M")]);
    command.args(["-object", &format!("memory-backend-memfd,id=ram,size={memory}M,share=on")]);
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    // Before all devices that are to be behind it.
    if options.iommu {
        command.args(["-device", IOMMU]);
    }
    command.args(["-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng"]);
}

fn parameters(options: &Options) -> Chores<String> {
    let tree = tree();
    let path = tree.to_str().filter(|path| !path.contains([' ', '"', ',']));
    let path = path.ok_or_else(|| {
        ChoreError::Found(format!("{} cannot be named on a kernel's command line", tree.display()))
    })?;
    let systemd = if options.systemd { SYSTEMD_PARAMETER } else { "" };
    let iommu = if options.iommu { "intel_iommu=on" } else { "" };
    let quiet = if options.console { "" } else { "quiet" };
    Ok(format!("{PARAMETERS} {quiet} {iommu} {TREE_PARAMETER}{path} {systemd}"))
}

/// An empty drive, in memory.
fn drive() -> Chores<File> {
    let file = memfd_create("lab-drive", MemfdFlags::CLOEXEC).map(File::from);
    let sized = file.map_err(Into::into).and_then(|file| file.set_len(DRIVE).map(|()| file));
    sized.map_err(|source| ChoreError::Socket { what: "the lab's drive", source })
}

/// Reads the console to its end, which is the machine's.
fn last_lines(console: PipeReader, show: bool) -> VecDeque<String> {
    let mut kept = VecDeque::new();
    for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if show {
            eprintln!("{line}");
        }
        kept.push_back(line);
        if kept.len() > CONSOLE_LINES {
            kept.pop_front();
        }
    }
    kept
}

/// An initramfs with nothing but the program as its init, in memory. A newc archive, see the kernel's
/// `Documentation/driver-api/early-userspace/buffer-format.rst`.
pub fn initrd(init: &Path) -> Chores<File> {
    let program = std::fs::read(init).map_err(at("read", init))?;
    let failed = at("write the initramfs of", init);
    let mut archive = entry("init", 0o100_755, &program);
    archive.extend(entry("TRAILER!!!", 0, &[]));
    let memory = memfd_create("lab-initrd", MemfdFlags::CLOEXEC).map(File::from);
    memory.map_err(Into::into).and_then(|mut file| file.write_all(&archive).map(|()| file)).map_err(failed)
}

fn entry(name: &str, mode: u32, content: &[u8]) -> Vec<u8> {
    // inode, mode, owner, group, links, time, size, device, its own device, length of the name, checksum
    let fields = [0, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
    let mut bytes = b"070701".to_vec();
    bytes.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
    bytes.extend(name.bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn archive_is_one_that_cpio_reads() {
        let dir = std::env::temp_dir();
        let file = dir.join(format!("lab-archive-{}", std::process::id()));
        let bytes = [entry("init", 0o100_755, b"12345"), entry("TRAILER!!!", 0, &[])].concat();
        std::fs::write(&file, bytes).unwrap();
        let listed = Command::new("cpio").args(["-itv", "--quiet", "-F"]).arg(&file).output().unwrap();
        std::fs::remove_file(&file).unwrap();
        let line = String::from_utf8(listed.stdout).unwrap();
        assert!(listed.status.success() && line.starts_with("-rwxr-xr-x"), "{line}");
        assert!(line.contains(" 5 ") && line.trim_end().ends_with(" init"), "{line}");
    }
}
