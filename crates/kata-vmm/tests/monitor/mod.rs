//! `kata-vmm run`, jailed, and its interface.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Sends a line with descriptors.
pub fn request(api: &UnixStream, line: &str, files: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(files)));
    }
    let line = format!("{line}\n");
    let sent =
        sendmsg(api, &[std::io::IoSlice::new(line.as_bytes())], &mut ancillary, SendFlags::empty()).unwrap();
    assert_eq!(sent, line.len());
}

/// A jailed monitor that waits for its first command, started with more arguments, and the socket for that.
pub fn monitor(kvm: &File, more: &[&str]) -> (Child, UnixStream) {
    let (api, theirs) = UnixStream::pair().unwrap();
    for fd in [theirs.as_fd(), kvm.as_fd()] {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap();
    }
    let monitor = Command::new("unshare")
        .args(["--fork", "--pid", "--kill-child", env!("CARGO_BIN_EXE_kata-vmm"), "run"])
        .args(["--api-fd", &theirs.as_raw_fd().to_string(), "--kvm-fd", &kvm.as_raw_fd().to_string()])
        .args(more)
        .spawn()
        .unwrap();
    (monitor, api)
}
