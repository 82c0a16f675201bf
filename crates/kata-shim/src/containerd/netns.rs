//! Takes the process into the pod's network namespace.
//!
//! The owner lives there, as runtimes do whose containers are processes: what containerd's clients fill through
//! `/proc/<pid>/ns/net` of the pid they are told is the pod's network, and taps and filters need no second process. The VMM
//! and its helpers do not come along: they get namespaces of their own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use thiserror::Error;

use super::bundle::Netns;

/// The calling thread's namespace.
const OWN: &str = "/proc/thread-self/ns/net";

#[derive(Debug, Error)]
pub(crate) enum NetnsError {
    #[error("cannot make a network namespace for the pod")]
    Make(#[source] io::Error),
    #[error(
        "cannot enter the pod's network namespace {path}; see whether whoever made it (CNI, netns hooks) has removed it"
    )]
    Enter { path: PathBuf, source: io::Error },
    #[error(
        "{path} is the host's network namespace, which a virtual machine cannot share; give the pod one of its own"
    )]
    Host { path: PathBuf },
}

/// The namespace that the process is in.
pub(crate) fn own() -> Result<OwnedFd, NetnsError> {
    File::open(OWN).map(OwnedFd::from).map_err(NetnsError::Make)
}

/// Enters the namespace, and answers the one it came from. To be called while the process has one thread: it is each
/// thread's own.
pub(crate) fn enter(netns: &Netns) -> Result<OwnedFd, NetnsError> {
    let left = File::open(OWN).map_err(NetnsError::Make)?;
    match netns {
        Netns::New => {
            // SAFETY: this unshares the network namespace alone; descriptors and memory stay shared as they are.
            let made = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) };
            made.map_err(|error| NetnsError::Make(error.into()))?;
        }
        Netns::At(path) => join(path, &left)?,
    }
    Ok(left.into())
}

fn join(path: &Path, own: &File) -> Result<(), NetnsError> {
    let failed = |source| NetnsError::Enter { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let own = own.metadata().map_err(failed)?;
    let there = file.metadata().map_err(failed)?;
    if (own.dev(), own.ino()) == (there.dev(), there.ino()) {
        return Err(NetnsError::Host { path: path.to_owned() });
    }
    let joined = move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network));
    joined.map_err(|error| failed(error.into()))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn inode() -> u64 {
        std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino()
    }

    #[test]
    fn a_new_namespace_is_another_and_can_be_joined_by_path() {
        if !rustix::process::geteuid().is_root() {
            return kata_testkit::skip("network namespaces need root");
        }
        let (told, made) = mpsc::channel();
        let (done, wait) = mpsc::channel::<()>();
        let maker = std::thread::spawn(move || {
            enter(&Netns::New).unwrap();
            let path = format!("/proc/self/task/{}/ns/net", rustix::thread::gettid().as_raw_nonzero());
            told.send((inode(), path)).unwrap();
            let _ = wait.recv();
        });
        let (number, path) = made.recv().unwrap();
        assert_ne!(number, inode());
        let joiner = std::thread::spawn(move || enter(&Netns::At(path.into())).map(|_| inode()));
        assert_eq!(joiner.join().unwrap().unwrap(), number);
        drop(done);
        maker.join().unwrap();
    }

    #[test]
    fn the_hosts_namespace_is_refused_and_an_absent_one_is_named() {
        let host = enter(&Netns::At("/proc/thread-self/ns/net".into())).unwrap_err();
        assert!(matches!(host, NetnsError::Host { .. }), "{host}");
        let absent = enter(&Netns::At("/run/netns/no-such".into())).unwrap_err();
        assert!(absent.to_string().contains("/run/netns/no-such"), "{absent}");
    }
}
