//! A jailed monitor gives its guest a drive of the host: from the start, and again while it runs. What it wants is said in `initrd`, and
//! the lab has the drive, and the IOMMU in front of it, with `--iommu`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends at the first surprise")]
#![cfg(feature = "vfio")]

mod initrd;
mod monitor;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, PipeReader, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use initrd::{initrd, stock_kernel};
use kata_vmm_api::{
    Command as Ask, Descriptor, HostDeviceSpec, KernelSpec, MachineSpec, MemorySpec, Request, Start,
};
use monitor::{monitor, request};
use rustix::process::{Resource, Rlimit, setrlimit};

const SCRIPT: &str = r#"#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
say() { echo "GUEST $*"; }
drive=/dev/nvme0n1
until [ -b $drive ]; do usleep 20000; done
say reads $(dd if=$drive bs=512 count=1 2>/dev/null | head -c 17)
echo "said by the guest" | dd of=$drive bs=512 seek=8 conv=sync,fsync 2>/dev/null
say interrupts $(awk '/nvme/ { for (cpu = 2; cpu <= NF && $cpu ~ /^[0-9]+$/; cpu++) sum += $cpu } END { print (sum > 0) }' /proc/interrupts)
while [ -e $drive ]; do usleep 20000; done
say gone
until [ -b $drive ]; do usleep 20000; done
say reads $(dd if=$drive bs=512 skip=8 count=1 2>/dev/null | head -c 17)
poweroff -f
"#;

/// Memory of the guest in MiB.
const MEMORY: u64 = 192;

/// The lab's drive.
struct Drive {
    address: String,
    sys: PathBuf,
}

impl Drive {
    /// `None`, which is said, in a lab without one.
    fn find() -> Option<Drive> {
        let devices = fs::read_dir("/sys/bus/pci/devices").unwrap().map(|entry| entry.unwrap().path());
        let is_drive = |path: &PathBuf| fs::read_to_string(path.join("class")).unwrap().trim() == "0x010802";
        let Some(sys) = devices.into_iter().find(is_drive) else {
            eprintln!("skipped: wants the lab with --iommu");
            return None;
        };
        Some(Drive { address: sys.file_name().unwrap().to_str().unwrap().to_owned(), sys })
    }

    /// Gives it to a driver of the host, which takes a moment.
    fn bind(&self, driver: &str) {
        fs::write(self.sys.join("driver_override"), driver).unwrap();
        if self.sys.join("driver").exists() {
            fs::write(self.sys.join("driver/unbind"), &self.address).unwrap();
        }
        fs::write("/sys/bus/pci/drivers_probe", &self.address).unwrap();
        let bound = fs::read_link(self.sys.join("driver")).unwrap();
        assert!(bound.ends_with(driver), "{}", bound.display());
    }

    /// Its block device, which the host's driver makes in its own time.
    fn block(&self) -> File {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            if let Ok(file) = File::options().read(true).write(true).open("/dev/nvme0n1") {
                return file;
            }
            assert!(Instant::now() < until, "the host does not find its own drive");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn group(&self) -> u32 {
        let group = fs::read_link(self.sys.join("iommu_group")).unwrap();
        group.file_name().unwrap().to_str().unwrap().parse().unwrap()
    }

    /// Container and group, opened anew: neither opens as long as somebody else has it.
    fn open(&self) -> [File; 2] {
        let open = |path: &Path| {
            File::options()
                .read(true)
                .write(true)
                .open(path)
                .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let vfio = Path::new("/dev/vfio");
        [open(&vfio.join("vfio")), open(&vfio.join(self.group().to_string()))]
    }

    fn spec(&self, first: usize) -> HostDeviceSpec {
        HostDeviceSpec {
            id: "drive".to_owned(),
            address: self.address.clone(),
            container: Descriptor(first),
            group: Descriptor(first + 1),
            group_number: self.group(),
        }
    }
}

/// A monitor that waits, and the guest's console.
struct Vmm {
    api: UnixStream,
    answers: BufReader<UnixStream>,
    console: std::io::Lines<BufReader<PipeReader>>,
    last: u64,
}

impl Vmm {
    fn ask(&mut self, command: Ask, files: &[&File]) {
        self.last += 1;
        let line = serde_json::to_string(&Request { id: self.last, command }).unwrap();
        let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        request(&self.api, &line, &files);
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        assert!(answer.contains("\"done\""), "{line}: {answer}");
    }

    fn said(&mut self) -> String {
        let mut all = Vec::new();
        loop {
            let line = self.console.next().map(Result::unwrap);
            let line = line.unwrap_or_else(|| panic!("the guest ended: {all:#?}"));
            match line.split_once("GUEST ") {
                Some((_, text)) => return text.trim().to_owned(),
                None => all.push(line),
            }
        }
    }
}

#[test]
fn drive_of_the_host_is_the_guest_s_from_the_start_and_while_it_runs_and_comes_back() {
    let Some(kernel) = stock_kernel() else { return };
    let Some(drive) = Drive::find() else { return };
    drive.block().write_all(b"said by the host.").unwrap();
    assert!(Command::new("modprobe").arg("vfio-pci").status().unwrap().success());
    drive.bind("vfio-pci");
    // What the runtime does for a monitor that is to have such a device.
    let most = Some((MEMORY + 64) << 20);
    setrlimit(Resource::Memlock, Rlimit { current: most, maximum: most }).unwrap();

    let directory = tempfile::tempdir().unwrap();
    let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
    let (mut child, api) = monitor(&kvm, &["--user", "65534:65534", "--log-level", "debug"]);
    let (console, output) = std::io::pipe().unwrap();
    let answers = BufReader::new(api.try_clone().unwrap());
    let mut vmm = Vmm { api, answers, console: BufReader::new(console).lines(), last: 0 };
    let [container, group] = drive.open();
    let (kernel, disk) = (File::open(kernel).unwrap(), initrd(SCRIPT, &[], &directory.path().join("initrd")));
    let output = File::from(std::os::fd::OwnedFd::from(output));
    let spec = MachineSpec {
        cpus: 1,
        max_cpus: 1,
        memory: MemorySpec {
            size_mib: MEMORY,
            max_mib: MEMORY,
            prealloc: false,
            hugepages: false,
            reporting: true,
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
        host_devices: vec![drive.spec(3)],
    };
    vmm.ask(Ask::Create(Box::new(spec)), &[&kernel, &disk, &output, &container, &group]);
    drop((container, group, output));
    vmm.ask(Ask::Boot, &[]);
    assert_eq!(vmm.said(), "reads said by the host.");
    assert_eq!(vmm.said(), "interrupts 1");
    vmm.ask(Ask::RemoveDevice { id: "drive".to_owned() }, &[]);
    assert_eq!(vmm.said(), "gone");
    let [container, group] = drive.open();
    vmm.ask(Ask::AddHostDevice(drive.spec(0)), &[&container, &group]);
    drop((container, group));
    assert_eq!(vmm.said(), "reads said by the guest");
    assert!(child.wait().unwrap().success());

    drive.bind("nvme");
    let mut block = drive.block();
    let mut read = [0; 17];
    block.seek(SeekFrom::Start(8 * 512)).unwrap();
    block.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"said by the guest");
}
