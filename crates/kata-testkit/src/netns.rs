//! Network namespaces for a test: a pod's, in which the calling thread then is, and the world outside it.
//!
//! ```text
//!   outside                pod (the calling thread)
//!   out-eth0 ═══ veth ═══ eth0
//! ```

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// The two namespaces. They go when this is dropped and the thread has ended.
pub struct Netns {
    outside: File,
}

impl Netns {
    /// Moves the calling thread into a new namespace that has a loopback and nothing else, or `None` (said aloud and
    /// counted) where that is not possible. Threads and processes that it starts from now on are in there too.
    pub fn enter() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            crate::skip("network namespaces need root");
            return None;
        }
        if Command::new("ip").arg("-V").output().is_err() {
            crate::skip("no ip in PATH: install iproute2");
            return None;
        }
        unshare_network();
        let outside = File::open("/proc/thread-self/ns/net").unwrap();
        unshare_network();
        Some(Self { outside })
    }

    /// Runs a command line in the pod's namespace. Its output comes back; a failure fails the test.
    pub fn run(&self, command: &str) -> String {
        let words: Vec<&str> = command.split_whitespace().collect();
        let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command line in the namespace outside.
    pub fn run_outside(&self, command: &str) -> String {
        self.run(&format!("nsenter --net={} {command}", self.outside()))
    }

    /// The outer namespace as a path that other processes can open.
    pub fn outside(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.outside.as_raw_fd())
    }

    /// A veth pair that is up: `name` in the pod's namespace, `out-<name>` outside.
    pub fn veth(&self, name: &str) {
        let outside = self.outside();
        self.run(&format!("ip link add {name} type veth peer name out-{name} netns {outside}"));
        self.run_outside(&format!("ip link set out-{name} up"));
        self.run(&format!("ip link set {name} up"));
    }
}

fn unshare_network() {
    // SAFETY: a network namespace of its own takes no memory and no open file from under any other code of this process.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
}
