//! A root of busybox, a spec for it, and processes whose output is collected.

use std::fs::{self, File};
use std::future::Future;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kata_agent::container::{Engine, EngineError, Layout, NativeEngine, PodNamespaces, ProcessIo};
use kata_agent::reaper::{ExitReceiver, Reaper};
use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};

/// A machine to run containers on: an engine, its reaper, a bundle.
pub struct World {
    pub engine: Arc<NativeEngine>,
    pub reaper: Reaper,
    pub bundle: tempfile::TempDir,
    pub cgroup_root: PathBuf,
    prefix: String,
}

/// What a process left.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// The output of a process that is to succeed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.stdout.trim_end().to_owned()
    }
}

/// Why these tests cannot run here, if they cannot.
fn obstacle() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root");
    }
    if cgroup_root().is_none() {
        return Some("no cgroup v2 hierarchy is mounted");
    }
    (!Path::new("/bin/busybox").exists()).then_some("/bin/busybox is missing")
}

fn cgroup_root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    line.split(' ').nth(1).map(PathBuf::from)
}

/// Runs `test` in a world of its own, or says why not.
pub fn with_world<F: Future<Output = ()>>(test: impl FnOnce(Arc<World>) -> F) {
    if let Some(reason) = obstacle() {
        eprintln!("skipped: {reason}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let world = Arc::new(World::new());
        let reaping = tokio::spawn(world.reaper.clone().run());
        tokio::time::timeout(Duration::from_secs(60), test(world.clone())).await.expect("the test hangs");
        world.assert_nothing_left().await;
        reaping.abort();
    });
}

impl World {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let program = std::env::var_os("KATA_AGENT_PROGRAM");
        let helper = program.map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_kata-agent")), PathBuf::from);
        let cgroup_root = cgroup_root().expect("checked before");
        let reaper = Reaper::new();
        let layout =
            Layout { cgroup_root: cgroup_root.clone(), cgroup: PathBuf::new(), helper: Some(helper) };
        let bundle = tempfile::Builder::new().prefix("kata-engine-").tempdir().unwrap();
        busybox_root(&bundle.path().join("rootfs"));
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        World {
            engine: Arc::new(NativeEngine::new(layout, reaper.clone()).unwrap()),
            reaper,
            bundle,
            cgroup_root,
            prefix: format!("t{}-{number}-", std::process::id()),
        }
    }

    pub fn root(&self) -> PathBuf {
        self.bundle.path().join("rootfs")
    }

    /// An id that no other test has.
    pub fn id(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    pub fn cgroup(&self, id: &str) -> PathBuf {
        self.cgroup_root.join("kata").join(id)
    }

    /// Creates, starts, waits and deletes.
    pub async fn run(&self, spec: &Value) -> Result<Outcome, EngineError> {
        let id = self.id("run");
        let (io, output) = pipes();
        let pid = self.engine.create(&id, &parse(spec), self.bundle.path(), io).await?.pid;
        let exit = self.reaper.register(pid);
        let started = self.engine.start(&id).await;
        let outcome = output.collect(exit).await;
        self.engine.delete(&id).await?;
        started.map(|()| outcome)
    }

    /// The output of a shell script in a container of `spec`.
    pub async fn sh(&self, spec: &Value, script: &str) -> Outcome {
        let mut spec = spec.clone();
        spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
        self.run(&spec).await.unwrap_or_else(|error| panic!("{}", kata_agent::chain(&error)))
    }

    /// A container that sleeps, for others to look at.
    pub async fn sleeper(&self, name: &str, spec: &Value) -> (String, ExitReceiver) {
        self.sleeper_in(None, name, spec).await
    }

    /// The same in the namespaces of a pod.
    pub async fn sleeper_in(
        &self,
        pod: Option<&PodNamespaces>,
        name: &str,
        spec: &Value,
    ) -> (String, ExitReceiver) {
        let id = self.id(name);
        let mut spec = spec.clone();
        spec["process"]["args"] = json!(["sleep", "1000"]);
        let mut spec = parse(&spec);
        if let Some(pod) = pod {
            pod.share_with(&mut spec);
        }
        let created = self.engine.create(&id, &spec, self.bundle.path(), ProcessIo::default()).await;
        let pid = created.unwrap_or_else(|error| panic!("{}", kata_agent::chain(&error))).pid;
        self.engine.start(&id).await.unwrap();
        (id, self.reaper.register(pid))
    }

    /// Runs a shell script in a running container.
    pub async fn exec_sh(&self, id: &str, script: &str) -> Outcome {
        let process = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/bin"]});
        self.exec(id, &process).await.unwrap_or_else(|error| panic!("{}", kata_agent::chain(&error)))
    }

    pub async fn exec(&self, id: &str, process: &Value) -> Result<Outcome, EngineError> {
        let process: Process = serde_json::from_value(process.clone()).unwrap();
        let (io, output) = pipes();
        let pid = self.engine.exec(id, &process, io).await?.pid;
        Ok(output.collect(self.reaper.register(pid)).await)
    }

    async fn assert_nothing_left(&self) {
        let left = || -> Vec<PathBuf> {
            let Ok(entries) = fs::read_dir(self.cgroup_root.join("kata")) else { return Vec::new() };
            let names = entries.flatten().map(|entry| entry.path());
            names.filter(|path| path.to_string_lossy().contains(&self.prefix)).collect()
        };
        // A create that failed removes its cgroup in the background.
        for _ in 0..100 {
            if left().is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(left(), Vec::<PathBuf>::new(), "cgroups are left");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = self.bundle.path().to_string_lossy().into_owned();
        assert!(!mounts.contains(&ours), "mounts are left on this side");
    }
}

/// Takes along what a test that fails leaves running.
impl Drop for World {
    fn drop(&mut self) {
        let Ok(entries) = fs::read_dir(self.cgroup_root.join("kata")) else { return };
        for cgroup in entries.flatten().map(|entry| entry.path()) {
            if cgroup.to_string_lossy().contains(&self.prefix) {
                let _ = fs::write(cgroup.join("cgroup.kill"), "1");
                std::thread::sleep(Duration::from_millis(100));
                let _ = fs::remove_dir(cgroup);
            }
        }
    }
}

pub fn parse(spec: &Value) -> Spec {
    serde_json::from_value(spec.clone()).expect("a spec")
}

/// A spec with what most images are run with.
pub fn spec() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "root": {"path": "rootfs"},
        "hostname": "box",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["true"],
            "env": ["PATH=/bin:/usr/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
        },
    })
}

fn busybox_root(root: &Path) {
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp", "root", "home/app"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let applets = "sh true false cat ls id sleep echo hostname grep stat readlink mount touch mkdir mknod head tr \
        env pwd test tty kill wc ps rm dd sort seq chmod umount dirname cut stty";
    for applet in applets.split_whitespace() {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
        .unwrap();
}

/// The ends of a process's output that the test keeps.
pub struct Output {
    stdout: OwnedFd,
    stderr: OwnedFd,
}

/// No input; output to pipes.
pub fn pipes() -> (ProcessIo, Output) {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let ((stdout, stdout_end), (stderr, stderr_end)) = (pipe(), pipe());
    let io = ProcessIo { stdin: None, stdout: Some(stdout_end), stderr: Some(stderr_end) };
    (io, Output { stdout, stderr })
}

impl Output {
    /// Reads to the end of both and waits for the process.
    pub async fn collect(self, exit: ExitReceiver) -> Outcome {
        let read = |fd: OwnedFd| {
            tokio::task::spawn_blocking(move || {
                let mut text = Vec::new();
                File::from(fd).read_to_end(&mut text).unwrap();
                String::from_utf8_lossy(&text).into_owned()
            })
        };
        let (stdout, stderr) = (read(self.stdout), read(self.stderr));
        let code = exit.wait().await.code();
        Outcome { code, stdout: stdout.await.unwrap(), stderr: stderr.await.unwrap() }
    }
}
