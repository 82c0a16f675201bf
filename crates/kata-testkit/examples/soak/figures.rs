//! What may not grow, and what may not be left.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use kata_testkit::cri::Cri;

/// How long the last of what went may take to be gone.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a process holds.
#[derive(Clone, Copy)]
struct Held {
    fds: usize,
    /// Resident memory in KiB.
    rss: u64,
}

impl Held {
    fn by(pid: u32) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let rss = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        Self { fds, rss: rss.unwrap_or_default() }
    }
}

/// What the long-lived processes hold, and what of the pods' network is on the host, when no round runs.
pub struct Figures {
    containerd: Held,
    owner: Held,
    /// Interfaces on the pods' host.
    links: usize,
    /// Network namespaces of pods.
    namespaces: usize,
}

impl Figures {
    /// Those of now; `pod` is the one that stays.
    pub fn now(cri: &Cri, pod: &str) -> Self {
        let links = cri.containerd().beside("ip").args(["-o", "link"]).output().unwrap().stdout;
        Self {
            containerd: Held::by(cri.containerd().pid()),
            owner: Held::by(super::round::owner(cri, pod).unwrap_or_default()),
            links: links.iter().filter(|byte| **byte == b'\n').count(),
            namespaces: namespaces(cri).len(),
        }
    }

    /// What of these figures is more than `before` allows. A collector of garbage takes its time: containerd's memory may
    /// vary more than the owner's.
    pub fn growth_since(&self, before: &Self) -> Vec<String> {
        let rows = [
            ("containerd's descriptors", before.containerd.fds as u64, self.containerd.fds as u64, 1.0, 8),
            ("the owner's descriptors", before.owner.fds as u64, self.owner.fds as u64, 1.0, 3),
            ("containerd's KiB of memory", before.containerd.rss, self.containerd.rss, 1.5, 32 << 10),
            ("the owner's KiB of memory", before.owner.rss, self.owner.rss, 1.1, 2 << 10),
            ("interfaces on the host", before.links as u64, self.links as u64, 1.0, 0),
            ("network namespaces", before.namespaces as u64, self.namespaces as u64, 1.0, 0),
        ];
        let grown = |(what, before, now, factor, more): (&str, u64, u64, f64, u64)| {
            let bound = before as f64 * factor + more as f64;
            (now as f64 > bound).then(|| format!("{what} grew from {before} to {now}"))
        };
        rows.into_iter().filter_map(grown).collect()
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = |held: Held| format!("{} descriptors, {} KiB", held.fds, held.rss);
        let (containerd, owner) = (held(self.containerd), held(self.owner));
        let (links, namespaces) = (self.links, self.namespaces);
        write!(
            f,
            "containerd: {containerd}; owner: {owner}; {links} interfaces, {namespaces} network namespaces"
        )
    }
}

/// Mounts of network namespaces below this world.
fn namespaces(cri: &Cri) -> Vec<String> {
    let world = cri.host().scratch("state");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let places =
        mounts.lines().filter(|line| line.contains(" - nsfs ")).filter_map(|line| line.split(' ').nth(4));
    places.filter(|place| Path::new(place).starts_with(&world)).map(str::to_owned).collect()
}

/// What of any pod is left: processes, mounts, sockets, files, network namespaces, cgroups.
pub fn left(cri: &Cri) -> Vec<String> {
    let begin = Instant::now();
    loop {
        let mut left = cri.containerd().remains();
        left.extend(cri.pods().into_iter().map(|pod| format!("pod {pod}")));
        left.extend(cri.containers().into_iter().map(|container| format!("container {container}")));
        left.extend(namespaces(cri).into_iter().map(|place| format!("network namespace {place}")));
        left.extend(cri.cgroups().into_iter().map(|place| format!("cgroup {}", place.display())));
        if left.is_empty() || begin.elapsed() > PATIENCE {
            return left;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
