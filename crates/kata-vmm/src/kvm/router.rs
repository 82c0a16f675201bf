//! Interrupts and doorbells, carried out by KVM.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::events::{EventError, Events, Line, Msi};

/// Pins of the I/O APIC, and so the first numbers of interrupts; lines have the numbers above.
const PINS: u32 = 24;
/// Most lines: some 3 a disk and 130 a network interface of the most queues.
const MOST_LINES: usize = 1024;

/// The table of interrupts of one machine.
pub struct Router {
    machine: Arc<VmFd>,
    /// Where each line goes.
    lines: Mutex<BTreeMap<u32, Option<Msi>>>,
}

impl Router {
    pub(super) fn new(machine: Arc<VmFd>) -> Router {
        Router { machine, lines: Mutex::default() }
    }

    /// A descriptor that raises a pin of the I/O APIC, for good.
    pub fn pin(&self, pin: u32) -> Result<EventFd, EventError> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
            .map_err(|source| EventError::Kvm { action: "have a descriptor for an interrupt", source })?;
        self.machine.register_irqfd(&event, pin).map_err(failed("connect a pin of the I/O APIC"))?;
        Ok(event)
    }

    fn commit(&self, lines: &BTreeMap<u32, Option<Msi>>) -> Result<(), EventError> {
        let pins = (0..PINS).map(pin);
        let messages = lines.iter().filter_map(|(line, msi)| Some(message(*line, (*msi)?)));
        let entries: Vec<_> = pins.chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|e| EventError::Kvm {
            action: "hold so many interrupts",
            source: io::Error::other(format!("{e:?}")),
        })?;
        self.machine.set_gsi_routing(&table).map_err(failed("set the table of interrupts"))
    }
}

fn failed(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> EventError {
    move |e| EventError::Kvm { action, source: io::Error::from_raw_os_error(e.errno()) }
}

/// A pin of the I/O APIC is the interrupt of the same number.
fn pin(pin: u32) -> kvm_irq_routing_entry {
    let irqchip = kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin };
    kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip },
        ..Default::default()
    }
}

fn message(line: u32, msi: Msi) -> kvm_irq_routing_entry {
    let [low, high] =
        [msi.address, msi.address >> 32].map(|half| u32::try_from(half & 0xffff_ffff).unwrap_or(0));
    let msi = kvm_irq_routing_msi { address_lo: low, address_hi: high, data: msi.data, ..Default::default() };
    kvm_irq_routing_entry {
        gsi: line,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

impl Events for Router {
    fn new_line(&self) -> Result<(Line, EventFd), EventError> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() >= MOST_LINES {
            return Err(EventError::NoLine { most: MOST_LINES });
        }
        let taken = |number: &u32| lines.contains_key(number);
        let number = (PINS..).find(|number| !taken(number)).ok_or(EventError::NoLine { most: MOST_LINES })?;
        let event = self.pin(number)?;
        lines.insert(number, None);
        Ok((Line(number), event))
    }

    fn route(&self, routes: &[(Line, Option<Msi>)]) -> Result<(), EventError> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let mut wanted = lines.clone();
        for (line, msi) in routes {
            wanted.insert(line.0, *msi);
        }
        if wanted != *lines {
            self.commit(&wanted)?;
            *lines = wanted;
        }
        Ok(())
    }

    fn drop_line(&self, line: Line, event: &EventFd) {
        if let Err(error) = self.machine.unregister_irqfd(event, line.0) {
            tracing::warn!(line = line.0, %error, "an interrupt line stays with KVM");
        }
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        // The number may be another device's next: it must not begin with this one's route.
        if lines.remove(&line.0).flatten().is_some()
            && let Err(error) = self.commit(&lines)
        {
            tracing::warn!(line = line.0, %error, "the route of a device that has gone stays in the table");
        }
    }

    fn watch(&self, address: u64, event: &EventFd) -> Result<(), EventError> {
        self.machine
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(failed("watch a doorbell"))
    }

    fn unwatch(&self, address: u64, event: &EventFd) {
        let address = IoEventAddress::Mmio(address);
        if let Err(error) = self.machine.unregister_ioevent(event, &address, NoDatamatch) {
            tracing::warn!(%error, "a doorbell stays watched");
        }
    }
}
