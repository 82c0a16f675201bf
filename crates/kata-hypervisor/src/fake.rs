//! A virtual machine without a guest, for tests of what sits above the drivers.
//!
//! ```text
//!   code under test ── CONNECT 1024 ──▶ <spec.vsock> ──▶ the test's callback, or a unix socket of its
//!   code under test ◀── <spec.vsock>_1028 ── FakeVm::dial(1028) ◀── the test
//! ```
//!
//! A snapshot of it is a line of text, and it starts from no other.
//!
//! The host's side of the vsock device is real: a socket at `spec.vsock` with the handshake of the other drivers. Only what
//! a guest would do is up to the test.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use crate::process::{Exit, Record, Tail};
use crate::qemu::qmp::QmpError;
use crate::slots::{self, Slots};
use crate::vm::{
    Capabilities, Device, Disk, HypervisorError, Layout, Nic, Origin, PciPath, ProcessInfo, Size, Template,
    Vm, VmExit, VmSpec, no_host_devices,
};
use crate::vsock::{self, CONNECT_LINE_LIMIT};

/// A connection from the host that reached the fake guest.
#[derive(Debug)]
pub struct Incoming {
    /// The guest's port that was dialled.
    pub port: u32,
    /// The host's port: what the dialler was told in `OK <port>`, and what an agent sees as its peer.
    pub peer_port: u32,
    /// The connection, after the handshake.
    pub stream: UnixStream,
}

/// What a snapshot of a fake machine has in both its files.
const SNAPSHOT: &str = "a fake machine stands still\n";

type Callback = Arc<dyn Fn(Incoming) + Send + Sync>;

#[derive(Clone, Default)]
struct Script {
    boot_takes: Duration,
    resize_takes: Duration,
    boot_fails: Option<String>,
    stop_fails: bool,
    no_hotplug: bool,
    no_snapshot: bool,
    no_share: bool,
    plugging_fails: Option<String>,
    sockets: HashMap<u32, PathBuf>,
    callback: Option<Callback>,
}

/// A [`Vm`] whose guest is the test. Clones are handles to the same machine: keep one, give the other away.
#[derive(Clone)]
pub struct FakeVm(Arc<Machine>);

struct Machine {
    script: Mutex<Script>,
    spec: Mutex<Option<VmSpec>>,
    /// What was added while it ran.
    devices: Mutex<Slots<Device>>,
    /// What it was brought to, beyond its specification.
    size: Mutex<Option<Size>>,
    console: Tail,
    paused: watch::Sender<bool>,
    exit: watch::Sender<Option<VmExit>>,
    next_port: AtomicU32,
}

impl Default for FakeVm {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for FakeVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeVm").field("exit", &*self.0.exit.borrow()).finish_non_exhaustive()
    }
}

impl FakeVm {
    /// A machine that boots at once and whose guest refuses every connection.
    pub fn new() -> Self {
        Self(Arc::new(Machine {
            script: Mutex::default(),
            spec: Mutex::default(),
            devices: Mutex::default(),
            size: Mutex::default(),
            console: Tail::new(64 * 1024),
            paused: watch::channel(false).0,
            exit: watch::channel(None).0,
            next_port: AtomicU32::new(1 << 30),
        }))
    }

    /// `boot` takes this long.
    #[must_use]
    pub fn boot_takes(self, time: Duration) -> Self {
        lock(&self.0.script).boot_takes = time;
        self
    }

    /// Has each change of size take a time.
    pub fn resize_takes(&self, time: Duration) {
        lock(&self.0.script).resize_takes = time;
    }

    /// `boot` fails, as if the VMM had exited with code 1 and said `why`.
    #[must_use]
    pub fn boot_fails(self, why: impl Into<String>) -> Self {
        lock(&self.0.script).boot_fails = Some(why.into());
        self
    }

    /// `stop` fails.
    #[must_use]
    pub fn stop_fails(self) -> Self {
        lock(&self.0.script).stop_fails = true;
        self
    }

    /// Nothing can be added to the running machine.
    #[must_use]
    pub fn without_hotplug(self) -> Self {
        lock(&self.0.script).no_hotplug = true;
        self
    }

    /// It cannot be written to files, nor started from them.
    #[must_use]
    pub fn without_snapshots(self) -> Self {
        lock(&self.0.script).no_snapshot = true;
        self
    }

    /// Files cannot be shared.
    #[must_use]
    pub fn without_share(self) -> Self {
        lock(&self.0.script).no_share = true;
        self
    }

    /// Adding and removing devices fails from now on, as if QEMU had refused it and said `why`. Can be said of a machine that runs.
    #[must_use]
    pub fn plugging_fails(self, why: impl Into<String>) -> Self {
        lock(&self.0.script).plugging_fails = Some(why.into());
        self
    }

    /// Connections to any port without a socket of its own go to `callback`. It runs on the accepting task: spawn what takes time.
    #[must_use]
    pub fn on_connect(self, callback: impl Fn(Incoming) + Send + Sync + 'static) -> Self {
        lock(&self.0.script).callback = Some(Arc::new(callback));
        self
    }

    /// Connections to `port` go to the unix socket at `path`.
    #[must_use]
    pub fn forward(self, port: u32, path: impl Into<PathBuf>) -> Self {
        lock(&self.0.script).sockets.insert(port, path.into());
        self
    }

    /// Dials a port of the host, as the guest does.
    ///
    /// # Errors
    /// Nobody listens there; or the machine was not booted, which is `NotConnected`.
    pub async fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let path = self.with_spec(|spec| vsock::host_port_path(&spec.vsock, port));
        UnixStream::connect(path.ok_or(io::ErrorKind::NotConnected)?).await
    }

    /// Looks at the specification that `boot` was given; `None` before.
    pub fn with_spec<T>(&self, look: impl FnOnce(&VmSpec) -> T) -> Option<T> {
        lock(&self.0.spec).as_ref().map(look)
    }

    /// Names of the devices that were added to the running machine and not removed, in the order of their slots.
    pub fn device_ids(&self) -> Vec<String> {
        lock(&self.0.devices).iter().map(|(id, _)| id.to_owned()).collect()
    }

    /// The disks among those devices.
    pub fn disks(&self) -> Vec<Disk> {
        let devices = lock(&self.0.devices);
        let disks = devices.iter().filter_map(|(_, device)| match device {
            Device::Disk(disk) => Some(disk.clone()),
            Device::Nic(_) | Device::Host(_) => None,
        });
        disks.collect()
    }

    /// Looks at a network interface among them; `None` where there is none of that name.
    pub fn with_nic<T>(&self, id: &str, look: impl FnOnce(&Nic) -> T) -> Option<T> {
        let devices = lock(&self.0.devices);
        let nic = devices.iter().find_map(|(of, device)| match device {
            Device::Nic(nic) if of == id => Some(nic),
            _ => None,
        });
        nic.map(look)
    }

    /// What the machine has been brought to; `None` where it never was.
    pub fn size(&self) -> Option<Size> {
        *lock(&self.0.size)
    }

    /// Writes to the guest's console.
    pub fn write_console(&self, text: &str) {
        self.0.console.push(text.as_bytes());
    }

    /// Whether the guest is paused.
    pub fn is_paused(&self) -> bool {
        *self.0.paused.borrow()
    }

    /// Ends the machine. The first end counts, as with a real one.
    pub fn end(&self, exit: VmExit) {
        self.0.exit.send_if_modified(|now| {
            let first = now.is_none();
            now.get_or_insert(exit);
            first
        });
    }

    fn running(&self, operation: &'static str) -> Result<(), HypervisorError> {
        match (lock(&self.0.spec).is_some(), self.0.exit.borrow().is_some()) {
            (_, true) => Err(HypervisorError::WrongState { operation, state: "has ended" }),
            (false, _) => Err(HypervisorError::WrongState { operation, state: "is not started" }),
            _ => Ok(()),
        }
    }

    /// Whether devices of this machine can be added and removed now.
    fn pluggable(&self, operation: &'static str, command: &str) -> Result<(), HypervisorError> {
        self.running(operation)?;
        if lock(&self.0.script).no_hotplug {
            return Err(HypervisorError::Unsupported { operation, driver: "fake".to_owned() });
        }
        match lock(&self.0.script).plugging_fails.clone() {
            Some(description) => {
                let (command, class) = (command.to_owned(), "GenericError".to_owned());
                Err(QmpError::Refused { command, class, description }.into())
            }
            None => Ok(()),
        }
    }

    fn plug(&self, id: &str, device: Device) -> Result<PciPath, HypervisorError> {
        let mut devices = lock(&self.0.devices);
        let (slot, _) = devices.take(id, |_| device)?;
        Ok(slots::path(slot))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Vm for FakeVm {
    fn capabilities(&self) -> Capabilities {
        let (hotplug, shared_fs) = {
            let script = lock(&self.0.script);
            (!script.no_hotplug, !script.no_share)
        };
        Capabilities {
            shared_fs,
            pause: true,
            hotplug_cpu: hotplug,
            hotplug_memory: hotplug,
            hotplug_block: hotplug,
            hotplug_network: hotplug,
            host_devices: false,
            snapshot: !lock(&self.0.script).no_snapshot,
        }
    }

    async fn boot(&self, mut spec: VmSpec, record: &Record) -> Result<Origin, HypervisorError> {
        if lock(&self.0.spec).is_some() {
            return Err(HypervisorError::WrongState { operation: "boot", state: "was started already" });
        }
        let program = spec.program.clone();
        let origin = spec.template.take().map_or(Origin::Kernel, origin);
        let listener = vsock::bind(&spec.vsock, record)?;
        let socket =
            |source| HypervisorError::File { what: "vsock socket", path: spec.vsock.clone(), source };
        listener.set_nonblocking(true).map_err(socket)?;
        let listener = UnixListener::from_std(listener).map_err(socket)?;
        *lock(&self.0.spec) = Some(spec);
        let script = lock(&self.0.script).clone();
        tokio::spawn(accept(self.clone(), listener));
        tokio::time::sleep(script.boot_takes).await;
        if let Some(output) = script.boot_fails {
            self.end(VmExit::Code(1, output.clone()));
            return Err(HypervisorError::Refused { program, exit: Exit::Code(1), output });
        }
        self.running("boot")?;
        Ok(origin)
    }

    async fn exited(&self) -> VmExit {
        let mut exit = self.0.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await;
        match ended.ok().and_then(|exit| exit.clone()) {
            Some(exit) => exit,
            None => std::future::pending().await,
        }
    }

    async fn pause(&self) -> Result<(), HypervisorError> {
        self.running("pause")?;
        self.0.paused.send_replace(true);
        Ok(())
    }

    async fn resume(&self) -> Result<(), HypervisorError> {
        self.running("resume")?;
        self.0.paused.send_replace(false);
        Ok(())
    }

    async fn snapshot(&self, into: Template) -> Result<(), HypervisorError> {
        const OPERATION: &str = "snapshot";
        self.running(OPERATION)?;
        if !self.is_paused() {
            return Err(HypervisorError::WrongState { operation: OPERATION, state: "is not paused" });
        }
        let Template { mut state, mut memory } = into;
        let written =
            state.write_all(SNAPSHOT.as_bytes()).and_then(|()| memory.write_all(SNAPSHOT.as_bytes()));
        written.map_err(|source| HypervisorError::File { what: "snapshot", path: PathBuf::new(), source })
    }

    async fn add_device(&self, device: Device) -> Result<PciPath, HypervisorError> {
        match &device {
            Device::Disk(disk) => {
                self.pluggable("adding a disk", "device_add")?;
                self.plug(&disk.id.clone(), device)
            }
            Device::Nic(nic) => {
                self.pluggable("adding a network interface", "device_add")?;
                if let Some(reason) = nic.fault() {
                    return Err(HypervisorError::InvalidDevice { id: nic.id.clone(), reason });
                }
                self.plug(&nic.id.clone(), device)
            }
            Device::Host(_) => Err(no_host_devices("the fake machine monitor")),
        }
    }

    async fn remove_device(&self, id: &str) -> Result<(), HypervisorError> {
        self.pluggable("removing a device", "device_del")?;
        lock(&self.0.devices).free(id).map(drop)
    }

    async fn resize(&self, size: Size) -> Result<Layout, HypervisorError> {
        self.running("changing the size")?;
        let takes = lock(&self.0.script).resize_takes;
        tokio::time::sleep(takes).await;
        let base =
            self.with_spec(|spec| (Size { vcpus: spec.vcpus, memory_mib: spec.memory_mib }, spec.growth));
        let (base, growth) = base.unwrap_or_default();
        let now = lock(&self.0.size).unwrap_or(base);
        let wanted =
            Size { vcpus: size.vcpus.max(base.vcpus), memory_mib: size.memory_mib.max(now.memory_mib) };
        let room = growth.map_or(base, |growth| Size { vcpus: growth.vcpus, memory_mib: growth.memory_mib });
        if wanted.vcpus > room.vcpus.max(now.vcpus) || wanted.memory_mib > room.memory_mib.max(now.memory_mib)
        {
            return Err(HypervisorError::Unsupported { operation: "growing", driver: "fake".to_owned() });
        }
        if wanted != now {
            *lock(&self.0.size) = Some(wanted);
        }
        Ok(Layout { size: wanted, vcpu_threads: Vec::new() })
    }

    async fn stop(&self) -> Result<(), HypervisorError> {
        if lock(&self.0.script).stop_fails {
            return Err(HypervisorError::WrongState {
                operation: "stop",
                state: "was told to fail by the test",
            });
        }
        self.end(VmExit::Stopped);
        Ok(())
    }

    fn console_tail(&self) -> String {
        self.0.console.text()
    }

    fn processes(&self) -> Vec<ProcessInfo> {
        Vec::new()
    }
}

/// Whether the template is one of a fake machine.
fn origin(Template { mut state, mut memory }: Template) -> Origin {
    let whole = |file: &mut File| {
        let mut text = String::new();
        file.read_to_string(&mut text).is_ok_and(|_| text == SNAPSHOT)
    };
    match whole(&mut state) && whole(&mut memory) {
        true => Origin::Template,
        false => Origin::Instead("it is no snapshot of a fake machine".to_owned()),
    }
}

/// Serves the host's side of the vsock device until the machine ends.
async fn accept(vm: FakeVm, listener: UnixListener) {
    let ended = vm.clone();
    let serve = async {
        while let Ok((stream, _)) = listener.accept().await {
            let vm = vm.clone();
            tokio::spawn(async move {
                if let Err(error) = connect(&vm, stream).await {
                    tracing::debug!(%error, "the fake guest refused a connection");
                }
            });
        }
    };
    tokio::select! {
        () = serve => {}
        _ = ended.exited() => {}
    }
}

/// The handshake. A port that nobody serves is refused by closing the connection.
async fn connect(vm: &FakeVm, mut stream: UnixStream) -> io::Result<()> {
    let port = requested_port(&mut stream).await?;
    let script = lock(&vm.0.script).clone();
    let peer_port = vm.0.next_port.fetch_add(1, Ordering::Relaxed);
    let answer = format!("OK {peer_port}\n");
    if let Some(path) = script.sockets.get(&port) {
        let mut guest = UnixStream::connect(path).await?;
        stream.write_all(answer.as_bytes()).await?;
        tokio::select! {
            copied = tokio::io::copy_bidirectional(&mut stream, &mut guest) => { copied?; }
            _ = vm.exited() => {}
        }
    } else if let Some(callback) = script.callback {
        stream.write_all(answer.as_bytes()).await?;
        callback(Incoming { port, peer_port, stream });
    }
    Ok(())
}

async fn requested_port(stream: &mut UnixStream) -> io::Result<u32> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') && line.len() < CONNECT_LINE_LIMIT {
        line.push(stream.read_u8().await?);
    }
    let text = String::from_utf8_lossy(&line);
    let port = text.strip_prefix("CONNECT ").and_then(|port| port.trim_end().parse().ok());
    port.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is no CONNECT line")))
}

#[cfg(test)]
mod tests;
