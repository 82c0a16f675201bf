//! A guest is written to a snapshot, and two others go on from there, each in a jailed monitor of its own. What it wants is said in
//! `initrd`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends at the first surprise"
)]

mod initrd;
mod monitor;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use initrd::{initrd, stock_kernel};
use monitor::{monitor, request};

/// Counts, and says with each number what was random just then, what time it is, and what the disk holds. It touches 24 MiB first.
const SCRIPT: &str = r#"#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /bin /proc /sys /dev /ram
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev; mount -t tmpfs none /ram
/modules
dd if=/dev/urandom of=/ram/weight bs=1M count=24 2>/dev/null
sum=$(md5sum < /ram/weight)
driver=$(ls -d /sys/bus/*/drivers/vmgenid 2>/dev/null | wc -l)
n=0
while :; do
    n=$((n + 1))
    echo 1 > /proc/sys/vm/drop_caches
    random=$(dd if=/dev/urandom bs=8 count=1 2>/dev/null | od -An -tx8 | tr -d ' ')
    disk=$(dd if=/dev/vda bs=512 count=1 2>/dev/null | tr -d '\0')
    fork=$(dmesg | grep -c 'virtual machine fork')
    echo "GUEST $n $random $(cut -d' ' -f1 /proc/uptime) $(date +%s) $disk $fork $(nproc) $driver"
    if [ $((n % 8)) = 0 ] && [ "$sum" != "$(md5sum < /ram/weight)" ]; then echo "GUEST broken"; fi
    sleep 0.1
done
"#;

const DRIVERS: &[&str] = &["virtio_blk", "vmw_vsock_virtio_transport", "virtio_balloon", "virtio_mem"];

const SHAPE: &str =
    r#""cpus":2,"max-cpus":3,"memory":{"size-mib":192,"max-mib":320,"reporting":true},"console":2"#;
const DISK: &str = r#""disks":[{"id":"disk","file":3,"readonly":true}]"#;

fn kernel_line(start: &str) -> String {
    let vsock = r#""vsock":{"cid":3,"listener":4,"name":"h"}"#;
    format!(r#"{{"id":1,"command":{{"create":{{{SHAPE},{DISK},{vsock},"start":{start}}}}}}}"#)
}

/// A machine and what it says.
struct Guest {
    monitor: Child,
    api: UnixStream,
    replies: Lines<BufReader<UnixStream>>,
    console: Lines<BufReader<File>>,
}

/// What a guest says with a number.
#[derive(Clone, Debug)]
struct Said {
    number: u64,
    random: String,
    uptime: f64,
    disk: String,
    forks: u64,
    cpus: u64,
    /// Whether the kernel has a driver for the generation identifier.
    driver: bool,
}

impl Guest {
    /// Creates a machine; where it starts, two descriptors say.
    fn create(line: &str, start: [&File; 2], disk: &File, sockets: &Path) -> (Guest, String) {
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").unwrap();
        std::fs::create_dir_all(sockets).unwrap();
        let _ = std::fs::remove_file(sockets.join("h"));
        let listener = UnixListener::bind(sockets.join("h")).unwrap();
        let (monitor, api) = monitor(&kvm, &["--sockets", sockets.to_str().unwrap()]);
        let (console, output) = std::io::pipe().unwrap();
        let files = [start[0].as_fd(), start[1].as_fd(), output.as_fd(), disk.as_fd(), listener.as_fd()];
        request(&api, line, &files);
        drop(output);
        let replies = BufReader::new(api.try_clone().unwrap()).lines();
        let console = BufReader::new(File::from(std::os::fd::OwnedFd::from(console))).lines();
        let mut guest = Guest { monitor, api, replies, console };
        let reply = guest.replies.next().unwrap().unwrap();
        (guest, reply)
    }

    fn ask(&mut self, command: &str, files: &[&File]) -> String {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        request(&self.api, &format!(r#"{{"id":1,"command":{command}}}"#), &files);
        self.replies.next().unwrap().unwrap()
    }

    fn done(&mut self, command: &str, files: &[&File]) {
        assert_eq!(self.ask(command, files), r#"{"id":1,"done":"nothing"}"#, "{command}");
    }

    /// The next number that is said.
    fn says(&mut self) -> Said {
        loop {
            let line = self.console.next().unwrap_or_else(|| panic!("the guest ended")).unwrap();
            let Some((_, text)) = line.split_once("GUEST ") else {
                eprintln!("{line}");
                continue;
            };
            let words: Vec<&str> = text.split_whitespace().collect();
            let [number, random, uptime, _, disk, forks, cpus, driver] = words[..] else { panic!("{line}") };
            return Said {
                number: number.parse().unwrap(),
                random: random.to_owned(),
                uptime: uptime.parse().unwrap(),
                disk: disk.to_owned(),
                forks: forks.parse().unwrap(),
                cpus: cpus.parse().unwrap(),
                driver: driver != "0",
            };
        }
    }

    fn until(&mut self, what: impl Fn(&Said) -> bool) -> Said {
        loop {
            let said = self.says();
            if what(&said) {
                return said;
            }
        }
    }

    /// Kilobytes of the monitor's memory that are its own, and those that it shares with others.
    fn memory(&self) -> (u64, u64) {
        // The monitor is the child of the one that made its namespace.
        let parent = self.monitor.id();
        let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
        let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", children.trim())).unwrap();
        let sum = |names: [&str; 2]| {
            let lines = rollup.lines().filter(|line| names.iter().any(|name| line.starts_with(name)));
            lines.map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()).sum()
        };
        (sum(["Private_Clean", "Private_Dirty"]), sum(["Shared_Clean", "Shared_Dirty"]))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.api.shutdown(std::net::Shutdown::Both);
        let _ = self.monitor.wait();
    }
}

/// What is asked for a port on which nobody listens: the guest's driver refuses it.
fn refused_by_guest(sockets: &Path) {
    let mut client = UnixStream::connect(sockets.join("h")).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    client.write_all(b"CONNECT 7\n").unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "nobody listens in the guest");
}

#[test]
fn guest_goes_on_from_its_snapshot_twice_and_each_is_another() {
    let Some(kernel) = stock_kernel() else { return };
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let disk = |name: &str, content: &str| {
        let mut bytes = content.as_bytes().to_vec();
        bytes.resize(1 << 20, 0);
        std::fs::write(at(name), bytes).unwrap();
        File::open(at(name)).unwrap()
    };
    let create = |name: &str| File::options().read(true).write(true).create_new(true).open(at(name)).unwrap();
    let initrd = initrd(SCRIPT, DRIVERS, &at("initrd"));
    let kernel = File::open(kernel).unwrap();

    let started = Instant::now();
    let start =
        r#"{"kernel":{"kernel":0,"initrd":1,"command-line":"console=ttyS0 quiet reboot=t panic=-1"}}"#;
    let (mut first, reply) =
        Guest::create(&kernel_line(start), [&kernel, &initrd], &disk("first", "one"), &at("s0"));
    assert_eq!(reply, r#"{"id":1,"done":"nothing"}"#);
    first.done(r#""boot""#, &[]);
    let begun = first.says();
    let cold = started.elapsed();
    assert_eq!((begun.disk.as_str(), begun.forks, begun.cpus), ("one", 0, 2));
    refused_by_guest(&at("s0"));
    let (state, memory) = (create("state"), create("memory"));
    let running = first.ask(r#"{"snapshot":{"state":0,"memory":1}}"#, &[&state, &memory]);
    assert!(running.contains("wrong-state"), "{running}");
    first.until(|said| said.number >= 3);
    first.done(r#""pause""#, &[]);
    let written = Instant::now();
    first.done(r#"{"snapshot":{"state":0,"memory":1,"verify":true}}"#, &[&state, &memory]);
    let written = written.elapsed();
    let again = first.ask(r#"{"snapshot":{"state":0,"memory":1}}"#, &[&state, &memory]);
    assert!(again.contains("invalid") && again.contains("empty"), "{again}");
    // It is not disturbed: it goes on itself.
    first.done(r#""resume""#, &[]);
    let last = first.says();
    let last = first.until(|said| said.number > last.number);
    drop(first);
    let (length, blocks) = (memory.metadata().unwrap().len(), memory.metadata().unwrap().blocks() * 512);
    assert_eq!(length, 192 << 20);
    assert!(blocks < length / 2 + (24 << 20), "{blocks} bytes of {length} are there");
    drop((state, memory));

    let start = r#"{"snapshot":{"state":0,"memory":1}}"#;
    let line = kernel_line(start).replace(r#""cid":3"#, r#""cid":44"#);
    let open = || (File::open(at("state")).unwrap(), File::open(at("memory")).unwrap());
    let mut guests = Vec::new();
    for number in ["2", "3"] {
        let (state, memory) = open();
        let started = Instant::now();
        let sockets = at(&format!("s{number}"));
        let (mut guest, reply) = Guest::create(&line, [&state, &memory], &disk(number, number), &sockets);
        assert_eq!(reply, r#"{"id":1,"done":"nothing"}"#);
        let created = started.elapsed();
        guest.done(r#""boot""#, &[]);
        let said = guest.says();
        eprintln!(
            "cold start {cold:?}, written in {written:?}; from the snapshot: created {created:?}, speaks {:?}",
            started.elapsed()
        );
        refused_by_guest(&sockets);
        // Its clock goes on where it stood, however long ago that was.
        assert!(said.uptime < last.uptime + started.elapsed().as_secs_f64() + 1.0, "{last:?} {said:?}");
        guests.push((guest, said));
    }
    let said: Vec<Said> = guests
        .iter_mut()
        .map(|(guest, first)| {
            assert!((2..=last.number).contains(&first.number), "{first:?} {last:?}");
            let heard = |said: &Said| said.forks > 0 || !said.driver;
            let later = guest.until(|said| said.number >= first.number + 9 && heard(said));
            assert!(later.uptime > first.uptime, "{first:?} {later:?}");
            assert_eq!((later.forks, later.cpus), (u64::from(later.driver), 2));
            later
        })
        .collect();
    assert_eq!([said[0].disk.as_str(), said[1].disk.as_str()], ["2", "3"]);
    match said[0].driver {
        true => assert_ne!(said[0].random, said[1].random),
        false => eprintln!("skipped: wants a guest's kernel with CONFIG_VMGENID"),
    }
    for (guest, _) in &mut guests {
        let (private, shared) = guest.memory();
        eprintln!("{private} KiB are its own, {shared} KiB are shared; {} KiB are in the file", blocks >> 10);
        assert!(private * 1024 < blocks / 2, "{private} KiB private, {shared} KiB shared");
    }
    // What grows still grows, and is then no snapshot's any more.
    let (guest, _) = &mut guests[0];
    guest.done(r#"{"resize":{"cpus":2,"memory-mib":320}}"#, &[]);
    assert!(guest.ask(r#""info""#, &[]).contains(r#""memory-mib":320"#));
    guest.done(r#""pause""#, &[]);
    let refused =
        guest.ask(r#"{"snapshot":{"state":0,"memory":1}}"#, &[&create("state2"), &create("memory2")]);
    assert!(refused.contains("unsupported") && refused.contains("memory that came"), "{refused}");
    // One that went on from a snapshot can be written, too.
    let (guest, _) = &mut guests[1];
    guest.done(r#""pause""#, &[]);
    guest.done(r#"{"snapshot":{"state":0,"memory":1}}"#, &[&create("state3"), &create("memory3")]);
    let (state, memory) = (File::open(at("state3")).unwrap(), File::open(at("memory3")).unwrap());
    let start = r#"{"snapshot":{"state":0,"memory":1,"verify":true}}"#;
    let (mut grandchild, reply) =
        Guest::create(&kernel_line(start), [&state, &memory], &disk("4", "4"), &at("s4"));
    assert_eq!(reply, r#"{"id":1,"done":"nothing"}"#);
    grandchild.done(r#""boot""#, &[]);
    let first = grandchild.says();
    let later = grandchild.until(|said| said.number >= first.number + 9 && (said.forks > 1 || !said.driver));
    assert_eq!((later.forks, later.disk.as_str()), (2 * u64::from(later.driver), "4"));

    stale(&line, &at("memory"), &at("state"), &disk("5", "5"), &at("s5"));
}

/// What does not fit is refused and said.
fn stale(line: &str, memory: &Path, state: &Path, disk: &File, sockets: &Path) {
    let state = |()| File::open(state).unwrap();
    let whole = File::open(memory).unwrap();
    let short = memory.with_extension("short");
    File::create(&short).unwrap().set_len(1 << 20).unwrap();
    let verify = line.replace(r#""memory":1}"#, r#""memory":1,"verify":true}"#);
    let changed = memory.with_extension("changed");
    std::fs::copy(memory, &changed).unwrap();
    File::options().write(true).open(&changed).unwrap().write_all_at(&[0xa5; 8], 32 << 20).unwrap();
    let balloon = line.replace(r#""reporting":true"#, r#""reporting":false"#);
    for (line, memory, why) in [
        (line, &File::open(short).unwrap(), "memory is damaged"),
        (&verify, &File::open(changed).unwrap(), "checksum"),
        (&line.replace(r#""cpus":2"#, r#""cpus":1"#), &whole, "virtual CPUs"),
        (&line.replace(r#","disks":[{"id":"disk","file":3,"readonly":true}]"#, ""), &whole, "descriptors"),
        (&line.replace(r#""id":"disk""#, r#""id":"other""#), &whole, "other: it was not there"),
        (&balloon, &whole, "other devices"),
    ] {
        let (_guest, reply) = Guest::create(line, [&state(()), memory], disk, sockets);
        assert!(reply.contains(why) && (reply.contains("stale") || why == "descriptors"), "{reply}");
    }
}
