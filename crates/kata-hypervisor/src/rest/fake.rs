//! A VMM for the tests: a process that does nothing, and a server in the test that speaks for it. The server holds every request
//! against a table of what the VMM's published interface says, and refuses what is not in it: an unknown path, an unknown field, one
//! that is missing, one of the wrong type.

use std::collections::BTreeMap;
use std::fs;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal};
use serde::Deserialize;
use serde_json::Value;

use crate::process::{Identity, Record};
use crate::vm::{Accelerator, Backing, Machine, Vm, VmSpec};

/// What is published of an interface.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Interface {
    endpoints: Vec<Endpoint>,
    schemas: BTreeMap<String, BTreeMap<String, String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Endpoint {
    request: String,
    body: Option<String>,
    answers: Vec<u16>,
}

impl Interface {
    pub(crate) fn parse(table: &str) -> Self {
        toml::from_str(table).unwrap()
    }

    fn endpoint(&self, request: &str) -> Result<&Endpoint, String> {
        let found = self.endpoints.iter().find(|endpoint| match endpoint.request.split_once('{') {
            Some((front, _)) => {
                request.strip_prefix(front).is_some_and(|id| !id.is_empty() && !id.contains('/'))
            }
            None => endpoint.request == request,
        });
        found.ok_or_else(|| format!("{request}: no such request"))
    }

    /// What is wrong with a request.
    pub(crate) fn check(&self, request: &str, body: Option<&Value>) -> Result<(), String> {
        match (&self.endpoint(request)?.body, body) {
            (None, None) => Ok(()),
            (None, Some(_)) => Err(format!("{request}: takes no body")),
            (Some(_), None) => Err(format!("{request}: the body is missing")),
            (Some(schema), Some(body)) => self.fits(schema, body, request),
        }
    }

    fn fits(&self, kind: &str, value: &Value, at: &str) -> Result<(), String> {
        let is = |fits: bool| if fits { Ok(()) } else { Err(format!("{at}: {value} is no {kind}")) };
        match kind {
            "string" => return is(value.is_string()),
            "integer" => return is(value.is_u64()),
            "boolean" => return is(value.is_boolean()),
            _ => {}
        }
        if let Some(items) = kind.strip_prefix('[').and_then(|kind| kind.strip_suffix(']')) {
            let Value::Array(values) = value else { return is(false) };
            return values.iter().try_for_each(|value| self.fits(items, value, at));
        }
        if kind.starts_with('\'') {
            return is(kind.split('|').any(|word| value.as_str() == Some(word.trim_matches('\''))));
        }
        let fields = self.schemas.get(kind).unwrap_or_else(|| panic!("{kind} is not in the table"));
        let Value::Object(members) = value else { return is(false) };
        for (name, value) in members {
            let kind = fields.get(name).ok_or_else(|| format!("{at}.{name}: no such field"))?;
            self.fits(kind.trim_end_matches('!'), value, &format!("{at}.{name}"))?;
        }
        let missing = fields.iter().find(|(name, kind)| kind.ends_with('!') && !members.contains_key(*name));
        missing.map_or(Ok(()), |(name, _)| Err(format!("{at}.{name}: is missing")))
    }
}

/// One request as it came.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Seen {
    /// Method and path.
    pub line: String,
    pub body: Value,
    /// How many descriptors came along.
    pub fds: usize,
}

/// The server. It ends with the test's process.
#[derive(Clone)]
pub(crate) struct Server {
    seen: Arc<Mutex<Vec<Seen>>>,
    wrong: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Serves on `listener`: `answer` gives status and body.
    pub(crate) fn run(
        listener: UnixListener,
        interface: Interface,
        answer: impl Fn(&Seen) -> (u16, Value) + Send + 'static,
    ) -> Self {
        let server = Self { seen: Arc::default(), wrong: Arc::default() };
        let own = server.clone();
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                own.serve(stream, &interface, &answer);
            }
        });
        server
    }

    fn serve(&self, mut stream: UnixStream, interface: &Interface, answer: &impl Fn(&Seen) -> (u16, Value)) {
        let Some((seen, body)) = receive(&stream) else { return };
        let (status, text) = match interface.check(&seen.line, body.as_ref()) {
            Ok(()) => {
                let (status, body) = answer(&seen);
                let published = interface.endpoint(&seen.line).unwrap().answers.contains(&status);
                if !published && status != 500 {
                    self.wrong.lock().unwrap().push(format!("{}: {status} is not published", seen.line));
                }
                (status, if body.is_null() { String::new() } else { body.to_string() })
            }
            Err(why) => {
                self.wrong.lock().unwrap().push(why.clone());
                (400, why)
            }
        };
        self.seen.lock().unwrap().push(seen);
        let length =
            if status == 204 { String::new() } else { format!("Content-Length: {}\r\n", text.len()) };
        let _ = write!(stream, "HTTP/1.1 {status} \r\nServer: test\r\n{length}\r\n{text}");
    }

    /// The requests so far. Every one was in the published interface.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        assert_eq!(*self.wrong.lock().unwrap(), Vec::<String>::new());
        self.seen.lock().unwrap().clone()
    }

    /// Methods and paths of the requests so far.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.seen().into_iter().map(|seen| seen.line).collect()
    }
}

/// Reads one request, and what came with it.
fn receive(stream: &UnixStream) -> Option<(Seen, Option<Value>)> {
    let mut bytes = Vec::new();
    let mut fds = 0;
    loop {
        let mut chunk = [0_u8; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(stream, &mut [IoSliceMut::new(&mut chunk)], &mut control, RecvFlags::CMSG_CLOEXEC)
            .ok()?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds += received.count();
            }
        }
        bytes.extend_from_slice(&chunk[..got.bytes]);
        if got.bytes == 0 {
            return None;
        }
        let text = String::from_utf8(bytes.clone()).unwrap();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let header = |name: &str| {
            head.lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(found, _)| found.eq_ignore_ascii_case(name))
        };
        let length = header("content-length").map_or(0, |(_, length)| length.trim().parse().unwrap());
        if body.len() < length {
            continue;
        }
        let line = head.lines().next()?.strip_suffix(" HTTP/1.1")?.to_owned();
        let body = (length > 0).then(|| serde_json::from_str(body).unwrap());
        if body.is_some() {
            assert_eq!(header("content-type").unwrap().1.trim(), "application/json");
        }
        return Some((Seen { line, body: body.clone().unwrap_or_default(), fds }, body));
    }
}

/// A directory of a pod, and a program that stands for the VMM.
pub(crate) struct Bench {
    pub dir: tempfile::TempDir,
    pub record: Record,
    program: PathBuf,
}

/// A process that lives until it is told to end: by SIGTERM in order, by SIGUSR1 with complaints.
const IDLE: &str = "#!/bin/sh\ntrap 'exit 0' TERM\ntrap 'echo it is all wrong >&2; exit 3' USR1\nwhile :; do sleep 0.02; done\n";

impl Bench {
    /// `None`, said aloud, without root: the directory's file system, namespaces and the look into the VMM need it.
    pub(crate) fn new() -> Option<Self> {
        Self::running(IDLE)
    }

    /// The same with another program.
    pub(crate) fn running(script: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounts and namespaces need root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let program = dir.path().join("program");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        for file in ["kernel", "initrd", "image"] {
            fs::write(dir.path().join(file), file).unwrap();
        }
        let record = Record::open(dir.path().join("resources.jsonl")).unwrap();
        Some(Self { dir, record, program })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn spec(&self) -> VmSpec {
        VmSpec {
            id: "pod_1".to_owned(),
            run_dir: self.dir.path().to_owned(),
            program: self.program.clone(),
            vsock_program: PathBuf::from("/nonexistent"),
            machine: Machine::Q35,
            accelerator: Accelerator::Kvm,
            kernel: self.path("kernel"),
            initrd: Some(self.path("initrd")),
            image: None,
            disks: Vec::new(),
            kernel_params: vec!["console=ttyS0".to_owned(), "quiet".to_owned()],
            vcpus: 1,
            memory_mib: 256,
            growth: None,
            backing: Backing::default(),
            vsock: self.path("kata.hvsock"),
            shared_fs: None,
            nics: Vec::new(),
            host_devices: Vec::new(),
            identity: Identity { uid: 65_534, gid: 65_534, groups: Vec::new() },
            firmware: None,
            confidential: None,
            disk_limits: crate::vm::DiskLimits::default(),
            seccomp_sandbox: String::new(),
            template: None,
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Err(error) = Record::release(self.record.path()) {
            eprintln!("{error}");
        }
    }
}

/// Pid of the VMM, as soon as there is one.
pub(crate) async fn pid_of(vm: &dyn Vm) -> u32 {
    loop {
        if let Some(process) = vm.processes().first() {
            return process.pid;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn pid(raw: u32) -> Pid {
    Pid::from_raw(i32::try_from(raw).unwrap()).unwrap()
}

/// A descriptor of the VMM, as the VMM would use it.
pub(crate) fn descriptor(vmm: u32, number: i32) -> OwnedFd {
    let pidfd = rustix::process::pidfd_open(pid(vmm), PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty()).unwrap()
}

/// The same, where it is a listener.
pub(crate) fn listener(vmm: u32, number: i32) -> UnixListener {
    descriptor(vmm, number).into()
}

/// Has the VMM end: see [`IDLE`]. Waits until it is ready for that.
pub(crate) async fn signal(vmm: u32, signal: Signal) {
    let caught = || {
        let status = fs::read_to_string(format!("/proc/{vmm}/status")).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap() & (1 << (signal.as_raw() - 1)) != 0
    };
    while signal != Signal::KILL && !caught() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    rustix::process::kill_process(pid(vmm), signal).unwrap();
}
