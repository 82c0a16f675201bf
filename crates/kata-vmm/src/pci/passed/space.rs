//! From a device's own configuration space to the one that a guest sees.
//!
//! | of the device's | the guest sees |
//! |---|---|
//! | identity, class, revision, subsystem | the same |
//! | memory BARs | BARs of the same sizes; addresses are the guest's |
//! | I/O BARs, expansion ROM, interrupt pin | none |
//! | MSI, MSI-X | the same, carried out here; what the guest writes never reaches the device |
//! | power management | a device that stays awake: the guest's state is kept for it to read, no wake-up events |
//! | PCI Express | an endpoint of the root complex, for there is no port above it: no link. Resets are carried out, all other settings kept |
//! | vendor-specific capabilities | the same, read once, read-only |
//! | all else: VPD, AF, HyperTransport, unknown ones, what is between them, all above 256 bytes | zero |
//!
//! A device may be broken, or be made to look so by whoever had it last: nothing that it says is relied on.

use super::{Lent, PassedError, Place, Stretch};
use crate::pci::PciError;
use crate::pci::configuration::{Bar, Configuration, Identity, SIZE};
use crate::pci::msix::ENTRY;

/// Where things are in a header of type 0 (PCI 3.0, section 6.1).
const CLASS: usize = 0x09;
const HEADER_TYPE: usize = 0x0e;
const BARS: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const FIRST: usize = 0x34;
/// Status: there are capabilities.
const STATUS: usize = 0x06;
const HAS_CAPABILITIES: u16 = 1 << 4;

/// Capability identifiers (PCI 3.0, appendix H).
const POWER: u8 = 0x01;
const MSI: u8 = 0x05;
const VENDOR: u8 = 0x09;
const EXPRESS: u8 = 0x10;
const MSIX: u8 = 0x11;
/// As many as there is room for: a list that is longer goes round.
const MOST_CAPABILITIES: usize = 48;

/// A device control register, from the capability on (PCI Express 4.0, section 7.5.3.4), and its bit that asks for a reset.
pub const DEVICE_CONTROL: usize = 8;
pub const RESET: u16 = 1 << 15;

/// What a guest sees.
pub struct Space {
    pub configuration: Configuration,
    pub bars: Vec<Bar>,
    pub msi: Option<Msi>,
    pub msix: Option<Msix>,
    /// Where the PCI Express capability is.
    pub express: Option<usize>,
}

/// Message-signalled interrupts (PCI 3.0, section 6.8.1).
pub struct Msi {
    pub at: usize,
    /// How many at most.
    pub messages: usize,
    /// Addresses of 64 bits.
    pub wide: bool,
    /// Each can be masked.
    pub masks: bool,
}

/// The same with a table (section 6.8.2).
pub struct Msix {
    pub at: usize,
    pub vectors: usize,
    pub table: Stretch,
    pub pending: Stretch,
}

/// The device's bytes.
struct Raw([u8; SIZE]);

impl Raw {
    fn byte(&self, offset: usize) -> u8 {
        self.0.get(offset).copied().unwrap_or(0)
    }

    fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.byte(offset), self.byte(offset + 1)])
    }

    fn double(&self, offset: usize) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    /// So many bytes; those beyond the end are left out.
    fn bytes(&self, offset: usize, length: usize) -> &[u8] {
        let end = offset.saturating_add(length).min(SIZE);
        self.0.get(offset..end).unwrap_or_default()
    }

    /// Offsets of the capabilities, in their order.
    fn capabilities(&self) -> Vec<usize> {
        let mut found: Vec<usize> = Vec::new();
        let mut next = if self.word(STATUS) & HAS_CAPABILITIES == 0 { 0 } else { self.byte(FIRST) };
        while next >= 0x40 && found.len() < MOST_CAPABILITIES {
            let at = usize::from(next & !3);
            if found.contains(&at) {
                break;
            }
            found.push(at);
            next = self.byte(at + 1);
        }
        found
    }
}

impl Space {
    /// Reads a device, and gives its BARs their first addresses: `place` says where there is room for one.
    pub fn of(
        device: &dyn Lent,
        mut place: impl FnMut(&Bar) -> Result<u64, PciError>,
    ) -> Result<Space, PciError> {
        let mut raw = Raw([0; SIZE]);
        for (offset, four) in (0..).step_by(4).zip(raw.0.chunks_mut(4)) {
            device.read(Place::Configuration, offset, four).map_err(PassedError::Read)?;
        }
        if raw.byte(HEADER_TYPE) & 0x7f != 0 {
            return Err(PassedError::Header { kind: raw.byte(HEADER_TYPE) & 0x7f }.into());
        }
        let mut configuration = Configuration::new(Identity {
            vendor: raw.word(0),
            device: raw.word(2),
            class: raw.double(CLASS - 1) >> 8,
            revision: raw.byte(CLASS - 1),
            subsystem: (raw.word(SUBSYSTEM), raw.word(SUBSYSTEM + 2)),
        });
        let bars = bars(device, &raw)?;
        for bar in &bars {
            configuration.set_bar(*bar, place(bar)?);
        }
        let mut space = Space { configuration, bars, msi: None, msix: None, express: None };
        let mut taken = Vec::new();
        for at in raw.capabilities() {
            let Some(body) = space.capability(&raw, device, at)? else { continue };
            let length = 2 + body.bytes.len();
            let overlaps = |(other, size): &(usize, usize)| *other < at + length && at < other + size;
            if taken.iter().any(overlaps) {
                return Err(PassedError::capability(at, "it overlaps with another").into());
            }
            space
                .configuration
                .put_capability(at, body.id, &body.bytes, &body.writable)
                .map_err(|_| PassedError::capability(at, "it ends behind the configuration space"))?;
            taken.push((at, length));
        }
        if space.msi.is_none() && space.msix.is_none() {
            return Err(PassedError::NoMessages.into());
        }
        Ok(space)
    }

    /// What the guest sees of a capability; `None` where it sees nothing of it.
    fn capability(
        &mut self,
        raw: &Raw,
        device: &dyn Lent,
        at: usize,
    ) -> Result<Option<Capability>, PassedError> {
        let id = raw.byte(at);
        let seen = match id {
            POWER => power(raw, at),
            MSI if self.msi.is_none() => {
                let (msi, seen) = msi(raw, device, at)?;
                self.msi = Some(msi);
                seen
            }
            MSIX if self.msix.is_none() => {
                let (msix, seen) = msix(raw, device, &self.bars, at)?;
                self.msix = Some(msix);
                seen
            }
            EXPRESS if self.express.is_none() => {
                self.express = Some(at);
                express(raw, at)
            }
            VENDOR => {
                let length = usize::from(raw.byte(at + 2)).max(3);
                Capability { id, bytes: raw.bytes(at + 2, length - 2).to_vec(), writable: Vec::new() }
            }
            _ => return Ok(None),
        };
        Ok(Some(seen))
    }
}

/// A capability as a guest sees it, from behind its link on.
struct Capability {
    id: u8,
    bytes: Vec<u8>,
    writable: Vec<u8>,
}

impl Capability {
    /// So many bytes of the device's, of which none can be written.
    fn of(raw: &Raw, at: usize, length: usize) -> Capability {
        let bytes = raw.bytes(at + 2, length - 2).to_vec();
        let writable = vec![0; bytes.len()];
        Capability { id: raw.byte(at), bytes, writable }
    }

    /// Sets bytes, at an offset from the capability's begin on.
    fn set(&mut self, offset: usize, bytes: &[u8]) {
        if let Some(to) = self.bytes.get_mut(offset - 2..offset - 2 + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    }

    /// Lets a guest write these bits.
    fn open(&mut self, offset: usize, mask: &[u8]) {
        if let Some(to) = self.writable.get_mut(offset - 2..offset - 2 + mask.len()) {
            to.copy_from_slice(mask);
        }
    }
}

/// Memory BARs, by what the registers say of their kinds, and the host's kernel of their sizes.
fn bars(device: &dyn Lent, raw: &Raw) -> Result<Vec<Bar>, PassedError> {
    let mut bars = Vec::new();
    let mut register = 0;
    while register < 6 {
        let value = raw.double(BARS + 4 * register);
        let size = device.region(register).size;
        let wide = value & 7 == 4;
        if value & 1 == 0 && size > 0 {
            let least = if wide && register == 5 { u64::MAX } else { 16 };
            let most = if wide { 1 << 46 } else { 1 << 31 };
            if !size.is_power_of_two() || !(least..=most).contains(&size) {
                return Err(PassedError::Bar { register, size });
            }
            bars.push(Bar { register, size, wide, prefetchable: value & 8 != 0 });
        }
        register += if wide { 2 } else { 1 };
    }
    if bars.is_empty() {
        return Err(PassedError::NoMemory);
    }
    Ok(bars)
}

/// Power management (PCI Power Management 1.2, section 3.2): states are the guest's to remember, and the device keeps what it has.
fn power(raw: &Raw, at: usize) -> Capability {
    const VERSION: u16 = 7;
    const NO_SOFT_RESET: u16 = 1 << 3;
    const STATE: u16 = 3;
    let mut seen = Capability::of(raw, at, 8);
    seen.set(2, &(raw.word(at + 2) & VERSION).to_le_bytes());
    seen.set(4, &NO_SOFT_RESET.to_le_bytes());
    seen.set(6, &[0, 0]);
    seen.open(4, &STATE.to_le_bytes());
    seen
}

fn msi(raw: &Raw, device: &dyn Lent, at: usize) -> Result<(Msi, Capability), PassedError> {
    const WIDE: u16 = 1 << 7;
    const MASKS: u16 = 1 << 8;
    const MOST: u16 = 7 << 1;
    let control = raw.word(at + 2);
    let (wide, masks) = (control & WIDE != 0, control & MASKS != 0);
    let messages = 1_usize << (control >> 1 & 7);
    if messages > 32 || device.messages() < messages {
        return Err(PassedError::capability(at, "its number of messages is not the host's"));
    }
    let msi = Msi { at, messages, wide, masks };
    let length = if masks { msi.mask() + 8 } else { msi.data() + 2 };
    let mut seen = Capability::of(raw, at, length);
    seen.bytes.fill(0);
    seen.set(2, &(control & (WIDE | MASKS | MOST)).to_le_bytes());
    seen.open(2, &[0x71, 0]);
    seen.open(4, &[0xfc, 0xff, 0xff, 0xff]);
    if wide {
        seen.open(8, &[0xff; 4]);
    }
    seen.open(msi.data(), &[0xff; 2]);
    if masks {
        seen.open(msi.mask(), &[0xff; 4]);
    }
    Ok((msi, seen))
}

impl Msi {
    /// Offset of what is written, from the capability on.
    pub fn data(&self) -> usize {
        if self.wide { 12 } else { 8 }
    }

    /// Offset of the bits that mask messages.
    pub fn mask(&self) -> usize {
        self.data() + 4
    }
}

fn msix(raw: &Raw, device: &dyn Lent, bars: &[Bar], at: usize) -> Result<(Msix, Capability), PassedError> {
    const COUNT: u16 = 0x7ff;
    let vectors = usize::from(raw.word(at + 2) & COUNT) + 1;
    if device.vectors() < vectors {
        return Err(PassedError::capability(at, "its number of vectors is not the host's"));
    }
    let stretch = |field: usize, length: usize| {
        let value = raw.double(at + field);
        let (register, offset) = (usize::try_from(value & 7).unwrap_or(7), u64::from(value & !7));
        let length = u64::try_from(length).unwrap_or(u64::MAX);
        let within = |bar: &&Bar| bar.register == register && offset.saturating_add(length) <= bar.size;
        match bars.iter().find(within) {
            Some(_) => Ok(Stretch { register, offset, length }),
            None => Err(PassedError::capability(at, "its table is not in a BAR")),
        }
    };
    let table = stretch(4, vectors * ENTRY)?;
    let pending = stretch(8, vectors.div_ceil(64) * 8)?;
    if table.overlaps(&pending) {
        return Err(PassedError::capability(at, "its table and its pending bits overlap"));
    }
    let mut seen = Capability::of(raw, at, 12);
    seen.set(2, &(raw.word(at + 2) & COUNT).to_le_bytes());
    seen.open(2, &[0, 0xc0]);
    Ok((Msix { at, vectors, table, pending }, seen))
}

/// PCI Express (4.0, section 7.5.3).
fn express(raw: &Raw, at: usize) -> Capability {
    const VERSION: u16 = 0xf;
    const INTEGRATED: u16 = 9 << 4;
    /// Largest packet, and that it can be reset.
    const KEPT: u32 = 7 | 1 << 28;
    const CONTROL_2: usize = 0x28;
    let version = raw.word(at + 2) & VERSION;
    let length = if version >= 2 { 0x3c } else { 0x14 };
    let mut seen = Capability::of(raw, at, length);
    seen.bytes.fill(0);
    seen.set(2, &(version | INTEGRATED).to_le_bytes());
    seen.set(4, &(raw.double(at + 4) & KEPT).to_le_bytes());
    seen.set(DEVICE_CONTROL, raw.bytes(at + DEVICE_CONTROL, 2));
    seen.open(DEVICE_CONTROL, &(!RESET).to_le_bytes());
    if version >= 2 {
        seen.open(CONTROL_2, &[0xff; 2]);
    }
    seen
}
