//! Disks and network interfaces of a machine that runs.
//!
//! ```text
//!   add_disk   add-fd ─▶ (object-add ─▶) blockdev-add ─▶ device_add      on the bridge, in the slot's function 0
//!   add_nic    getfd ··▶ netdev_add ───▶ device_add
//!   remove     device_del ─▶ the guest lets go ─▶ DEVICE_DELETED ─▶ the other steps' opposites, last first
//! ```
//!
//! Each step is written down with its opposite before it is taken, as the pod's leak record does it. A failure half way and a removal
//! work the list off in the same way, and what a caller that gave up has left can still be removed.
//!
//! The object is what holds a disk to its bounds, where it has any. QEMU opens no file by name: disks, taps and `/dev/vhost-net` are
//! opened by others and sent along. Everything that belongs to a device is named for
//! its slot, because QEMU takes no name over 31 characters for a disk.
//!
//! What the ways to offer slots cost, measured under TCG on a busy machine with a distribution's kernel 6.1: CPU seconds of a boot
//! with QEMU 7.2, median of 4 to 6 runs, of which less than 0.1 s means nothing; wall time until the guest has a disk and until it
//! has let go, range of 2 to 6 rounds, QEMU 7.2 and 10.0 alike.
//!
//! | variant | boot, s | plug, s | removal, s | what follows |
//! |---|---|---|---|---|
//! | no slots | 1.7 | | | |
//! | one `pci-bridge`, 31 slots | 1.7 | 0.05–0.5 | 0.1–0.4 | done; all 31 taken at once work |
//! | 4, 8, 15 `pcie-root-port`s of one slot each | 1.7, 1.9, 2.0 | 0.05–0.6 | 0.1–0.4 | not done: every port costs time at boot |
//! | 8, 16 of them as functions | 1.7, 1.9 | 0.1–0.2 | 0.1–0.2 | not done |
//! | root ports with PCIe's own hot-plug, not ACPI's | as above | 0.2–0.5 | 6.2–6.5 | not done: Linux waits 5 s, lest the button be pressed again |
//! | the bridge without room set aside | | never | | room is set aside |

use std::os::fd::OwnedFd;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use super::COMMAND_BOUND;
use super::command_line::{BRIDGE, mac_address, vectors};
use super::qmp::{Event, Qmp, QmpError};
use super::throttle;
use crate::files::DiskFile;
use crate::slots::{self, Slots};
use crate::vm::{Disk, DiskLimits, HypervisorError, Nic, PciPath, serial};

/// For the guest to let go of a device. It takes 0.2 s, and some more on a busy host.
pub(super) const REMOVAL_BOUND: Duration = Duration::from_secs(10);

/// The devices of a running machine that were added to it.
#[derive(Debug, Default)]
pub(super) struct Plugged {
    slots: Slots<Device>,
    /// What each disk is held to.
    limits: DiskLimits,
}

/// One device: its name in QEMU, and how to undo what was done for it.
#[derive(Debug)]
struct Device {
    name: String,
    undo: Vec<Undo>,
}

#[derive(Debug)]
enum Undo {
    /// Has the guest give the device back.
    Device,
    /// Runs a command with these arguments.
    Command(&'static str, Value),
    /// Closes a descriptor that QEMU holds under this name, unless something has taken it over.
    Descriptor(String),
}

impl Plugged {
    /// None yet.
    pub(super) fn new(limits: DiskLimits) -> Self {
        Self { slots: Slots::default(), limits }
    }

    /// Adds a disk. Comes back when QEMU has told the guest.
    pub(super) async fn add_disk(&mut self, qmp: &Qmp, disk: &Disk) -> Result<PciPath, HypervisorError> {
        let file = DiskFile::open(&disk.path, disk.readonly)?;
        let (slot, device) = self.slots.take(&disk.id, |slot| Device::new(format!("disk{slot}")))?;
        let added = device.plug_disk(qmp, slot, disk, file, self.limits).await;
        self.settle(qmp, &disk.id, slot, added).await
    }

    /// Adds a network interface. Comes back when QEMU has told the guest.
    pub(super) async fn add_nic(&mut self, qmp: &Qmp, nic: Nic) -> Result<PciPath, HypervisorError> {
        if let Some(reason) = nic.fault() {
            return Err(HypervisorError::InvalidDevice { id: nic.id, reason });
        }
        let id = nic.id.clone();
        // Not a name that an interface has which was there at the start.
        let (slot, device) = self.slots.take(&id, |slot| Device::new(format!("plugged-nic{slot}")))?;
        let added = device.plug_nic(qmp, slot, nic).await;
        self.settle(qmp, &id, slot, added).await
    }

    /// Takes a device away.
    pub(super) async fn remove(
        &mut self,
        qmp: &Qmp,
        id: &str,
        bound: Duration,
    ) -> Result<(), HypervisorError> {
        self.slots.get_mut(id)?.unplug(qmp, id, bound).await?;
        self.slots.free(id).map(drop)
    }

    /// Undoes what was done for a device that could not be added. Where that fails too, its slot stays taken.
    async fn settle(
        &mut self,
        qmp: &Qmp,
        id: &str,
        slot: u8,
        added: Result<(), QmpError>,
    ) -> Result<PciPath, HypervisorError> {
        let Err(error) = added else {
            return Ok(slots::path(slot));
        };
        if let Err(undo) = self.remove(qmp, id, REMOVAL_BOUND).await {
            tracing::warn!(device = id, error = %undo, "what was done for a device that could not be added is not undone");
        }
        Err(error.into())
    }
}

impl Device {
    fn new(name: String) -> Self {
        Self { name, undo: Vec::new() }
    }

    async fn plug_disk(
        &mut self,
        qmp: &Qmp,
        slot: u8,
        disk: &Disk,
        file: DiskFile,
        limits: DiskLimits,
    ) -> Result<(), QmpError> {
        let name = self.name.clone();
        // Set 1 is the image that the machine started from.
        let set = 100 + u32::from(slot);
        let undo = Undo::Command("remove-fd", json!({ "fdset-id": set }));
        self.step(qmp, "add-fd", json!({ "fdset-id": set }), Some(file.fd), undo).await?;
        let mut node = json!({
            "driver": if file.is_device { "host_device" } else { "file" },
            "filename": format!("/dev/fdset/{set}"),
            "read-only": disk.readonly,
            "discard": "unmap",
            "locking": "off",
        });
        let group = format!("{name}-limits");
        if let Some(throttle) = throttle::group(&group, limits) {
            let undo = Undo::Command("object-del", json!({ "id": group }));
            self.step(qmp, "object-add", throttle, None, undo).await?;
            node = throttle::held(&node, &group, disk.readonly);
        }
        if let Some(node) = node.as_object_mut() {
            node.insert("node-name".to_owned(), json!(name));
        }
        let undo = Undo::Command("blockdev-del", json!({ "node-name": name }));
        self.step(qmp, "blockdev-add", node, None, undo).await?;
        let device = json!({ "driver": "virtio-blk-pci", "drive": name, "serial": serial(&disk.id) });
        self.step(qmp, "device_add", placed(device, &name, slot), None, Undo::Device).await
    }

    async fn plug_nic(&mut self, qmp: &Qmp, slot: u8, nic: Nic) -> Result<(), QmpError> {
        let name = self.name.clone();
        let queues = nic.queues.len();
        let taps = self.hand_over(qmp, "tap", nic.queues).await?;
        let vhost = self.hand_over(qmp, "vhost", nic.vhost).await?;
        let mut netdev = json!({ "type": "tap", "id": name, "fds": taps, "vhost": !vhost.is_empty() });
        if let (Some(netdev), false) = (netdev.as_object_mut(), vhost.is_empty()) {
            netdev.insert("vhostfds".to_owned(), json!(vhost));
        }
        let undo = Undo::Command("netdev_del", json!({ "id": name }));
        self.step(qmp, "netdev_add", netdev, None, undo).await?;
        let mut device = json!({
            "driver": "virtio-net-pci",
            "netdev": name,
            "mac": mac_address(nic.mac),
            "host_mtu": nic.mtu,
            "romfile": "",
        });
        if let (Some(device), true) = (device.as_object_mut(), queues > 1) {
            device.insert("mq".to_owned(), json!(true));
            device.insert("vectors".to_owned(), json!(vectors(queues)));
        }
        self.step(qmp, "device_add", placed(device, &name, slot), None, Undo::Device).await
    }

    /// Gives QEMU descriptors, which it then knows by the names that are answered.
    async fn hand_over(&mut self, qmp: &Qmp, what: &str, files: Vec<OwnedFd>) -> Result<String, QmpError> {
        let mut names = Vec::with_capacity(files.len());
        for (number, file) in files.into_iter().enumerate() {
            let name = format!("{}-{what}{number}", self.name);
            let undo = Undo::Descriptor(name.clone());
            self.step(qmp, "getfd", json!({ "fdname": name }), Some(file), undo).await?;
            names.push(name);
        }
        Ok(names.join(":"))
    }

    /// Runs one command. Its opposite is written down first, and struck out where QEMU says that it has done nothing.
    async fn step(
        &mut self,
        qmp: &Qmp,
        command: &'static str,
        arguments: Value,
        fd: Option<OwnedFd>,
        undo: Undo,
    ) -> Result<(), QmpError> {
        self.undo.push(undo);
        let done = qmp.execute_with(command, arguments, fd, COMMAND_BOUND).await;
        if let Err(QmpError::Refused { .. }) = done {
            self.undo.pop();
        }
        done.map(drop)
    }

    /// Undoes everything, last first. What is undone is struck out, so a second try goes on where the first one failed.
    async fn unplug(&mut self, qmp: &Qmp, id: &str, bound: Duration) -> Result<(), HypervisorError> {
        while let Some(last) = self.undo.last() {
            match last {
                Undo::Device => give_back(qmp, &self.name, id, bound).await?,
                Undo::Command(command, arguments) => {
                    qmp.execute(command, arguments.clone(), COMMAND_BOUND).await?;
                }
                Undo::Descriptor(name) => {
                    match qmp.execute("closefd", json!({ "fdname": name }), COMMAND_BOUND).await {
                        // The network back end took it over, and has closed it.
                        Err(QmpError::Refused { .. }) => {}
                        closed => drop(closed?),
                    }
                }
            }
            self.undo.pop();
        }
        Ok(())
    }
}

/// A device's options with its name and its place. Without I/O ports behind the bridge it cannot be a legacy device.
fn placed(mut device: Value, name: &str, slot: u8) -> Value {
    if let Some(device) = device.as_object_mut() {
        device.insert("id".to_owned(), json!(name));
        device.insert("bus".to_owned(), json!(BRIDGE));
        device.insert("addr".to_owned(), json!(format!("{slot:x}")));
        device.insert("disable-legacy".to_owned(), json!("on"));
    }
    device
}

/// Asks the guest to let go of a device, and waits until it has.
pub(super) async fn give_back(
    qmp: &Qmp,
    name: &str,
    id: &str,
    bound: Duration,
) -> Result<(), HypervisorError> {
    let mut events = qmp.subscribe();
    match qmp.execute("device_del", json!({ "id": name }), COMMAND_BOUND).await {
        // The guest let go of it after an earlier try had given up.
        Err(QmpError::Refused { class, .. }) if class == "DeviceNotFound" => return Ok(()),
        asked => asked?,
    };
    match tokio::time::timeout(bound, deleted(&mut events, name)).await {
        Ok(deleted) => Ok(deleted?),
        Err(_) => Err(HypervisorError::DeviceHeld { id: id.to_owned(), bound }),
    }
}

async fn deleted(events: &mut Receiver<Event>, name: &str) -> Result<(), QmpError> {
    loop {
        match events.recv().await {
            Ok(Event::DeviceDeleted { device }) if device == name => return Ok(()),
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return Err(QmpError::Closed { command: "device_del".to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests;
