//! What only a machine with KVM, vhost and cgroup v2 can show: `cargo xtask lab test` makes one anywhere.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kata_testkit::containerd::Version;
use kata_testkit::cri::{Container, Cri, handler};
use kata_testkit::host::{Host, stderr, stdout};

/// Whether this is the lab, where all of it has to be there; says (and counts) if not.
fn in_the_lab() -> bool {
    let inside = std::env::var_os("KATA_TEST_LAB").is_some();
    if !inside {
        kata_testkit::skip("this is not the lab: cargo xtask lab test");
    }
    inside
}

#[test]
fn accelerator_kvm_boots_a_guest_that_sees_kvms_clock() {
    if !in_the_lab() {
        return;
    }
    let host = Host::new().unwrap();
    let clock = "cat /sys/devices/system/clocksource/clocksource0/available_clocksource";
    let kvm = ["--hypervisor", "qemu", "--set", "runtime.accelerator=kvm"];
    let output = host.sh(&[&["--timing", "--memory", "256M"][..], &kvm].concat(), clock);
    assert!(stdout(&output).contains("kvm-clock"), "{}{}", stdout(&output), stderr(&output));
    assert!(stderr(&output).contains("qemu with kvm"), "{}", stderr(&output));
}

#[test]
fn built_in_monitor_is_taken_without_being_asked_for_and_qemu_where_emulation_is() {
    if !in_the_lab() {
        return;
    }
    let host = Host::new().unwrap();
    host.configure("[runtime]\nhypervisor_name = \"auto\"\n");
    let output = host.output(["check"]);
    assert!(stdout(&output).contains("builtin with kvm"), "{}{}", stdout(&output), stderr(&output));
    host.configure("[runtime]\nhypervisor_name = \"auto\"\naccelerator = \"tcg\"\n");
    let output = host.output(["check"]);
    assert!(stdout(&output).contains("accelerator = \"tcg\""), "{}{}", stdout(&output), stderr(&output));
}

#[test]
fn builtin_monitor_runs_a_pod_in_its_jail_and_its_death_is_told() {
    if !in_the_lab() {
        return;
    }
    let host = Host::new().unwrap();
    host.configure("[runtime]\nhypervisor_name = \"builtin\"\n");
    let check = host.output(["check"]);
    let text = stdout(&check);
    assert!(text.contains("builtin with kvm"), "{text}{}", stderr(&check));
    assert!(text.contains("can be confined"), "{text}{}", stderr(&check));

    let script =
        "cat /sys/devices/system/clocksource/clocksource0/available_clocksource; echo up; exec sleep 1000";
    let mut pod = host
        .ctl(["run", "--rm", "--memory", "256M", host.image().as_str(), "sh", "-c", script])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(pod.stdout.take().unwrap()).lines().map_while(Result::ok);
    let said: Vec<String> = lines.take_while(|line| line != "up").collect();
    let monitor = host.pids_of("kata-vmm").first().copied();
    let status = monitor.map(|pid| std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap());
    let killed = monitor.map(|pid| Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap());
    let output = pod.wait_with_output().unwrap();
    assert!(said.iter().any(|line| line.contains("kvm-clock")), "{said:?}{}", stderr(&output));
    let status = status.unwrap();
    for line in ["CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{status}");
    }
    assert!(killed.unwrap().success());
    assert!(stderr(&output).contains("VMM was killed by signal 9"), "{}", stderr(&output));
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
fn vhost_devices_and_all_controllers_of_cgroup_v2_are_there() {
    if !in_the_lab() {
        return;
    }
    for device in ["/dev/vhost-vsock", "/dev/vhost-net", "/dev/net/tun"] {
        let opened = OpenOptions::new().read(true).write(true).open(device);
        assert!(opened.is_ok(), "{device}: {opened:?}");
    }
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control").unwrap();
    for controller in ["cpuset", "cpu", "io", "memory", "pids"] {
        assert!(controllers.split_whitespace().any(|one| one == controller), "{controllers}");
    }
}

/// Each driver, and its program.
const DRIVERS: [(&str, &str); 2] = [("qemu", "qemu-system"), ("builtin", "kata-vmm")];

/// A containerd with a handler for each driver, of the driver's name.
fn with_each_driver(settings: &str) -> Cri {
    let handlers = |host: &Host| {
        DRIVERS
            .map(|(driver, _)| {
                let file = host.scratch(&format!("{driver}.toml"));
                host.configure_at(&file, &format!("[runtime]\nhypervisor_name = \"{driver}\"\n{settings}"));
                let options =
                    format!("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{driver}.options]");
                handler(
                    Version::V1,
                    driver,
                    "io.containerd.kata.v2",
                    &format!("{options}\nConfigPath = {file:?}\n"),
                )
            })
            .concat()
    };
    Cri::with_handlers(Version::V1, handlers).unwrap()
}

/// The kernel's threads that move packets for a process, each with the processor time that it had, in ticks.
fn movers(process: u32) -> Vec<u64> {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let stat = |thread: &Path| std::fs::read_to_string(thread.join("stat")).unwrap_or_default();
    let stats = threads.map(|thread| stat(&thread.unwrap().path()));
    stats
        .filter(|stat| stat.contains(" (vhost-"))
        .map(|stat| {
            // User and system time (proc_pid_stat(5), 14 and 15): the third field follows the name.
            let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
            fields.iter().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
        })
        .collect()
}

#[test]
fn hosts_kernel_moves_the_packets_of_each_drivers_pod_and_its_disks_are_held_to_their_limits() {
    if !in_the_lab() {
        return;
    }
    let cri = with_each_driver(
        "emptydir_mode = \"block-plain\"\n[hypervisor.qemu]\ndisk_rate_limiter_bw_max_rate = 33554432\n",
    );
    for (driver, program) in DRIVERS {
        let volume = cri.host().scratch(&format!("pods/{driver}/volumes/kubernetes.io~empty-dir/dir"));
        std::fs::create_dir_all(&volume).unwrap();
        let pod = cri.pod(driver).handler(driver).run();
        let serve = "dd if=/dev/zero of=/dev/shm/data bs=1M count=12; httpd -f -p 80 -h /dev/shm";
        let main = pod.container("main").mount(&volume, "/dir").sh(serve).start();
        let monitor = *cri.host().pids_of(program).first().unwrap();
        assert_eq!(movers(monitor).len(), 1, "{driver}");

        let source = format!("http://{}/data", pod.address());
        cri.host().wait_for("the server", || {
            let mut fetch = cri.containerd().beside("busybox");
            let fetched = fetch.args(["wget", "-qO", "/dev/null", &source]).stderr(Stdio::null()).status();
            fetched.unwrap().success().then_some(())
        });
        assert!(movers(monitor).first().is_some_and(|ticks| *ticks > 0), "{driver}: it did no work");
        late_interface_is_reached(&cri, &main, driver, monitor);
        disk_is_no_faster_than_its_limit(&main, driver);
        pod.remove();
    }
}

fn late_interface_is_reached(cri: &Cri, main: &Container<'_>, driver: &str, monitor: u32) {
    let outside = |line: &str| {
        let output = cri.containerd().beside("ip").args(line.split(' ')).output().unwrap();
        assert!(output.status.success(), "{line}: {}", stderr(&output));
    };
    let owner = *cri.host().pids_of("containerd-shim-kata").first().unwrap();
    let namespace = format!("/proc/{owner}/ns/net");
    outside("link add late0 type veth peer name eth1");
    outside("addr add 10.90.0.1/24 dev late0");
    outside("link set late0 up");
    outside(&format!("link set eth1 netns {namespace}"));
    for line in ["ip addr add 10.90.0.2/24 dev eth1", "ip link set eth1 up"] {
        let inside = Command::new("nsenter").arg(format!("--net={namespace}")).args(line.split(' ')).status();
        assert!(inside.unwrap().success(), "{line}");
    }
    cri.host()
        .wait_for("the late interface", || (main.sh("ping -c 1 -W 5 10.90.0.1").code == 0).then_some(()));
    assert_eq!(movers(monitor).len(), 2, "{driver}");
    outside("link del late0");
    cri.host().wait_for("it to go", || (movers(monitor).len() == 1).then_some(()));
}

fn disk_is_no_faster_than_its_limit(main: &Container<'_>, driver: &str) {
    let begin = Instant::now();
    let wrote =
        main.sh("dd if=/dev/zero of=/dir/data bs=1M count=16 conv=fsync; grep -c ' /dir ext4 ' /proc/mounts");
    let took = begin.elapsed();
    assert!(wrote.stdout.ends_with("1\n"), "{driver}: {wrote:?}");
    // 16 MiB at 4 MiB a second, less what may pass at once.
    assert!(took > Duration::from_millis(3500), "{driver}: {took:?}");
}

/// A verity device over files in a directory of its own; closed when dropped.
struct Verity {
    dir: tempfile::TempDir,
    name: String,
}

impl Verity {
    const SIZE: usize = 1 << 20;

    fn format() -> (Self, String) {
        let verity = Self { dir: tempfile::tempdir().unwrap(), name: format!("lab-{}", std::process::id()) };
        std::fs::write(verity.data(), vec![7; Self::SIZE]).unwrap();
        let output = verity.setup().arg("format").arg(verity.data()).arg(verity.hashes()).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let text = stdout(&output);
        let root = text.lines().find_map(|line| line.strip_prefix("Root hash:")).unwrap().trim().to_owned();
        (verity, root)
    }

    fn open(&self, root: &str) -> PathBuf {
        let output =
            self.setup().arg("open").arg(self.data()).arg(&self.name).arg(self.hashes()).arg(root).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        Path::new("/dev/mapper").join(&self.name)
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn hashes(&self) -> PathBuf {
        self.dir.path().join("hashes")
    }

    /// There is no udev to wait for.
    fn setup(&self) -> Command {
        let mut command = Command::new("veritysetup");
        command.env("DM_DISABLE_UDEV", "1");
        command
    }
}

impl Drop for Verity {
    fn drop(&mut self) {
        let _ = self.setup().args(["close", &self.name]).output();
    }
}

#[test]
fn verity_device_reads_what_was_hashed_and_refuses_what_was_changed() {
    if !in_the_lab() {
        return;
    }
    let (verity, root) = Verity::format();
    let good = std::fs::read(verity.open(&root));
    assert_eq!(good.unwrap(), vec![7; Verity::SIZE]);
    assert!(verity.setup().args(["close", &verity.name]).status().unwrap().success());

    let changed = File::options().write(true).open(verity.data()).unwrap();
    changed.write_all_at(&[8], 5000).unwrap();
    let device = File::open(verity.open(&root)).unwrap();
    let mut block = [0; 4096];
    device.read_exact_at(&mut block, 0).unwrap();
    assert!(device.read_exact_at(&mut block, 4096).is_err(), "a changed block is read");
}

/// What a pod's stages say of how its machine came to run.
fn restored(host: &Host, name: &str) -> bool {
    let analysis = host.output(["analyze", "--json", name]);
    let text = stdout(&analysis);
    assert!(text.contains("\"restore\"") != text.contains("\"start\""), "{text}{}", stderr(&analysis));
    text.contains("\"restore\"")
}

#[test]
fn pods_start_as_copies_of_one_machine_and_are_their_own() {
    if !in_the_lab() {
        return;
    }
    let host = Host::new().unwrap();
    let store = host.scratch("template");
    let configure = |share: &str| {
        host.configure(&format!(
            "[runtime]\nhypervisor_name = \"builtin\"\n[hypervisor.qemu]\ndefault_memory = 256\n\
             shared_fs = \"{share}\"\n[hypervisor.qemu.factory]\nenable_template = true\ntemplate_path = \"{}\"\n",
            store.display()
        ));
    };
    configure("virtio-fs");
    assert_eq!(host.output(["factory", "status"]).status.code(), Some(1));
    let made = host.output(["factory", "init"]);
    assert!(made.status.success(), "{}", stderr(&made));
    let status = host.output(["factory", "status", "--verify"]);
    assert_eq!(status.status.code(), Some(0), "{}{}", stdout(&status), stderr(&status));

    let script = "hostname; cat /proc/sys/kernel/random/uuid; date +%s; ls /bin/busybox; exec sleep 1000";
    let said = ["one", "two"].map(|name| {
        let image = host.image();
        let run = host.output(["run", "-d", "--name", name, image.as_str(), "sh", "-c", script]);
        assert!(run.status.success(), "{}{}", stderr(&run), host.owner_log(name));
        let lines = host.wait_for("four lines", || {
            let lines: Vec<String> =
                stdout(&host.output(["logs", name])).lines().map(str::to_owned).collect();
            (lines.len() >= 4).then_some(lines)
        });
        assert!(restored(&host, name), "{}", host.owner_log(name));
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        assert!(now.abs_diff(lines[2].parse().unwrap()) < 30, "{} is not {now}", lines[2]);
        lines
    });
    assert_eq!([&said[0][0], &said[1][0]], ["one", "two"]);
    assert_ne!(said[0][1], said[1][1], "the same random numbers");
    for name in ["one", "two"] {
        assert!(host.output(["rm", "-f", name]).status.success());
    }

    // What is damaged is not started from, and the pod's log says so.
    let digest = std::fs::read_dir(&store).unwrap().next().unwrap().unwrap().path();
    let state = OpenOptions::new().write(true).open(digest.join("state")).unwrap();
    state.write_all_at(b"?", std::fs::metadata(digest.join("state")).unwrap().len() / 2).unwrap();
    let image = host.image();
    let run = host.output(["run", "-d", "--name", "cold", image.as_str(), "sleep", "1000"]);
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(!restored(&host, "cold"));
    let log = host.owner_log("cold");
    assert!(log.contains("damaged") && log.contains("kata-ctl factory init"), "{log}");
    assert!(host.output(["rm", "-f", "cold"]).status.success());
    assert!(host.output(["factory", "destroy"]).status.success());
    assert_eq!(std::fs::read_dir(&store).unwrap().count(), 0);
}
