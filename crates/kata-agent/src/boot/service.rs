//! What is different where an init system runs the agent: the part of the cgroup tree that it was given, the boot that others
//! did before it, and the word that it is ready.
//!
//! ```text
//!   /sys/fs/cgroup/…/kata-agent.service    delegated: controllers are handed down from here, so no process is in it
//!     agent                                the agent and its helpers
//!     <cgroupsPath of a container> …
//! ```

use std::env;
use std::fs;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};

use kata_api::BootStage;
use rustix::fs::getxattr;

use super::timeline::now_us;

/// Where cgroups are.
pub const CGROUPS: &str = "/sys/fs/cgroup";
/// The agent's own cgroup below the one that it was given.
const OWN: &str = "agent";
/// How systemd marks what it gave away (`Delegate=`), the latter since version 251.
const DELEGATED: [&str; 2] = ["trusted.delegate", "user.delegate"];
/// Where the program that boots a services image leaves its steps.
const STEPS: &str = "/run/kata-guest-init/timeline.json";
/// Longest list of steps that is read, in bytes.
const STEPS_MAX: u64 = 64 * 1024;
/// Where to say that the service is ready: a path, or `@` and an abstract name.
const NOTIFY: &str = "NOTIFY_SOCKET";

/// The cgroup that the agent may fill, relative to the root of the hierarchy; moves the agent out of the way into one below it.
/// Nothing where no part of the tree was given to it: then it takes the root, as where it is alone.
pub(super) fn take_delegated_cgroup() -> io::Result<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let is_delegated = |path: &Path| {
        let mut value = [0; 8];
        let path = Path::new(CGROUPS).join(path);
        DELEGATED.iter().any(|name| getxattr(&path, *name, &mut value).is_ok_and(|_| value.starts_with(b"1")))
    };
    let Some(given) = delegated(&own, is_delegated) else { return Ok(PathBuf::new()) };
    let place = Path::new(CGROUPS).join(&given).join(OWN);
    match fs::create_dir(&place) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => fs::write(place.join("cgroup.procs"), "0")?,
    }
    Ok(given)
}

/// Of the text of `/proc/self/cgroup`: the cgroup of that process or, where it is in its own already, the one above, if
/// that is one of those given away.
fn delegated(text: &str, is_delegated: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let path = Path::new(text.lines().find_map(|line| line.strip_prefix("0::/"))?);
    let above = path.parent().filter(|_| path.ends_with(OWN));
    [Some(path), above]
        .into_iter()
        .flatten()
        .find(|path| !path.as_os_str().is_empty() && is_delegated(path))
        .map(Path::to_owned)
}

/// The boot until now: the kernel's part, the steps that are written down, and what the init system took from then on.
pub(super) fn stages() -> Vec<BootStage> {
    let read = || -> io::Result<Vec<BootStage>> {
        let file = io::Read::take(fs::File::open(STEPS)?, STEPS_MAX);
        Ok(serde_json::from_reader(file)?)
    };
    let steps = match read() {
        Ok(steps) => steps,
        Err(error) => {
            tracing::debug!(%error, file = STEPS, "nobody wrote down the steps of the boot");
            Vec::new()
        }
    };
    with_ends(steps, now_us())
}

fn with_ends(steps: Vec<BootStage>, now: u64) -> Vec<BootStage> {
    let stage = |layer: &str, start: u64, end: u64| BootStage {
        layer: layer.into(),
        name: "boot".into(),
        start_us: start,
        duration_us: end.saturating_sub(start),
    };
    let begin = steps.first().map_or(now, |step| step.start_us);
    let end = steps.last().map(|step| step.start_us.saturating_add(step.duration_us));
    let init = end.map(|end| stage("init", end, now));
    [stage("kernel", 0, begin)].into_iter().chain(steps).chain(init).collect()
}

/// Tells the init system that the agent serves, where it wants to know.
pub fn notify_ready() {
    let Some(address) = env::var_os(NOTIFY) else { return };
    let told = || -> io::Result<()> {
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&address)?,
        };
        UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address)?;
        Ok(())
    };
    if let Err(error) = told() {
        tracing::warn!(%error, socket = ?address, "the init system was not told that the agent is ready");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIVEN: &str = "guest.slice/kata-agent.service";

    fn given(text: &str) -> Option<PathBuf> {
        delegated(text, |path| path == Path::new(GIVEN))
    }

    #[test]
    fn containers_go_below_the_cgroup_that_was_given_away() {
        assert_eq!(given(&format!("0::/{GIVEN}\n")), Some(GIVEN.into()));
        // Also for an agent that starts in its own, and where version 1 is beside version 2.
        assert_eq!(given(&format!("12:pids:/x\n0::/{GIVEN}/agent\n")), Some(GIVEN.into()));
    }

    #[test]
    fn cgroup_that_was_not_given_away_is_left_alone() {
        for text in
            ["0::/guest.slice/other.service\n", "0::/\n", "", "0::/guest.slice/kata-agent.service/else\n"]
        {
            assert_eq!(given(text), None, "{text}");
        }
        // The root is nobody's to give.
        assert_eq!(delegated("0::/\n", |_| true), None);
    }

    fn step(start_us: u64, duration_us: u64) -> BootStage {
        BootStage { layer: "guest-init".into(), name: "x".into(), start_us, duration_us }
    }

    #[test]
    fn boot_of_others_is_told_between_the_kernels_and_the_init_systems() {
        let stages = with_ends(vec![step(100, 10), step(120, 30)], 1000);
        let told: Vec<_> = stages.iter().map(|it| (it.layer.as_str(), it.start_us, it.duration_us)).collect();
        let wanted =
            [("kernel", 0, 100), ("guest-init", 100, 10), ("guest-init", 120, 30), ("init", 150, 850)];
        assert_eq!(told, wanted);
    }

    #[test]
    fn boot_without_written_steps_is_the_kernels() {
        let stages = with_ends(Vec::new(), 1000);
        assert_eq!((stages.len(), stages[0].duration_us), (1, 1000));
        // Steps are anybody's text: they overflow nothing.
        assert_eq!(with_ends(vec![step(u64::MAX, u64::MAX)], 5).len(), 3);
    }
}
