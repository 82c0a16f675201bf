//! Docker's daemon on a containerd of its own, both in a network namespace of their own.
//!
//! ```text
//!  docker ── unix socket ──▶ dockerd ──▶ containerd ──▶ containerd-shim-kata-v2 ──▶ pod
//!                               │                              │ runs Docker's hook, which moves a veth
//!                               └── docker0, iptables, proxy   ▼ into the container's network namespace
//!                                   └────────── the namespace that containerd was started in ─────────┘
//! ```

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use super::{Containerd, Version, client_within_patience, send};
use crate::host::{stderr, stdout, wait_for};
use crate::leaks;
use rustix::process::Signal;

/// The daemon makes this on the host whatever it is told.
const PLUGINS: &str = "/run/docker/plugins";

/// A Docker with one image, `busybox`. When it is dropped, nothing may be left of it.
pub struct Docker {
    program: PathBuf,
    daemon: Child,
    containerd: Containerd,
}

impl Docker {
    /// Starts one, or says (and counts) what is missing.
    pub fn new() -> Option<Self> {
        Self::configured("{}")
    }

    /// Starts one with this text as its configuration file.
    pub fn configured(config: &str) -> Option<Self> {
        let Some(program) = std::env::var_os("KATA_TEST_DOCKERD").map(PathBuf::from) else {
            crate::skip("KATA_TEST_DOCKERD is not set: run `make test`");
            return None;
        };
        let containerd = Containerd::configured(Version::V1, "", &["unshare", "--net"])?;
        // Not the host's.
        std::fs::write(containerd.host().scratch("docker.json"), config).unwrap();
        assert!(containerd.beside("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
        let daemon = start(&program, &containerd);
        let docker = Self { program, daemon, containerd };
        let root = docker.containerd.unpacked_root();
        let import = format!("tar -C {} -c . | {} import - busybox", root.display(), docker.client());
        let output = Command::new("sh").args(["-c", &import]).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        Some(docker)
    }

    /// Stops the daemon and starts it again. Without live-restore in its configuration, it stops containers too.
    pub fn restart(&mut self) {
        self.stop();
        self.daemon = start(&self.program, &self.containerd);
    }

    fn stop(&mut self) {
        send(self.daemon.id(), Signal::TERM);
        wait_for("dockerd to stop", Duration::from_secs(20), || self.daemon.try_wait().unwrap());
    }

    /// The client as the beginning of a shell's command line.
    pub fn client(&self) -> String {
        let client = self.program.with_file_name("../bin/docker");
        let host = self.containerd.host();
        let (config, socket) = (host.scratch("docker-client"), socket(&self.containerd));
        format!("{} --config {} --host unix://{}", client.display(), config.display(), socket.display())
    }

    /// The containerd below.
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// Runs the client to its end, which comes within minutes.
    pub fn output<I: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = I>) -> Output {
        let mut command = client_within_patience();
        command.args(self.client().split(' ')).args(args).stdin(Stdio::null()).output().unwrap()
    }

    /// Runs a client that must succeed; answers what it printed.
    #[track_caller]
    pub fn ok<I: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = I>) -> String {
        let output = self.output(args);
        assert!(output.status.success(), "{}: {}{}", output.status, stdout(&output), stderr(&output));
        stdout(&output)
    }

    /// `docker run` with the runtime under test and what `what` says: options, an image, a command.
    pub fn run(&self, what: &[&str]) -> Output {
        self.output([&["run", "--runtime", self.containerd.runtime()], what].concat())
    }

    /// `docker run -d` of a shell script in a container of this name with options.
    #[track_caller]
    pub fn detached(&self, options: &[&str], name: &str, script: &str) {
        let output = self.run(&[&["-d", "--name", name], options, &["busybox", "sh", "-c", script]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
    }

    /// What `docker inspect` says of a container, e.g. at `State.Status`.
    #[track_caller]
    pub fn inspect(&self, name: &str, at: &str) -> String {
        self.ok(["inspect", "--format", &format!("{{{{.{at}}}}}"), name]).trim_end().to_owned()
    }

    /// Waits until a container's log is this text.
    #[track_caller]
    pub fn wait_for_log(&self, name: &str, text: &str) {
        self.containerd.host().wait_for("the log", || (self.ok(["logs", name]) == text).then_some(()));
    }

    /// Does something in the daemon's network namespace: on the host as containers see it.
    pub fn on_its_host<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        self.containerd.on_its_host(act)
    }
}

fn socket(containerd: &Containerd) -> PathBuf {
    containerd.host().scratch("d.sock")
}

/// Starts a daemon; answers when it can be spoken to.
fn start(program: &Path, containerd: &Containerd) -> Child {
    let path = |name: &str| containerd.host().scratch(name);
    let log = File::options().create(true).append(true).open(path("dockerd.log")).unwrap();
    let mut command = containerd.beside(program);
    for (flag, value) in [
        ("--config-file", path("docker.json")),
        ("--containerd", containerd.socket()),
        ("--data-root", path("docker")),
        ("--exec-root", path("dx")),
        ("--pidfile", path("docker.pid")),
        ("--userland-proxy-path", program.with_file_name("docker-proxy")),
        ("--init-path", program.with_file_name("../bin/docker-init")),
    ] {
        command.arg(flag).arg(value);
    }
    command.arg("--host").arg(format!("unix://{}", socket(containerd).display()));
    command.args(["--storage-driver", "overlay2"]).stdin(Stdio::null());
    let daemon = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
    let socket = socket(containerd);
    wait_for("dockerd's socket", Duration::from_secs(20), || UnixStream::connect(&socket).ok());
    daemon
}

impl Drop for Docker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.containerd.host().scratch("dockerd.log"));
            eprintln!("--- dockerd ---\n{}", log.unwrap_or_default());
            let _ = self.daemon.kill();
            let _ = self.daemon.wait();
        } else {
            self.stop();
            // The daemon mounts its own directory upon itself, for containers' mounts not to spread, and keeps the
            // namespace that containers on the host's network would share.
            for own in ["docker", "dx/netns/default"] {
                leaks::unmount(&self.containerd.host().scratch(own));
            }
        }
        // Fails where another Docker keeps something there.
        let _ = std::fs::remove_dir(PLUGINS).and_then(|()| std::fs::remove_dir("/run/docker"));
    }
}
