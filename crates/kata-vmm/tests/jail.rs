//! The jail of a real `kata-vmm run`, looked at from outside while it waits for its first command.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::multiple_unsafe_ops_per_block,
    reason = "a test ends at the first surprise"
)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

const USER: u32 = 912_345;

/// A monitor that waits for its client.
struct Jailed {
    outer: Child,
    /// Its process id here.
    pid: u32,
    api: UnixStream,
    sockets: tempfile::TempDir,
}

impl Jailed {
    /// `None`, said aloud, where it cannot be looked at.
    fn start() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: namespaces and another user need root");
            return None;
        }
        let sockets = tempfile::tempdir().unwrap();
        let (api, theirs) = UnixStream::pair().unwrap();
        let user = format!("{USER}:{USER}");
        let sockets_path = sockets.path().to_str().unwrap().to_owned();
        let args = ["run", "--api-fd", "3", "--user", &user, "--sockets", &sockets_path];
        let mut outer = started(&args, theirs.into());
        let pid = child_of(outer.id(), &mut outer);
        let mut jailed = Self { outer, pid, api, sockets };
        // The answer comes from inside the jail.
        let info = jailed.ask(r#"{"id":1,"command":"info"}"#);
        assert!(info.contains(r#""jailed":true"#), "{info}");
        Some(jailed)
    }

    fn ask(&mut self, line: &str) -> String {
        self.api.write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        BufReader::new(&self.api).read_line(&mut answer).unwrap();
        answer
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.pid)).unwrap()
    }

    /// The value of a line of its `status`.
    fn status(&self, key: &str) -> String {
        let status = self.read("status");
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("{key} in {status}")).trim().to_owned()
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        let _ = self.outer.kill();
        let _ = self.outer.wait();
    }
}

/// `kata-vmm` as the first process of a PID namespace, with `fd` as its descriptor 3.
fn started(args: &[&str], fd: OwnedFd) -> Child {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--", env!("CARGO_BIN_EXE_kata-vmm")]).args(args);
    give(&mut command, fd);
    command.spawn().unwrap()
}

/// Makes `fd` the one descriptor that the program has beside its standard streams.
fn give(command: &mut Command, fd: OwnedFd) {
    // SAFETY: both are system calls, and a process that is about to execute its program needs none of the other descriptors.
    unsafe {
        command.pre_exec(move || {
            let given = libc::dup2(fd.as_raw_fd(), 3);
            let closed = libc::close_range(4, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed());
            match given.min(closed) {
                ..0 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            }
        });
    }
}

/// The process that `parent` has started.
fn child_of(parent: u32, outer: &mut Child) -> u32 {
    loop {
        let children =
            fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
        if let Some(pid) = children.split_whitespace().next() {
            return pid.parse().unwrap();
        }
        assert!(outer.try_wait().unwrap().is_none(), "kata-vmm did not stay");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn every_line_of_the_jail_is_seen_from_outside() {
    let Some(jailed) = Jailed::start() else { return };
    for namespace in ["mnt", "net", "ipc", "uts", "cgroup", "user", "pid"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&jailed.pid.to_string()), of("self"), "{namespace}");
    }
    for (key, value) in [
        ("Uid", format!("{USER}\t{USER}\t{USER}\t{USER}")),
        ("Gid", format!("{USER}\t{USER}\t{USER}\t{USER}")),
        ("Groups", String::new()),
        ("CapEff", "0".repeat(16)),
        ("CapPrm", "0".repeat(16)),
        ("CapInh", "0".repeat(16)),
        ("CapBnd", "0".repeat(16)),
        ("CapAmb", "0".repeat(16)),
        ("NoNewPrivs", "1".to_owned()),
        ("Seccomp", "2".to_owned()),
        ("Threads", "1".to_owned()),
    ] {
        assert_eq!(jailed.status(key), value, "{key}");
    }
    let map = jailed.read("uid_map");
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), [&USER.to_string(), &USER.to_string(), "1"]);
    // Not dumpable: its files in /proc are root's, whoever it is.
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(format!("/proc/{}/status", jailed.pid)).unwrap().uid(), 0);
    let limits = jailed.read("limits");
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    assert_eq!(limit("Max processes"), ["512", "512"]);
    let files = limit("Max open files");
    assert_eq!(files[0], files[1]);
}

#[test]
fn root_of_the_jail_is_empty_and_read_only_but_for_the_sockets() {
    let Some(jailed) = Jailed::start() else { return };
    let _ = std::os::unix::net::UnixListener::bind(jailed.sockets.path().join("kata.hvsock_1")).unwrap();
    let names = |path: &str| {
        let entries = fs::read_dir(format!("/proc/{}/root/{path}", jailed.pid)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(names(""), ["sockets"]);
    assert_eq!(names("sockets"), ["kata.hvsock_1"]);
    let mounts = jailed.read("mountinfo");
    let mut points: Vec<(&str, &str)> = mounts
        .lines()
        .map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (fields[4], fields[5])
        })
        .collect();
    points.sort_unstable();
    assert_eq!(points.iter().map(|(path, _)| *path).collect::<Vec<_>>(), ["/", "/sockets"], "{mounts}");
    for (path, options) in points {
        for option in ["ro", "nosuid", "nodev", "noexec"] {
            assert!(options.split(',').any(|has| has == option), "{path} is not {option}: {options}");
        }
    }
    // Nothing but the standard streams and its client.
    let mut fds: Vec<String> = fs::read_dir(format!("/proc/{}/fd", jailed.pid))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    fds.sort_unstable();
    assert_eq!(fds, ["0", "1", "2", "3"]);
}

#[test]
fn monitor_ends_with_its_client() {
    let Some(mut jailed) = Jailed::start() else { return };
    jailed.api.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(jailed.outer.wait().unwrap().success());
}

#[test]
fn monitor_that_cannot_be_confined_does_not_start() {
    let (api, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kata-vmm"));
    command.args(["run", "--api-fd", "3"]).stderr(Stdio::piped());
    give(&mut command, theirs.into());
    let output = command.spawn().unwrap().wait_with_output().unwrap();
    drop(api);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("PID namespace") && said.contains("--no-jail"), "{said}");
}

#[test]
fn check_says_that_the_jail_can_be_had() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: another user needs root");
        return;
    }
    let user = format!("{USER}:{USER}");
    let output =
        Command::new(env!("CARGO_BIN_EXE_kata-vmm")).args(["check", "--user", &user]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
