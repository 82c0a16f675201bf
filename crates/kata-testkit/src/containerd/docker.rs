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
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use super::{CLIENT_PATIENCE, Containerd, Version, send};
use crate::host::{stderr, stdout, wait_for};
use crate::leaks;
use rustix::process::Signal;

/// The daemon makes this on the host whatever it is told.
const PLUGINS: &str = "/run/docker/plugins";

/// A Docker with one image, `busybox`. When it is dropped, nothing may be left of it.
pub struct Docker {
    client: PathBuf,
    daemon: Child,
    containerd: Containerd,
}

impl Docker {
    /// Starts one, or says (and counts) what is missing.
    pub fn new() -> Option<Self> {
        let Some(program) = std::env::var_os("KATA_TEST_DOCKERD").map(PathBuf::from) else {
            crate::skip("KATA_TEST_DOCKERD is not set: run `make test`");
            return None;
        };
        let containerd = Containerd::configured(Version::V1, "", &["unshare", "--net"])?;
        let log = File::create(containerd.host().scratch("dockerd.log")).unwrap();
        let path = |name: &str| containerd.host().scratch(name);
        // Not the host's.
        std::fs::write(path("docker.json"), "{}").unwrap();
        assert!(containerd.beside("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
        let mut command = containerd.beside(&program);
        for (flag, value) in [
            ("--config-file", path("docker.json")),
            ("--containerd", containerd.socket()),
            ("--data-root", path("docker")),
            ("--exec-root", path("dx")),
            ("--pidfile", path("docker.pid")),
            ("--userland-proxy-path", program.with_file_name("docker-proxy")),
        ] {
            command.arg(flag).arg(value);
        }
        command.arg("--host").arg(format!("unix://{}", path("d.sock").display()));
        command.args(["--storage-driver", "overlay2"]).stdin(Stdio::null());
        let daemon = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let docker = Self { client: program.with_file_name("../bin/docker"), daemon, containerd };
        let socket = docker.socket();
        wait_for("dockerd's socket", Duration::from_secs(20), || UnixStream::connect(&socket).ok());
        let root = docker.containerd.unpacked_root();
        let import = format!(
            "tar -C {} -c . | {} --host unix://{} import - busybox",
            root.display(),
            docker.client.display(),
            socket.display()
        );
        let output = docker.environment(Command::new("sh").args(["-c", &import])).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        Some(docker)
    }

    fn socket(&self) -> PathBuf {
        self.containerd.host().scratch("d.sock")
    }

    fn environment<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("DOCKER_CONFIG", self.containerd.host().scratch("docker-client"))
    }

    /// The containerd below.
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// Runs the client to its end, which comes within a minute.
    pub fn output<I: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = I>) -> Output {
        let mut command = Command::new("timeout");
        command.args(["--foreground", "--signal", "KILL", CLIENT_PATIENCE]).arg(&self.client);
        command.arg("--host").arg(format!("unix://{}", self.socket().display())).args(args);
        self.environment(&mut command).stdin(Stdio::null()).output().unwrap()
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

    /// Does something in the daemon's network namespace: on the host as containers see it.
    pub fn on_its_host<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        self.containerd.on_its_host(act)
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.containerd.host().scratch("dockerd.log"));
            eprintln!("--- dockerd ---\n{}", log.unwrap_or_default());
            let _ = self.daemon.kill();
            let _ = self.daemon.wait();
        } else {
            send(self.daemon.id(), Signal::TERM);
            wait_for("dockerd to stop", Duration::from_secs(20), || self.daemon.try_wait().unwrap());
            // The daemon mounts its own directory upon itself, for containers' mounts not to spread.
            leaks::unmount(&self.containerd.host().scratch("docker"));
        }
        // Fails where another Docker keeps something there.
        let _ = std::fs::remove_dir(PLUGINS).and_then(|()| std::fs::remove_dir("/run/docker"));
    }
}
