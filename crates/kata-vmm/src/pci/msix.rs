//! Message-signalled interrupts of a function: MSI-X table, pending bits, and the lines into the guest behind them (PCI 3.0,
//! section 6.8.2). MSI has the same vectors without a table.
//!
//! ```text
//!   table entry: address, data, mask ─┐
//!   function: enabled, masked ────────┴─▶ wanted route ──(lazily, all at once)──▶ the line's route in the hypervisor
//!
//!   raise(vector) ─ deliverable ─▶ route what is behind, write to the line's descriptor
//!                 └ masked ──────▶ pending, delivered when the mask goes
//! ```
//!
//! A guest sets up its vectors one after another, and each change of the hypervisor's routes costs much. So routes are brought up to
//! date only when one is needed: an interrupt is raised, or a line is lent to a back end that raises it behind our back. Usually all
//! vectors of a device are set up by then, and one change does for them. What a lent line raises while it is masked is lost, so it
//! is raised once more when the mask goes; drivers look at their queues and find nothing more to do.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::events::{EventError, Events, Line, Msi};

/// Bytes of a table entry.
pub const ENTRY: usize = 16;
/// Vector control: the vector is masked.
const MASKED: u32 = 1;

/// The vectors of a function.
pub struct Msix {
    events: Arc<dyn Events>,
    vectors: Mutex<Vectors>,
}

struct Vectors {
    enabled: bool,
    masked: bool,
    table: Vec<Vector>,
}

struct Vector {
    line: Line,
    event: EventFd,
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
    /// Somebody else raises it too.
    lent: bool,
    /// Where the hypervisor sends it.
    routed: Option<Msi>,
}

/// A vector in a snapshot. Whether the function's masks are open is in the configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VectorState {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

impl Msix {
    /// As after a reset: disabled, and all vectors masked.
    pub fn new(events: Arc<dyn Events>, count: usize) -> Result<Msix, EventError> {
        // Lines that were made before one fails go back when this is dropped.
        let vectors = Vectors { enabled: false, masked: false, table: Vec::with_capacity(count) };
        let msix = Msix { events, vectors: Mutex::new(vectors) };
        for _ in 0..count {
            let (line, event) = msix.events.new_line()?;
            msix.lock().table.push(Vector {
                line,
                event,
                address: 0,
                data: 0,
                masked: true,
                pending: false,
                lent: false,
                routed: None,
            });
        }
        Ok(msix)
    }

    /// Sets the function's enable and mask bits.
    pub fn control(&self, enabled: bool, masked: bool) {
        let mut vectors = self.lock();
        if (vectors.enabled, vectors.masked) != (enabled, masked) {
            vectors.enabled = enabled;
            vectors.masked = masked;
            if !enabled {
                vectors.table.iter_mut().for_each(|vector| vector.pending = false);
            }
            vectors.settle(&*self.events);
        }
    }

    /// The table, for a snapshot.
    pub fn save(&self) -> Vec<VectorState> {
        let state = |vector: &Vector| VectorState {
            address: vector.address,
            data: vector.data,
            masked: vector.masked,
            pending: vector.pending,
        };
        self.lock().table.iter().map(state).collect()
    }

    /// Takes the table from a snapshot, before the function's bits are set; false where it has another number of vectors.
    pub fn restore(&self, saved: &[VectorState]) -> bool {
        let mut vectors = self.lock();
        if vectors.table.len() != saved.len() {
            return false;
        }
        for (vector, saved) in vectors.table.iter_mut().zip(saved) {
            let VectorState { address, data, masked, pending } = *saved;
            (vector.address, vector.data) = (address, data);
            (vector.masked, vector.pending) = (masked, pending);
        }
        true
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, into: &mut [u8]) {
        let vectors = self.lock();
        for (byte, offset) in into.iter_mut().zip(offset..) {
            let at = usize::try_from(offset).unwrap_or(usize::MAX);
            *byte =
                vectors.table.get(at / ENTRY).and_then(|v| v.bytes().get(at % ENTRY).copied()).unwrap_or(0);
        }
    }

    /// Writes to the table, in aligned units of four or eight bytes; others are lost.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let aligned = matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64);
        let Some(at) = usize::try_from(offset).ok().filter(|_| aligned) else { return };
        let mut vectors = self.lock();
        let Some(vector) = vectors.table.get_mut(at / ENTRY) else { return };
        let mut bytes = vector.bytes();
        if let Some(part) = bytes.get_mut(at % ENTRY..at % ENTRY + data.len()) {
            part.copy_from_slice(data);
        }
        let [low @ .., a, b, c, d, m, n, o, p] = bytes;
        vector.address = u64::from_le_bytes(low);
        vector.data = u32::from_le_bytes([a, b, c, d]);
        vector.masked = u32::from_le_bytes([m, n, o, p]) & MASKED != 0;
        vectors.settle(&*self.events);
    }

    /// Sets a vector up, for a function whose vectors are not in a table: those of MSI (section 6.8.1).
    pub fn set_vector(&self, vector: usize, msi: Msi, masked: bool) {
        let mut vectors = self.lock();
        let Some(vector) = vectors.table.get_mut(vector) else { return };
        (vector.address, vector.data, vector.masked) = (msi.address, msi.data, masked);
        vectors.settle(&*self.events);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, into: &mut [u8]) {
        let vectors = self.lock();
        for (byte, offset) in into.iter_mut().zip(offset..) {
            let first = usize::try_from(offset).unwrap_or(usize::MAX).saturating_mul(8);
            let of = |bit: usize| vectors.table.get(first.saturating_add(bit)).is_some_and(|v| v.pending);
            *byte = (0..8).fold(0, |bits, bit| bits | u8::from(of(bit)) << bit);
        }
    }

    /// Whether the function is to interrupt by messages at all.
    pub fn enabled(&self) -> bool {
        self.lock().enabled
    }

    /// How many vectors there are.
    pub fn count(&self) -> usize {
        self.lock().table.len()
    }

    /// Interrupts the guest, now or when it lets us.
    pub fn raise(&self, vector: usize) {
        let mut vectors = self.lock();
        let on = vectors.enabled && !vectors.masked;
        let enabled = vectors.enabled;
        let Some(vector) = vectors.table.get_mut(vector).filter(|_| enabled) else { return };
        vector.pending = true;
        if !vector.deliver(on) {
            vectors.settle(&*self.events);
        }
    }

    /// What raises a vector without our doing. Until [`Msix::take_back`] its route follows every change at once.
    pub fn lend(&self, vector: usize) -> Option<EventFd> {
        let mut vectors = self.lock();
        let lent = vectors.table.get_mut(vector)?;
        let event = lent
            .event
            .try_clone()
            .map_err(|e| tracing::error!(error = %e, "an interrupt cannot be lent"))
            .ok()?;
        // Before it counts as lent: nobody has raised it yet.
        vectors.update(&*self.events);
        if let Some(lent) = vectors.table.get_mut(vector) {
            lent.lent = true;
        }
        vectors.settle(&*self.events);
        Some(event)
    }

    /// No line is lent any more.
    pub fn take_back(&self) {
        self.lock().table.iter_mut().for_each(|vector| vector.lent = false);
    }

    fn lock(&self) -> MutexGuard<'_, Vectors> {
        self.vectors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        let table = std::mem::take(&mut self.lock().table);
        let routed = table.iter().filter(|vector| vector.routed.is_some());
        let routes: Vec<_> = routed.map(|vector| (vector.line, None)).collect();
        if !routes.is_empty() {
            // What fails here is undone with the line.
            let _ = self.events.route(&routes);
        }
        for vector in table {
            self.events.drop_line(vector.line, &vector.event);
        }
    }
}

impl Vectors {
    /// Delivers what is pending and can be, with routes as they are to be.
    fn settle(&mut self, events: &dyn Events) {
        let on = self.enabled && !self.masked;
        let behind = |vector: &Vector| {
            let wanted = vector.wanted(on);
            vector.routed != wanted && (vector.lent || (vector.pending && wanted.is_some()))
        };
        if self.table.iter().any(behind) {
            self.update(events);
        }
        for vector in &mut self.table {
            vector.deliver(on);
        }
    }

    /// Brings all routes up to date.
    fn update(&mut self, events: &dyn Events) {
        let on = self.enabled && !self.masked;
        let behind = self.table.iter().filter(|vector| vector.routed != vector.wanted(on));
        let routes: Vec<_> = behind.map(|vector| (vector.line, vector.wanted(on))).collect();
        if routes.is_empty() {
            return;
        }
        if let Err(e) = events.route(&routes) {
            tracing::error!(error = %e, "interrupts of a device cannot be routed; they wait for the next try");
            return;
        }
        for vector in &mut self.table {
            let wanted = vector.wanted(on);
            vector.pending |= vector.lent && vector.routed.is_none() && wanted.is_some();
            vector.routed = wanted;
        }
    }
}

impl Vector {
    /// Where interrupts go, with the function's masks open or not.
    fn wanted(&self, on: bool) -> Option<Msi> {
        (on && !self.masked).then_some(Msi { address: self.address, data: self.data })
    }

    /// Delivers what is pending if its route is ready for it. False where something is pending still.
    fn deliver(&mut self, on: bool) -> bool {
        let wanted = self.wanted(on);
        if self.pending && wanted.is_some() && self.routed == wanted {
            self.pending = false;
            // It fails only where as good as endlessly many wait in it, and one is enough.
            let _ = self.event.write(1);
        }
        !self.pending
    }

    /// The table entry.
    fn bytes(&self) -> [u8; ENTRY] {
        let [a, b, c, d, e, f, g, h] = self.address.to_le_bytes();
        let [i, j, k, l] = self.data.to_le_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l, u8::from(self.masked), 0, 0, 0]
    }
}
