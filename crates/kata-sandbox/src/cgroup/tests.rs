use super::*;

/// A pod's cgroups on this host, below a directory that no other test has.
struct World {
    dir: tempfile::TempDir,
    record: Record,
    top: String,
}

impl World {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() || Trees::of_host().unwrap().is_none() {
            kata_testkit::skip("cgroups need root, and a hierarchy that is mounted");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let record = Record::open(dir.path().join("record")).unwrap();
        let top = format!("kata-test-{}", dir.path().file_name().unwrap().to_string_lossy().replace('.', ""));
        Some(Self { dir, record, top })
    }

    fn make(&self, only: bool) -> Cgroup {
        let path = format!("/{}/pod1/web", self.top);
        Cgroup::make(Path::new(&path), &self.top, only, &self.record).unwrap().unwrap()
    }

    /// Cgroups of this test that are there.
    fn left(&self) -> Vec<PathBuf> {
        let trees = Trees::of_host().unwrap().unwrap();
        let names = [self.top.clone(), format!("kata_overhead/{}", self.top)];
        let all = trees.all.iter().flat_map(|tree| names.iter().map(|name| tree.root.join(name)));
        all.filter(|path| path.exists()).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let released = Record::release(&self.dir.path().join("record"));
        if !std::thread::panicking() {
            released.unwrap();
            assert_eq!(self.left(), Vec::<PathBuf>::new());
        }
    }
}

/// The process that a test takes to a cgroup must be no other test's: this one is run again, alone.
fn alone(test: &str) -> bool {
    if std::env::var_os("KATA_TEST_ALONE").is_some() {
        return true;
    }
    let run = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("cgroup::tests::{test}"), "--nocapture"])
        .env("KATA_TEST_ALONE", "1")
        .status();
    assert!(run.unwrap().success());
    false
}

#[test]
fn the_owner_enters_with_what_it_starts_and_leaves_nothing_behind() {
    if !alone("the_owner_enters_with_what_it_starts_and_leaves_nothing_behind") {
        return;
    }
    let Some(world) = World::new() else { return };
    let cgroup = world.make(true);
    let before = fs::read_to_string("/proc/self/cgroup").unwrap();
    cgroup.enter().unwrap();
    let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
    let inside = fs::read_to_string(format!("/proc/{}/cgroup", child.id())).unwrap();
    assert!(inside.contains(&format!("/{}/pod1/web", world.top)), "{inside}");
    cgroup.set_cpus("0").unwrap();
    let cpus = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    assert!(cpus.lines().any(|line| line == "Cpus_allowed_list:\t0"), "{cpus}");
    cgroup.leave();
    cgroup.leave();
    assert_eq!(fs::read_to_string("/proc/self/cgroup").unwrap(), before);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_cgroup_that_others_are_in_is_left_to_them() {
    let Some(world) = World::new() else { return };
    let cgroup = world.make(true);
    let other = Record::open(world.dir.path().join("other")).unwrap();
    let second = Cgroup::make(Path::new(&format!("/{}/pod1/side", world.top)), "side", true, &other).unwrap();
    drop((cgroup, second));
    Record::release(world.record.path()).unwrap();
    assert!(!world.left().is_empty(), "the second pod has lost its cgroup");
    // It made none of those above itself, and leaves them too: the test takes them away.
    Record::release(other.path()).unwrap();
    for tree in Trees::of_host().unwrap().unwrap().all {
        fs::remove_dir(tree.root.join(&world.top).join("pod1")).unwrap();
        fs::remove_dir(tree.root.join(&world.top)).unwrap();
    }
}

#[test]
fn the_tightest_limit_above_the_pod_is_the_one_that_counts() {
    let Some(world) = World::new() else { return };
    let cgroup = world.make(true);
    let tree = cgroup.trees.of_controller("memory").unwrap();
    let (file, pod) = (
        if tree.takes_threads() { "memory.max" } else { "memory.limit_in_bytes" },
        tree.root.join(&world.top).join("pod1"),
    );
    write(&pod.join(file), &(96 << 20).to_string()).unwrap();
    assert_eq!(cgroup.memory_limit(), Some((pod, 96 << 20)));
    assert_eq!(cgroup.oom(), None);
    assert_eq!(cgroup.of_kubelet(), None);
}

#[test]
fn kubelets_cgroup_tells_whether_every_container_has_a_limit() {
    let Some(world) = World::new() else { return };
    let path = format!("/kubepods-{}/burstable/pod7/web", world.top);
    let cgroup = Cgroup::make(Path::new(&path), "web", true, &world.record).unwrap().unwrap();
    let none = OfKubelet { has_memory_limit: false, has_cpu_limit: false };
    assert_eq!(cgroup.of_kubelet(), Some(none));
    let tree = cgroup.trees.of_controller("memory").unwrap();
    let file = if tree.takes_threads() { "memory.max" } else { "memory.limit_in_bytes" };
    let pod = tree.root.join(format!("kubepods-{}/burstable/pod7", world.top));
    write(&pod.join(file), &(96 << 20).to_string()).unwrap();
    assert_eq!(cgroup.of_kubelet(), Some(OfKubelet { has_memory_limit: true, ..none }));
}

#[test]
fn without_cgroup_only_the_rest_is_in_the_overheads() {
    if !alone("without_cgroup_only_the_rest_is_in_the_overheads") {
        return;
    }
    let Some(world) = World::new() else { return };
    let cgroup = world.make(false);
    assert!(cgroup.takes_vcpus());
    cgroup.enter().unwrap();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    assert!(own.contains(&format!("/kata_overhead/{}", world.top)) && !own.contains("pod1"), "{own}");
    let (tell, told) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        tell.send(rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs()).unwrap();
        let _ = ended.recv();
    });
    let id = told.recv().unwrap();
    cgroup.place_vcpus(&[id, u32::MAX / 2]).unwrap();
    let place = fs::read_to_string(format!("/proc/self/task/{id}/cgroup")).unwrap();
    let cpu = place.lines().find(|line| line.contains("cpuset") || line.starts_with("0::/")).unwrap();
    assert!(cpu.ends_with(&format!("/{}/pod1/web", world.top)), "{place}");
    drop(end);
    thread.join().unwrap();
    cgroup.leave();
}
