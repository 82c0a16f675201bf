//! Processors and memory of a machine that runs.
//!
//! ```text
//!   more CPUs     query-hotpluggable-cpus ─▶ device_add ─▶ ACPI_DEVICE_OST                 the guest has taken it
//!   fewer         device_del ─▶ the guest lets go ─▶ DEVICE_DELETED                        what was added last goes first
//!   more memory   object-add memory-backend-memfd ─▶ device_add pc-dimm ─▶ ACPI_DEVICE_OST
//!                 QEMU tells its vhost-user back ends itself
//! ```
//!
//! The machine has to be started with room: `-smp …,maxcpus=` and `-m …,slots=,maxmem=`. Memory is not taken away again: a guest
//! kernel that has once used a block hardly ever empties it. Seen to work under TCG with QEMU 7.2 and a distribution's kernel 6.1.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use super::COMMAND_BOUND;
use super::hotplug::{REMOVAL_BOUND, give_back};
use super::qmp::{Event, Qmp, QmpError};
use crate::vm::{Backing, Growth, HypervisorError, Layout, Size, VmSpec};

/// For the guest to take what was added. It takes 0.1 s, and seconds on a busy host.
const TAKING_BOUND: Duration = Duration::from_secs(15);

/// What is known of the size of a machine.
#[derive(Debug, Default)]
pub(super) struct Resizer {
    base: Size,
    growth: Option<Growth>,
    backing: Backing,
    /// CPUs that were added, by their names.
    cpus: Vec<String>,
    /// Numbers of the next CPU and module, which are never used twice.
    next: u64,
    /// Sizes of the memory modules that the guest has taken, in MiB.
    modules: Vec<u64>,
    /// What QEMU has and the guest did not take.
    untaken: Option<Module>,
}

/// A memory module, by the names of its memory and of its device.
#[derive(Clone, Debug)]
struct Module {
    backend: String,
    device: String,
}

/// One entry of `query-hotpluggable-cpus`.
#[derive(Debug, Deserialize)]
struct Socket {
    #[serde(rename = "type")]
    driver: String,
    props: serde_json::Map<String, Value>,
    #[serde(rename = "qom-path")]
    taken_by: Option<String>,
}

impl Socket {
    /// Where it is, to be ordered by.
    fn place(&self) -> Vec<u64> {
        let names = ["node-id", "socket-id", "die-id", "cluster-id", "module-id", "core-id", "thread-id"];
        names.iter().map(|name| self.props.get(*name).and_then(Value::as_u64).unwrap_or(0)).collect()
    }
}

/// One entry of `query-cpus-fast`.
#[derive(Debug, Deserialize)]
struct Cpu {
    #[serde(rename = "cpu-index")]
    index: u32,
    #[serde(rename = "thread-id")]
    thread: u32,
}

impl Resizer {
    pub(super) fn new(spec: &VmSpec) -> Self {
        Self {
            base: Size { vcpus: spec.vcpus, memory_mib: spec.memory_mib },
            growth: spec.growth,
            backing: spec.backing,
            ..Self::default()
        }
    }

    /// Whether CPUs and memory can be added.
    pub(super) fn grows(&self) -> (bool, bool) {
        let room = |growth: &Growth| {
            (growth.vcpus > self.base.vcpus, growth.slots > 0 && growth.memory_mib > self.base.memory_mib)
        };
        self.growth.as_ref().map_or((false, false), room)
    }

    fn memory_mib(&self) -> u64 {
        self.modules.iter().fold(self.base.memory_mib, |all, module| all.saturating_add(*module))
    }

    /// See [`crate::Vm::resize`].
    pub(super) async fn resize(&mut self, qmp: &Qmp, size: Size) -> Result<Layout, HypervisorError> {
        let now = cpus(qmp).await?;
        let count = u32::try_from(now.len()).unwrap_or(u32::MAX);
        let fewer = size.vcpus < count;
        self.check(size, count)?;
        if size.vcpus > count {
            self.add_cpus(qmp, size.vcpus - count).await?;
        }
        if fewer {
            self.remove_cpus(qmp, count - size.vcpus.max(self.base.vcpus)).await?;
        }
        if size.memory_mib > self.memory_mib() {
            self.take_back_memory(qmp).await?;
            self.add_memory(qmp, size.memory_mib - self.memory_mib()).await?;
        }
        let mut now = if size.vcpus == count { now } else { cpus(qmp).await? };
        now.sort_by_key(|cpu| cpu.index);
        Ok(Layout {
            size: Size { vcpus: u32::try_from(now.len()).unwrap_or(u32::MAX), memory_mib: self.memory_mib() },
            vcpu_threads: now.into_iter().map(|cpu| cpu.thread).collect(),
        })
    }

    /// Refuses what the machine has no room for, before anything is done.
    fn check(&self, size: Size, vcpus: u32) -> Result<(), HypervisorError> {
        let memory = self.memory_mib();
        let most = self.growth.unwrap_or(Growth { vcpus, memory_mib: memory, slots: 0 });
        size.check_within(Size { vcpus: vcpus.max(most.vcpus), memory_mib: memory.max(most.memory_mib) })?;
        if size.memory_mib <= memory {
            return Ok(());
        }
        if u32::try_from(self.modules.len()).map_or(true, |used| used >= most.slots) {
            return Err(HypervisorError::TooLarge {
                wanted: format!("{} MiB of memory", size.memory_mib),
                most: format!("memory was added {} times already", self.modules.len()),
                next: "raise hypervisor.qemu.memory_slots",
            });
        }
        Ok(())
    }

    fn name(&mut self, kind: &str) -> String {
        self.next += 1;
        format!("{kind}{}", self.next)
    }

    async fn add_cpus(&mut self, qmp: &Qmp, count: u32) -> Result<(), HypervisorError> {
        let answer = qmp.execute("query-hotpluggable-cpus", Value::Null, COMMAND_BOUND).await?;
        let mut free: Vec<Socket> = read("query-hotpluggable-cpus", answer)?;
        free.retain(|socket| socket.taken_by.is_none());
        free.sort_by_key(Socket::place);
        for socket in free.into_iter().take(usize::try_from(count).unwrap_or(usize::MAX)) {
            let name = self.name("vcpu");
            let mut device = socket.props;
            device.insert("driver".to_owned(), json!(socket.driver));
            device.insert("id".to_owned(), json!(name));
            let mut events = qmp.subscribe();
            // Before it is done: a caller that gives up half way must not make it forgotten.
            self.cpus.push(name.clone());
            if let Err(error) = qmp.execute("device_add", Value::Object(device), COMMAND_BOUND).await {
                self.cpus.pop();
                return Err(error.into());
            }
            taken(&mut events, "virtual CPU", &name).await?;
        }
        Ok(())
    }

    /// Those that were added last go first. One that the guest holds on to stays, and so do those before it.
    async fn remove_cpus(&mut self, qmp: &Qmp, count: u32) -> Result<(), HypervisorError> {
        for _ in 0..count {
            let Some(name) = self.cpus.last().cloned() else { return Ok(()) };
            match give_back(qmp, &name, &name, REMOVAL_BOUND).await {
                Ok(()) => drop(self.cpus.pop()),
                Err(HypervisorError::DeviceHeld { .. }) => {
                    tracing::info!(cpu = name, bound = ?REMOVAL_BOUND, "the guest does not let go of a virtual CPU");
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A module that the guest did not take serves nobody: it goes before there is another try.
    async fn take_back_memory(&mut self, qmp: &Qmp) -> Result<(), HypervisorError> {
        let Some(Module { backend, device }) = self.untaken.clone() else { return Ok(()) };
        match give_back(qmp, &device, &device, REMOVAL_BOUND).await {
            Ok(()) => {}
            Err(HypervisorError::DeviceHeld { .. }) => {
                let reason =
                    format!("it did not take it earlier, and has not let go of it within {REMOVAL_BOUND:?}");
                return Err(HypervisorError::NotTaken { what: "memory", reason });
            }
            Err(error) => return Err(error),
        }
        self.untaken = None;
        drop_backend(qmp, &backend).await;
        Ok(())
    }

    async fn add_memory(&mut self, qmp: &Qmp, mib: u64) -> Result<(), HypervisorError> {
        let (backend, module) = (self.name("ram"), self.name("dimm"));
        let object = json!({
            "qom-type": "memory-backend-memfd",
            "id": backend,
            "size": mib.saturating_mul(1 << 20),
            "share": true,
            "prealloc": self.backing.prealloc,
            "hugetlb": self.backing.hugepages,
        });
        qmp.execute("object-add", object, COMMAND_BOUND).await?;
        let device = json!({ "driver": "pc-dimm", "id": module, "memdev": backend });
        let mut events = qmp.subscribe();
        // Until the guest says otherwise, and also for a caller that gives up half way.
        self.untaken = Some(Module { backend: backend.clone(), device: module.clone() });
        if let Err(error) = qmp.execute("device_add", device, COMMAND_BOUND).await {
            self.untaken = None;
            drop_backend(qmp, &backend).await;
            return Err(error.into());
        }
        taken(&mut events, "memory", &module).await?;
        self.untaken = None;
        self.modules.push(mib);
        Ok(())
    }
}

async fn drop_backend(qmp: &Qmp, backend: &str) {
    if let Err(error) = qmp.execute("object-del", json!({ "id": backend }), COMMAND_BOUND).await {
        tracing::warn!(backend, %error, "memory that was not added stays with QEMU");
    }
}

/// Waits until the guest has taken what was added: only then is there something to bring to use.
async fn taken(events: &mut Receiver<Event>, what: &'static str, name: &str) -> Result<(), HypervisorError> {
    let told = async {
        loop {
            match events.recv().await {
                Ok(Event::Taken { device, status }) if device == name => return Some(status),
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return None,
            }
        }
    };
    let reason = match tokio::time::timeout(TAKING_BOUND, told).await {
        Ok(Some(0)) => return Ok(()),
        Ok(Some(status)) => format!("it refused with ACPI status {status:#x}"),
        Ok(None) => return Err(QmpError::Closed { command: "device_add".to_owned() }.into()),
        Err(_) => format!("it has not answered within {TAKING_BOUND:?}"),
    };
    Err(HypervisorError::NotTaken { what, reason })
}

async fn cpus(qmp: &Qmp) -> Result<Vec<Cpu>, HypervisorError> {
    read("query-cpus-fast", qmp.execute("query-cpus-fast", Value::Null, COMMAND_BOUND).await?)
}

fn read<T: for<'a> Deserialize<'a>>(command: &str, answer: Value) -> Result<T, HypervisorError> {
    serde_json::from_value(answer).map_err(|error| {
        let (command, class) = (command.to_owned(), "its answer cannot be read".to_owned());
        QmpError::Refused { command, class, description: error.to_string() }.into()
    })
}

#[cfg(test)]
mod tests;
