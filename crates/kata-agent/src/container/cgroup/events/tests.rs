use std::fs;
use std::process::{Child, Command};

use super::*;

/// A cgroup of this test with one process in it, gone with the value.
struct Inhabited {
    path: PathBuf,
    process: Child,
}

impl Inhabited {
    /// Nothing, and the reason on standard error, where there is no cgroup v2 hierarchy to write to.
    fn new(name: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let root = mounts.lines().find_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let point = words.next()?;
            (words.next()? == "cgroup2").then(|| point.to_owned())
        });
        let path = root.map(|root| Path::new(&root).join(format!("{name}-{}", std::process::id())));
        let Some(path) = path.filter(|path| fs::create_dir(path).is_ok()) else {
            eprintln!("skipped: needs a cgroup v2 hierarchy and root");
            return None;
        };
        let process = Command::new("sleep").arg("60").spawn().unwrap();
        fs::write(path.join("cgroup.procs"), process.id().to_string()).unwrap();
        Some(Self { path, process })
    }

    fn end(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Inhabited {
    fn drop(&mut self) {
        let _ = (self.process.kill(), self.process.wait());
        let _ = fs::remove_dir(&self.path);
    }
}

#[tokio::test]
async fn kills_are_no_longer_waited_for_when_the_last_process_has_ended() {
    let Some(mut cgroup) = Inhabited::new("kata-events") else { return };
    // The kernel of a test may lack memory.events; any file of the kind without kills stands for it.
    let open = || EventFile::open(cgroup.path.join("cgroup.events")).unwrap();
    let mut events = OomEvents { events: open(), population: open(), kills: 0 };
    let waiting = tokio::time::timeout(Duration::from_millis(50), events.next()).await;
    assert!(waiting.is_err(), "it waits while there is a process");
    let waiter = tokio::spawn(async move { events.next().await });
    tokio::task::yield_now().await;
    cgroup.end();
    let told = tokio::time::timeout(Duration::from_secs(10), waiter).await;
    assert_eq!(told.expect("it waits for ever").unwrap(), None);
}

#[tokio::test]
async fn a_cgroup_that_does_not_become_empty_is_told_with_who_is_in_it() {
    let Some(cgroup) = Inhabited::new("kata-full") else { return };
    let short = Duration::from_millis(20);
    let error = wait(&cgroup.path, "populated", "0", short, "empty").await.unwrap_err().to_string();
    let process = format!("in it: {} (\"sleep\" in ", cgroup.process.id());
    assert!(error.contains("did not become empty") && error.contains(&process), "{error}");
}
