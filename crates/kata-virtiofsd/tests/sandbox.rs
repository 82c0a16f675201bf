//! The sandbox seen from outside, on the real binary.
#![allow(clippy::unwrap_used, clippy::multiple_unsafe_ops_per_block, reason = "a test fails by panicking")]

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::CapabilitySet;

const LISTEN_FD: i32 = 3;

struct Server {
    outside: Child,
    socket: PathBuf,
    dir: tempfile::TempDir,
}

impl Server {
    fn spawn(configure: impl FnOnce(&mut Command)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("shared");
        std::fs::create_dir(&shared).unwrap();
        rustix::mount::mount_bind(&shared, &shared).unwrap();
        rustix::mount::mount_change(&shared, MountPropagationFlags::SHARED).unwrap();
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let fd = listener.as_raw_fd();
        let mut command = Command::new(env!("CARGO_BIN_EXE_kata-virtiofsd"));
        command.args(["--listen-fd", "3", "--shared-dir"]).arg(&shared).stderr(Stdio::piped());
        // SAFETY: dup2 and fcntl are async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                if libc::dup2(fd, LISTEN_FD) < 0 || libc::fcntl(LISTEN_FD, libc::F_SETFD, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        configure(&mut command);
        Self { outside: command.spawn().unwrap(), socket, dir }
    }

    fn shared(&self) -> PathBuf {
        self.dir.path().join("shared")
    }

    /// The server proper, once it has closed the door behind itself.
    fn inside(&self) -> u32 {
        let children = format!("/proc/{0}/task/{0}/children", self.outside.id());
        wait_for(|| {
            let child: u32 =
                std::fs::read_to_string(&children).ok()?.split_whitespace().next()?.parse().ok()?;
            (status(child, "Seccomp:")? == "2").then_some(child)
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.outside.kill();
        let _ = self.outside.wait();
        let _ = rustix::mount::unmount(self.shared(), UnmountFlags::DETACH);
    }
}

fn wait_for<T>(mut probe: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(begin.elapsed() < Duration::from_secs(10), "waited 10 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn status(pid: u32, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key)).map(|value| value.trim().to_owned())
}

fn namespace(pid: &str, kind: &str) -> PathBuf {
    std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap()
}

#[test]
fn server_lives_in_namespaces_of_its_own_with_few_capabilities_and_a_filter() {
    let server = Server::spawn(|_| ());
    let inside = server.inside();
    for kind in ["mnt", "pid", "net", "ipc", "user"] {
        assert_ne!(namespace(&inside.to_string(), kind), namespace("self", kind), "{kind}");
    }
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP
    assert_eq!(u64::from_str_radix(&status(inside, "CapEff:").unwrap(), 16).unwrap(), 0x8800_00db);
    assert_eq!(u64::from_str_radix(&status(inside, "CapBnd:").unwrap(), 16).unwrap(), 0x8800_00db);
    assert_eq!(status(inside, "NoNewPrivs:").unwrap(), "1");
    // The outer process lets go of its own when it has made the inner one's.
    wait_for(|| (status(server.outside.id(), "CapEff:")? == "0000000000000000").then_some(()));
    let map = std::fs::read_to_string(format!("/proc/{inside}/uid_map")).unwrap();
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "0", "4294967295"]);
}

#[test]
fn server_sees_the_shared_directory_only_and_mounts_that_come_later() {
    let server = Server::spawn(|_| ());
    let inside = server.inside();
    std::fs::write(server.shared().join("mark"), "here").unwrap();
    let root = PathBuf::from(format!("/proc/{inside}/root"));
    let names = |at: &Path| {
        let mut names: Vec<_> =
            std::fs::read_dir(at).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&root), ["mark"]);

    let later = server.dir.path().join("later");
    std::fs::create_dir(&later).unwrap();
    std::fs::write(later.join("file"), "late").unwrap();
    let target = server.shared().join("volume");
    std::fs::create_dir(&target).unwrap();
    rustix::mount::mount_bind(&later, &target).unwrap();
    assert_eq!(names(&root.join("volume")), ["file"]);
    rustix::mount::unmount(&target, UnmountFlags::DETACH).unwrap();
    assert!(names(&root.join("volume")).is_empty());
}

#[test]
fn server_without_the_right_to_make_namespaces_refuses_to_serve() {
    let mut server = Server::spawn(|command| {
        // SAFETY: a system call is async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                rustix::thread::remove_capability_from_bounding_set(CapabilitySet::SYS_ADMIN)?;
                Ok(())
            });
        }
    });
    assert_eq!(server.outside.wait().unwrap().code(), Some(1));
    let mut stderr = String::new();
    std::io::Read::read_to_string(server.outside.stderr.as_mut().unwrap(), &mut stderr).unwrap();
    assert!(stderr.contains("cannot enter the sandbox"), "{stderr}");
    assert!(stderr.contains("unshare the pid namespace"), "{stderr}");
}

#[test]
fn server_ends_when_the_machine_disconnects() {
    let mut server = Server::spawn(|_| ());
    server.inside();
    drop(UnixStream::connect(&server.socket).unwrap());
    assert!(server.outside.wait().unwrap().success());
}

#[test]
fn server_dies_with_the_process_its_owner_knows() {
    let mut server = Server::spawn(|_| ());
    let inside = server.inside();
    server.outside.kill().unwrap();
    server.outside.wait().unwrap();
    wait_for(|| status(inside, "State:").is_none_or(|state| state.starts_with('Z')).then_some(()));
}
