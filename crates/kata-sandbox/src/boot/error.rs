//! Why a pod did not start, with the last words of whoever knows.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use kata_hypervisor::process::{Exit, SpawnError};
use kata_hypervisor::{HypervisorError, VmExit};
use kata_image::manifest::{ManifestError, VerityError};

use crate::agent_client::AgentError;
use crate::hooks::HookError;
use crate::hybrid::HybridError;
use crate::network::NetworkError;
use crate::resources::ResourceError;

/// Lines of the console that an error quotes.
const CONSOLE_LINES: usize = 20;

/// Why a pod did not start.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The guest image is unusable.
    #[error("the guest image cannot be used")]
    Image(#[from] ManifestError),
    /// An extension image's parameters are not usable.
    #[error(
        "hypervisor.qemu.guest_extension_images: verity_params of {name:?} are not usable; `kata-ctl image extension` prints them"
    )]
    Extension {
        /// The extension.
        name: String,
        /// Why not.
        #[source]
        source: VerityError,
    },
    /// There is nothing to boot.
    #[error("no guest {0}: set hypervisor.qemu.{0}, or install a guest image that has one")]
    NoImage(&'static str),
    /// virtio-fs is configured, and its daemon was not found.
    #[error(
        "no virtio-fs daemon: set hypervisor.qemu.virtio_fs_daemon, or hypervisor.qemu.shared_fs = \"none\""
    )]
    NoDaemon,
    /// A hook that makes the pod's network failed.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The pod's network cannot be carried to the guest.
    #[error("the pod's network cannot be set up")]
    Network(#[from] NetworkError),
    /// A socket of the pod cannot be made.
    #[error("cannot make the socket {path}", path = .path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The virtio-fs daemon cannot be started.
    #[error("cannot start the virtio-fs daemon")]
    SpawnDaemon(#[from] SpawnError),
    /// The virtio-fs daemon ended.
    #[error("the virtio-fs daemon {exit}{output}")]
    DaemonDied {
        /// How.
        exit: Exit,
        /// What it said at last.
        output: Excerpt,
    },
    /// The VMM cannot be started.
    #[error("the virtual machine cannot be started{oom}")]
    Vmm {
        /// Why.
        #[source]
        source: Box<HypervisorError>,
        /// Whether the host's kernel did it, as the end of a sentence.
        oom: String,
    },
    /// The machine cannot be put where it belongs.
    #[error("the virtual machine cannot be put into the pod's cgroup")]
    Resources(#[from] ResourceError),
    /// The VMM ended before the agent was there.
    #[error("the virtual machine ended while it booted: {exit}{oom}{console}")]
    VmmExited {
        /// How.
        exit: VmExit,
        /// Whether the host's kernel did it, as the end of a sentence.
        oom: String,
        /// The guest's last words.
        console: Excerpt,
    },
    /// The guest runs, and the agent does not come.
    #[error(
        "the virtual machine runs, but its agent did not report within {bound:?} (agent.kata.reconnect_timeout_ms; \
         hypervisor.*.enable_debug shows more){console}"
    )]
    NoAgent {
        /// The bound.
        bound: Duration,
        /// The guest's last words.
        console: Excerpt,
    },
    /// The machine did not come up, and no wonder.
    #[error("{failure}; the guest image is not what it was when it was built")]
    Changed {
        /// What was seen of it.
        failure: Box<BootError>,
        /// What is different.
        #[source]
        source: ManifestError,
    },
    /// The agent announced itself, and cannot be reached.
    #[error("the guest's agent reported that it serves, but cannot be reached{console}")]
    Connect {
        /// What the way there says.
        #[source]
        source: HybridError,
        /// The guest's last words.
        console: Excerpt,
    },
    /// The agent announced itself with something that is no announcement.
    #[error("the agent reported with {0:?}, which is no announcement")]
    Announcement(String),
    /// The agent of a machine that started from a template does not become a pod's of its own.
    #[error(
        "the agent cannot {what}, which a machine that started from a template needs; `kata-ctl factory status --verify` tells whether \
         the template is whole, `factory destroy` removes it{console}"
    )]
    Copy {
        /// `set the clock`, `take new random numbers`.
        what: &'static str,
        /// Its answer.
        #[source]
        source: AgentError,
        /// The guest's last words.
        console: Excerpt,
    },
    /// The host has no random numbers.
    #[error("the host gives no random numbers, which a machine that started from a template needs")]
    Random(#[source] io::Error),
    /// The agent refused the sandbox.
    #[error("the agent refused to set up the sandbox{console}")]
    Refused {
        /// Its answer.
        #[source]
        source: AgentError,
        /// The guest's last words.
        console: Excerpt,
    },
}

/// The last lines of something, as the end of a sentence; nothing where there are none.
#[derive(Debug)]
pub struct Excerpt {
    of: &'static str,
    text: String,
}

impl Excerpt {
    pub(crate) fn console(text: &str) -> Self {
        Self { of: "the guest's console", text: last_lines(text) }
    }

    pub(crate) fn output(text: &str) -> Self {
        Self { of: "its output", text: last_lines(text) }
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.text.is_empty() {
            return Ok(());
        }
        write!(f, "; {} ends with:", self.of)?;
        self.text.lines().try_for_each(|line| write!(f, "\n  | {line}"))
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines.get(lines.len().saturating_sub(CONSOLE_LINES)..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpt_is_the_last_lines() {
        let text: String = (0..30).map(|n| format!("line {n}\r\n\r\n")).collect();
        let shown = Excerpt::console(&text).to_string();
        assert!(shown.starts_with("; the guest's console ends with:\n  | line 10\n"), "{shown}");
        assert!(shown.ends_with("\n  | line 29"), "{shown}");
        assert_eq!(Excerpt::output(" \n").to_string(), "");
    }
}
