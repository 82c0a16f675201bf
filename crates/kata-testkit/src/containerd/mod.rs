//! A real containerd in a test's private world, and `ctr` to speak with it.
//!
//! ```text
//!  test ── ctr ──▶ containerd ── start, delete ──▶ containerd-shim-kata-v2 ──▶ pod
//!     │               │ own root, state, socket         │ KATA_RUN_DIR, KATA_STATE_DIR, KATA_CONF_FILE
//!     └── Events ◀────┘                                 │ come through containerd's environment
//!                          everything in /run/kt-XXXX ◀─┘ of the test's Host
//! ```
//!
//! `KATA_TEST_RUNTIME=io.containerd.runc.v2` runs the same tests against runc: what fails then is wrong in the test.

mod docker;
mod events;
mod version;

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::host::{Host, left_of, patience, stderr, stdout, wait_for};
use crate::leaks;
pub use docker::Docker;
pub use events::{Event, Events};
pub use version::Version;

/// The runtime under test.
const RUNTIME: &str = "io.containerd.kata.v2";
/// Name of the only image.
pub const IMAGE: &str = "docker.io/library/busybox:latest";
/// Where containerd keeps what it hands to shims, below its state directory.
const BUNDLES: &str = "io.containerd.runtime.v2.task";
/// A client that is not back by then, with [`patience`], never will be.
const CLIENT_PATIENCE: Duration = Duration::from_secs(60);

/// A containerd and its world. When it is dropped, no task may be left in it, and nothing of any pod on the host.
pub struct Containerd {
    version: Version,
    program: PathBuf,
    runtime: String,
    /// Words before containerd's own: what it runs in.
    within: Vec<String>,
    /// What configures its CRI, if it has one.
    cri: Option<String>,
    daemon: Option<Child>,
    host: Host,
}

impl Containerd {
    /// Starts a containerd that has the image; `None` (said and counted) where something of it is missing.
    pub fn new(version: Version) -> Option<Self> {
        Self::configured(version, "", &[])
    }

    /// The same with `config` at the end of its configuration, run by the program `within` (e.g. `unshare`).
    pub fn configured(version: Version, config: &str, within: &[&str]) -> Option<Self> {
        Self::set_up(version, |_| None, config, within)
    }

    /// The same that gives roots as files of ext4, too, by its snapshotter `blockfile`.
    pub fn with_blockfiles(version: Version) -> Option<Self> {
        let mut rig = Self::new(version)?;
        let scratch = rig.host().scratch("scratch.ext4");
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&scratch).arg("64M").status();
        assert!(made.unwrap().success());
        rig.configure(&format!(
            "[plugins.'io.containerd.snapshotter.v1.blockfile']\nscratch_file = {scratch:?}\nfs_type = \"ext4\"\n"
        ));
        rig.stop();
        rig.start();
        Some(rig)
    }

    /// The same with the CRI, which the text that `cri` makes for this world configures.
    pub(crate) fn with_cri(
        version: Version,
        cri: impl FnOnce(&Self) -> String,
        within: &[&str],
    ) -> Option<Self> {
        Self::set_up(version, |rig| Some(cri(rig)), "", within)
    }

    fn set_up(
        version: Version,
        cri: impl FnOnce(&Self) -> Option<String>,
        config: &str,
        within: &[&str],
    ) -> Option<Self> {
        let host = Host::new()?;
        let Some(program) = std::env::var_os(version.variable()) else {
            crate::skip(&format!("{} is not set: run `make test`", version.variable()));
            return None;
        };
        let mut rig = Self {
            version,
            program: program.into(),
            runtime: std::env::var("KATA_TEST_RUNTIME").unwrap_or_else(|_| RUNTIME.to_owned()),
            within: within.iter().map(|word| (*word).to_owned()).collect(),
            cri: None,
            daemon: None,
            host,
        };
        for dir in [rig.root(), rig.state()] {
            std::fs::create_dir_all(dir).unwrap();
        }
        rig.cri = cri(&rig);
        rig.configure(config);
        rig.start();
        rig.import();
        Some(rig)
    }

    /// Replaces the daemon's configuration: takes effect when it is started again.
    pub fn configure(&self, text: &str) {
        let base = self.version.config(&self.root(), &self.state(), &self.socket(), self.cri.is_some());
        let cri = self.cri.as_deref().unwrap_or_default();
        std::fs::write(self.config(), base + cri + text).unwrap();
    }

    /// The world around it.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Which containerd this is.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Name of the runtime that containers are started with.
    pub fn runtime(&self) -> &str {
        &self.runtime
    }

    /// Whether containers run in machines, or (said and counted) a test of machines has nothing to test.
    pub fn has_machines(&self) -> bool {
        let machines = self.runtime == RUNTIME;
        if !machines {
            crate::skip(&format!("{} has no machines", self.runtime));
        }
        machines
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("containerd runs").id()
    }

    /// A program in the daemon's network namespace.
    pub fn beside(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.pid())).args(["--net", "--"]).arg(program);
        command
    }

    /// Does something on a thread in the daemon's network namespace: on the host as containers see it.
    pub fn on_its_host<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let network = File::open(format!("/proc/{}/ns/net", self.pid())).unwrap();
        std::thread::scope(|scope| {
            let entered = scope.spawn(|| {
                move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                act()
            });
            entered.join().unwrap()
        })
    }

    /// Where clients connect.
    pub fn socket(&self) -> PathBuf {
        self.state().join("c.sock")
    }

    /// What containerd hands to the shim of a container.
    pub fn bundle(&self, container: &str) -> PathBuf {
        self.state().join(BUNDLES).join("default").join(container)
    }

    fn root(&self) -> PathBuf {
        self.host.scratch("root")
    }

    fn state(&self) -> PathBuf {
        self.host.scratch("state")
    }

    fn config(&self) -> PathBuf {
        self.host.scratch("containerd.toml")
    }

    fn log_file(&self) -> PathBuf {
        self.host.scratch("containerd.log")
    }

    /// What the daemon and, through it, the owners of pods have logged.
    pub fn log(&self) -> String {
        read(&self.log_file())
    }

    /// What of any pod is there: everything of this world but the daemon and its clients.
    pub fn remains(&self) -> Vec<String> {
        let own = |line: &String| {
            let process = [" containerd", " ctr"].iter().any(|name| line.ends_with(name));
            process || (line.starts_with("socket ") && line.contains("c.sock"))
        };
        self.host.remains().into_iter().filter(|line| !own(line)).collect()
    }

    /// The same, after leaving it some time to go.
    pub fn leftovers(&self) -> Vec<String> {
        left_of(|| self.remains())
    }

    /// Starts the daemon; answers when it can be spoken to.
    pub fn start(&mut self) {
        let log = File::options().create(true).append(true).open(self.log_file()).unwrap();
        let mut words = self.within.iter().map(OsStr::new).chain([self.program.as_os_str()]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).arg("--config").arg(self.config());
        self.host.enter(&mut command);
        command.env("PATH", self.path()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut daemon = command.spawn().unwrap();
        let socket = self.socket();
        let answers = || {
            if let Some(status) = daemon.try_wait().unwrap() {
                panic!("containerd ended: {status}\n{}", self.log());
            }
            UnixStream::connect(&socket).is_ok().then_some(())
        };
        wait_for("containerd's socket", Duration::from_secs(20), answers);
        self.daemon = Some(daemon);
    }

    /// Shims are found by name: ours among the programs under test, runc's beside its containerd.
    fn path(&self) -> std::ffi::OsString {
        let system = std::env::var_os("PATH").unwrap_or_default();
        let own = [self.host.program(""), self.program.parent().unwrap().to_owned()];
        std::env::join_paths(own.into_iter().chain(std::env::split_paths(&system))).unwrap()
    }

    fn import(&self) {
        let archive = self.host.scratch("image.tar");
        let tar =
            Command::new("tar").arg("-C").arg(self.host.layout()).arg("-cf").arg(&archive).arg(".").status();
        assert!(tar.unwrap().success());
        let archive = archive.to_str().unwrap();
        self.ok(["images", "import", "--base-name", IMAGE.trim_end_matches(":latest"), archive]);
    }

    /// Ends the daemon without asking it.
    pub fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("containerd runs");
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// Ends the daemon the orderly way. Its pods go on.
    pub fn stop(&mut self) {
        let mut daemon = self.daemon.take().expect("containerd runs");
        send(daemon.id(), Signal::TERM);
        wait_for("containerd to stop", Duration::from_secs(20), || daemon.try_wait().unwrap());
    }

    /// `ctr` for this containerd.
    pub fn ctr<I: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = I>) -> Command {
        let mut command = Command::new(self.client());
        command.arg("--address").arg(self.socket()).args(args).stdin(Stdio::null());
        command
    }

    /// The client that came with the daemon.
    pub fn client(&self) -> PathBuf {
        self.program.with_file_name("ctr")
    }

    /// Runs `ctr` to its end, which comes within minutes.
    pub fn output<I: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = I>) -> Output {
        let mut command = client_within_patience();
        command.arg(self.client()).arg("--address").arg(self.socket()).args(args);
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// Runs a `ctr` that must succeed; answers what it printed.
    #[track_caller]
    pub fn ok<I: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = I>) -> String {
        let output = self.output(args);
        assert!(output.status.success(), "{}: {}{}", output.status, stdout(&output), stderr(&output));
        stdout(&output)
    }

    /// Words of `ctr` that run what `what` says (options, an image, an id, a command) with the runtime under test.
    pub fn run(&self, what: &[&str]) -> Vec<String> {
        let fifos = self.fifos();
        let head = ["run", "--runtime", self.runtime(), "--fifo-dir", fifos.to_str().unwrap()];
        head.iter().chain(what).map(|word| (*word).to_owned()).collect()
    }

    /// `ctr run --rm` of a shell script in a container of the image with options, to its end.
    pub fn sh(&self, options: &[&str], id: &str, script: &str) -> Output {
        self.output(self.run(&[&["--rm"], options, &[IMAGE, id, "sh", "-c", script]].concat()))
    }

    /// `ctr run -d` of a shell script in a container of the image with options.
    #[track_caller]
    pub fn detached(&self, options: &[&str], id: &str, script: &str) {
        self.ok(self.run(&[&["-d"], options, &[IMAGE, id, "sh", "-c", script]].concat()));
    }

    /// Words of `ctr` that run a shell script in a container that is there.
    pub fn in_container(&self, options: &[&str], id: &str, exec: &str, script: &str) -> Vec<String> {
        let fifos = self.fifos();
        let head = ["task", "exec", "--fifo-dir", fifos.to_str().unwrap(), "--exec-id", exec];
        let words = [&head, options, &[id, "sh", "-c", script]].concat();
        words.into_iter().map(str::to_owned).collect()
    }

    /// `ctr task exec` of a shell script, to its end.
    pub fn exec(&self, id: &str, exec: &str, script: &str) -> Output {
        self.output(self.in_container(&[], id, exec, script))
    }

    /// Where clients keep the standard streams.
    pub fn fifos(&self) -> PathBuf {
        self.host.scratch("fifos")
    }

    /// What `ctr task ls` says of a task, e.g. `RUNNING`; `None` if it does not list it.
    pub fn status(&self, id: &str) -> Option<String> {
        let listed = self.ok(["task", "ls"]);
        let mut rows = listed.lines().map(|line| line.split_whitespace());
        rows.find_map(|mut row| (row.next() == Some(id)).then(|| row.last().unwrap_or_default().to_owned()))
    }

    /// Ends a task and removes it and its container.
    #[track_caller]
    pub fn remove(&self, id: &str) {
        self.ok(["task", "rm", "--force", id]);
        self.ok(["container", "rm", id]);
    }

    /// Removes a task that has ended, which must have done so with this code other than zero, and its container.
    #[track_caller]
    pub fn reap(&self, id: &str, code: u32) {
        let output = self.output(["task", "rm", id]);
        // The client tells no other way.
        let told = format!("exit with non-zero exit code {code}\"");
        assert!(stderr(&output).contains(&told), "{}", stderr(&output));
        self.ok(["container", "rm", id]);
    }

    /// A root file system unpacked from the image, outside of containerd's stores.
    pub fn unpacked_root(&self) -> PathBuf {
        let root = self.host.scratch("rootfs");
        std::fs::create_dir_all(&root).unwrap();
        let blobs = std::fs::read_dir(self.host.layout().join("blobs/sha256")).unwrap();
        let layer =
            blobs.map(|entry| entry.unwrap().path()).max_by_key(|path| path.metadata().unwrap().len());
        let tar = Command::new("tar").arg("-C").arg(&root).arg("-xzf").arg(layer.unwrap()).status();
        assert!(tar.unwrap().success());
        root
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let told =
                log.lines().filter(|line| !line.contains("loading plugin") && !line.contains("content"));
            eprintln!("--- containerd ---\n{}", told.collect::<Vec<_>>().join("\n"));
            if let Some(mut daemon) = self.daemon.take() {
                let _ = daemon.kill();
                let _ = daemon.wait();
            }
            return;
        }
        if self.daemon.is_none() {
            return;
        }
        let tasks = self.ok(["task", "ls", "-q"]);
        self.stop();
        assert_eq!(tasks, "", "the test left these tasks");
        // A snapshotter keeps its layers mounted: containerd's business, not a pod's.
        leaks::unmount(&self.root());
        let namespaces = std::fs::read_dir(self.state().join(BUNDLES)).into_iter().flatten().flatten();
        let bundles = namespaces.flat_map(|space| std::fs::read_dir(space.path()).unwrap());
        let left: Vec<PathBuf> = bundles.map(|bundle| bundle.unwrap().path()).collect();
        assert!(left.is_empty(), "bundles are left: {left:?}");
    }
}

/// Sends a signal to a process, which must exist.
#[track_caller]
pub fn send(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// A command that lacks the client's own words, and ends it when it never will be back.
fn client_within_patience() -> Command {
    let mut command = Command::new("timeout");
    command.args(["--foreground", "--signal", "KILL", &patience(CLIENT_PATIENCE).as_secs().to_string()]);
    command
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Makes of each named `fn(&mut Containerd)` a test for each version: `v1::name` and `v2::name`.
#[macro_export]
macro_rules! with_each_containerd {
    ($($test:ident),* $(,)?) => {
        mod v1 {
            $(#[test] fn $test() { $crate::containerd::with($crate::containerd::Version::V1, super::$test) })*
        }
        mod v2 {
            $(#[test] fn $test() { $crate::containerd::with($crate::containerd::Version::V2, super::$test) })*
        }
    };
}

/// Runs a test with a containerd of this version, where there is one.
pub fn with(version: Version, test: fn(&mut Containerd)) {
    if let Some(mut rig) = Containerd::new(version) {
        test(&mut rig);
    }
}
