//! The hierarchies of a host, of version 1 or 2, and their files.

use std::fs;
use std::path::{Path, PathBuf};

use super::{CgroupError, write};

/// Controllers that a pod is put under.
const CONTROLLERS: [&str; 7] = ["cpu", "cpuacct", "cpuset", "memory", "pids", "blkio", "hugetlb"];
/// Those of version 2.
const CONTROLLERS_V2: [&str; 6] = ["cpu", "cpuset", "memory", "pids", "io", "hugetlb"];
/// What version 1 calls no limit is the largest multiple of a page: anything near it is none.
const NO_LIMIT: u64 = 1 << 62;

/// The hierarchies that are used.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Trees {
    pub(super) all: Vec<Tree>,
}

/// One hierarchy.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tree {
    /// Where it is mounted.
    pub(super) root: PathBuf,
    /// Its controllers; of version 2 there is one tree for all.
    controllers: Vec<String>,
    v2: bool,
}

impl Trees {
    /// Those of this host; `None` where there are none.
    pub(super) fn of_host() -> Result<Option<Self>, CgroupError> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo")
            .map_err(CgroupError::file("read", "/proc/self/mountinfo"))?;
        Ok(Self::of(&mountinfo))
    }

    /// Version 1 wins where it has controllers: what is left for version 2 then has none worth having.
    fn of(mountinfo: &str) -> Option<Self> {
        let mut all: Vec<Tree> = Vec::new();
        let mut unified = None;
        for line in mountinfo.lines() {
            let Some((place, device)) = line.split_once(" - ") else { continue };
            let Some(root) = place.split(' ').nth(4).map(PathBuf::from) else { continue };
            let mut fields = device.split(' ');
            match fields.next() {
                Some("cgroup2") => drop(unified.get_or_insert(root)),
                Some("cgroup") => {
                    let options = fields.next_back().unwrap_or_default().split(',');
                    let known = options.filter(|option| CONTROLLERS.contains(option));
                    let controllers: Vec<String> = known.map(str::to_owned).collect();
                    // Some hosts mount one hierarchy twice.
                    let again = all.iter().any(|tree| tree.controllers == controllers);
                    if !controllers.is_empty() && !again {
                        all.push(Tree { root, controllers, v2: false });
                    }
                }
                _ => {}
            }
        }
        if let (true, Some(root)) = (all.is_empty(), unified) {
            let controllers = CONTROLLERS_V2.map(str::to_owned).into();
            all.push(Tree { root, controllers, v2: true });
        }
        (!all.is_empty()).then_some(Self { all })
    }

    /// The hierarchy that has a controller.
    pub(super) fn of_controller(&self, controller: &str) -> Option<&Tree> {
        self.all.iter().find(|tree| tree.controllers.iter().any(|it| it == controller))
    }
}

impl Tree {
    /// Where this process is, below the root.
    pub(super) fn of_this_process(&self) -> Result<PathBuf, CgroupError> {
        let text = fs::read_to_string("/proc/self/cgroup")
            .map_err(CgroupError::file("read", "/proc/self/cgroup"))?;
        Ok(self.place_in(&text))
    }

    /// The place in the lines of `/proc/<pid>/cgroup`: `<number>:<controllers>:<path>`, cgroups(7).
    fn place_in(&self, text: &str) -> PathBuf {
        let found = text.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let mut listed = controllers.split(',');
            let ours = if self.v2 {
                controllers.is_empty()
            } else {
                listed.any(|it| self.controllers.iter().any(|own| own == it))
            };
            ours.then(|| path.trim_start_matches('/').to_owned())
        });
        PathBuf::from(found.unwrap_or_default())
    }

    /// Whether threads of one process can be in different cgroups here. Under version 2 they cannot, where memory is counted.
    pub(super) fn takes_threads(&self) -> bool {
        // Memory is counted by process: a thread's place says nothing there.
        self.v2 || !self.controllers.iter().any(|it| it == "memory" || it == "hugetlb")
    }

    /// The file that takes threads, or under version 2 any thread's process.
    pub(super) fn threads_file(&self) -> &'static str {
        if self.v2 { "cgroup.procs" } else { "tasks" }
    }

    /// Has `cgroup` give its controllers to those in it. What it does not have itself it cannot give, which is no fault.
    pub(super) fn delegate(&self, cgroup: &Path) {
        for controller in self.controllers.iter().filter(|_| self.v2) {
            if let Err(error) = write(&cgroup.join("cgroup.subtree_control"), &format!("+{controller}")) {
                tracing::debug!(%error, controller, "not delegated");
            }
        }
    }

    /// A new cgroup of version 1 has no CPUs and no memory nodes, and takes no process then.
    pub(super) fn inherit(&self, above: &Path, cgroup: &Path) -> Result<(), CgroupError> {
        if self.v2 || !self.controllers.iter().any(|it| it == "cpuset") {
            return Ok(());
        }
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if read(&cgroup.join(file))?.trim().is_empty() {
                write(&cgroup.join(file), read(&above.join(file))?.trim())?;
            }
        }
        Ok(())
    }

    /// What is written to `cpuset.cpus` of a cgroup so that it has the CPUs of the one above: its list, or under version 2
    /// an empty line.
    pub(super) fn inherited_cpus(&self, above: &Path) -> Result<String, CgroupError> {
        match self.v2 {
            true => Ok("\n".to_owned()),
            false => Ok(read(&above.join("cpuset.cpus"))?.trim().to_owned()),
        }
    }

    /// The cgroup's own limit of memory, in bytes.
    pub(super) fn memory_limit(&self, cgroup: &Path) -> Option<u64> {
        let file = if self.v2 { "memory.max" } else { "memory.limit_in_bytes" };
        let limit = fs::read_to_string(cgroup.join(file)).ok()?.trim().parse().ok()?;
        (limit < NO_LIMIT).then_some(limit)
    }

    /// Whether the cgroup has a limit of CPU time.
    pub(super) fn has_cpu_limit(&self, cgroup: &Path) -> bool {
        let file = if self.v2 { "cpu.max" } else { "cpu.cfs_quota_us" };
        let text = fs::read_to_string(cgroup.join(file)).unwrap_or_default();
        text.split_whitespace().next().is_some_and(|quota| quota.parse::<u64>().is_ok())
    }

    /// How many processes of the cgroup the kernel has killed for want of memory, here or above.
    pub(super) fn oom_kills(&self, cgroup: &Path) -> u64 {
        let file = if self.v2 { "memory.events" } else { "memory.oom_control" };
        let text = fs::read_to_string(cgroup.join(file)).unwrap_or_default();
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
        kills.unwrap_or_default()
    }
}

fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(CgroupError::file("read", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
25 24 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
26 25 0:23 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct
27 25 0:24 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
28 25 0:25 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
29 25 0:26 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
30 25 0:27 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
31 25 0:24 / /mnt/memory rw,relatime - cgroup cgroup rw,memory
";
    const V2: &str = "25 24 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn controllers_of_version_one_are_found_where_they_are_mounted() {
        let trees = Trees::of(V1).unwrap();
        let roots: Vec<&Path> = trees.all.iter().map(|tree| tree.root.as_path()).collect();
        assert_eq!(roots, [Path::new("/sys/fs/cgroup/cpu,cpuacct"), Path::new("/sys/fs/cgroup/memory")]);
        let cpu = trees.of_controller("cpu").unwrap();
        assert!(!cpu.v2 && cpu.takes_threads() && !trees.of_controller("memory").unwrap().takes_threads());
        let lines = "8:pids:/\n4:memory:/a/b\n1:cpu,cpuacct:/c\n0::/d\n";
        assert_eq!(cpu.place_in(lines), Path::new("c"));
        assert_eq!(trees.of_controller("memory").unwrap().place_in(lines), Path::new("a/b"));
    }

    #[test]
    fn version_two_is_one_tree_for_all() {
        let trees = Trees::of(V2).unwrap();
        assert_eq!(trees.all.len(), 1);
        assert_eq!(trees.of_controller("cpuset"), trees.of_controller("memory"));
        assert_eq!(trees.all[0].place_in("0::/init.scope\n"), Path::new("init.scope"));
        assert_eq!(Trees::of("1 2 0:1 / / rw - ext4 /dev/vda rw\nnonsense\n"), None);
    }

    #[test]
    fn limits_and_kills_are_read_in_both_versions() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        file("memory.limit_in_bytes", "9223372036854771712\n");
        file("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n");
        file("cpu.cfs_quota_us", "-1\n");
        let tree = |v2| Tree { root: dir.path().to_owned(), controllers: Vec::new(), v2 };
        let v1 = tree(false);
        assert_eq!((v1.memory_limit(dir.path()), v1.oom_kills(dir.path())), (None, 2));
        assert!(!v1.has_cpu_limit(dir.path()));
        file("memory.max", "67108864\n");
        file("memory.events", "low 0\noom 3\noom_kill 1\noom_group_kill 9\n");
        file("cpu.max", "150000 100000\n");
        let v2 = tree(true);
        assert_eq!((v2.memory_limit(dir.path()), v2.oom_kills(dir.path())), (Some(64 << 20), 1));
        assert!(v2.has_cpu_limit(dir.path()));
        file("cpuset.cpus", "0-3\n");
        let inherited = [v1, v2].map(|tree| tree.inherited_cpus(dir.path()).unwrap());
        assert_eq!(inherited, ["0-3", "\n"]);
    }
}
