//! A device of the host that is none: it writes down what is done to it, and ends the test where a rule is broken.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    dead_code,
    reason = "only tests and fuzz targets have it, each a part of it"
)]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::{Lent, Messages, PAGE, Place, Region};

/// Offsets of its capabilities.
pub const POWER: u8 = 0x40;
pub const MSI: u8 = 0x50;
pub const EXPRESS: u8 = 0x70;
pub const MSIX: u8 = 0xb0;
/// Its BAR of 64 bits: registers, and from here on the MSI-X table and the pending bits.
pub const BAR: u64 = 0x4000;
pub const TABLE: u64 = 0x2000;
pub const PENDING: u64 = 0x2800;
/// Its vectors, and messages.
pub const VECTORS: usize = 5;
pub const MESSAGES: usize = 4;
/// Its second BAR, of 32 bits and less than a page, and its third, of I/O.
pub const SMALL: u64 = 0x200;

/// What was done to it, and what it holds.
#[derive(Default)]
pub struct Seen {
    /// Address to BAR, offset and bytes.
    pub mapped: BTreeMap<u64, (usize, u64, u64)>,
    /// What it signals.
    pub connected: Option<(Messages, Vec<EventFd>)>,
    /// The command register.
    pub command: u16,
    /// Every other write to its configuration space.
    pub strays: Vec<u64>,
    /// How often it was reset.
    pub resets: usize,
    /// What its BARs hold, by register and offset.
    pub written: BTreeMap<(usize, u64), Vec<u8>>,
    /// It was given back.
    pub gone: bool,
    /// It refuses interrupts.
    pub refuses: bool,
}

/// Kept by the test.
pub type Observer = Arc<Mutex<Seen>>;

/// What it did so far.
pub fn look(observer: &Observer) -> MutexGuard<'_, Seen> {
    observer.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct Fake {
    pub space: [u8; 256],
    pub regions: [Region; 6],
    pub messages: usize,
    pub vectors: usize,
    seen: Observer,
}

impl Fake {
    /// A drive: 8086:5845, a BAR of 64 bits with everything in it, a small one and one of I/O, five capabilities that a guest knows
    /// and two that it does not.
    pub fn drive() -> (Box<Fake>, Observer) {
        let seen = Observer::default();
        let mut space = [0; 256];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0x86, 0x80, 0x45, 0x58, 0, 0, 0x10, 0, 2, 2, 8, 1]);
        put(0x10, &[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfe, 1, 0xc0, 0, 0]);
        put(0x2c, &[0xf4, 0x1a, 0, 0x11]);
        put(0x34, &[POWER]);
        // Interrupt line and pin.
        put(0x3c, &[11, 1]);
        put(POWER.into(), &[0x01, MSI, 0x03, 0xc8, 0, 0, 0, 0]);
        // 64 bits, masks, four messages.
        put(MSI.into(), &[0x05, EXPRESS, 0x84, 0x01]);
        // Version 2, endpoint; packets of 256 bytes, can be reset; link of some speed.
        put(EXPRESS.into(), &[0x10, MSIX, 0x02, 0, 0x21, 0x80, 0, 0x10, 0x10, 0x28, 0, 0, 0x41]);
        put(MSIX.into(), &[0x11, 0xd0, 4, 0, 0, 0x20, 0, 0, 0, 0x28, 0, 0]);
        // VPD, and one of the vendor's own.
        put(0xd0, &[0x03, 0xe0, 0, 0, 0xaa, 0xbb, 0xcc, 0xdd]);
        put(0xe0, &[0x09, 0, 6, 1, 2, 3]);
        let mut regions: [Region; 6] = Default::default();
        regions[0] = Region { size: BAR, direct: vec![(0, BAR)] };
        regions[2] = Region { size: SMALL, direct: Vec::new() };
        regions[3] = Region { size: 0x40, direct: Vec::new() };
        let fake = Fake { space, regions, messages: MESSAGES, vectors: VECTORS, seen: seen.clone() };
        (Box::new(fake), seen)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        look(&self.seen)
    }

    fn check(&self, register: usize, offset: u64, bytes: u64) {
        let region = &self.regions[register];
        assert!(bytes > 0 && offset + bytes <= region.size, "{bytes} bytes at {offset:#x} of BAR {register}");
    }
}

impl Lent for Fake {
    fn region(&self, register: usize) -> Region {
        self.regions[register].clone()
    }

    fn messages(&self) -> usize {
        self.messages
    }

    fn vectors(&self) -> usize {
        self.vectors
    }

    fn read(&self, place: Place, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(offset).expect("an offset");
        match place {
            Place::Configuration => into.copy_from_slice(&self.space[at..at + into.len()]),
            Place::Bar(register) => {
                self.check(register, offset, into.len() as u64);
                into.fill(0);
                if let Some(written) = self.seen().written.get(&(register, offset)) {
                    let length = into.len().min(written.len());
                    into[..length].copy_from_slice(&written[..length]);
                }
            }
        }
        Ok(())
    }

    fn write(&self, place: Place, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut seen = self.seen();
        match (place, data) {
            (Place::Configuration, [low, high]) if offset == 4 => {
                seen.command = u16::from_le_bytes([*low, *high]);
            }
            (Place::Configuration, _) => seen.strays.push(offset),
            (Place::Bar(register), _) => {
                self.check(register, offset, data.len() as u64);
                seen.written.insert((register, offset), data.to_vec());
            }
        }
        Ok(())
    }

    fn connect(&self, messages: Messages, events: &[EventFd]) -> io::Result<()> {
        let mut seen = self.seen();
        let most = if messages == Messages::Msi { self.messages } else { self.vectors };
        assert!(events.len() <= most, "{} descriptors for {most}", events.len());
        match &seen.connected {
            Some((before, _)) if events.is_empty() => {
                assert_eq!(*before, messages, "others are switched off")
            }
            Some(_) => panic!("two kinds of interrupts at once"),
            None => {}
        }
        seen.connected = None;
        if seen.refuses && !events.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        if !events.is_empty() {
            let copies = events.iter().map(|event| event.try_clone().expect("a descriptor"));
            seen.connected = Some((messages, copies.collect()));
        }
        Ok(())
    }

    fn map(&self, register: usize, offset: u64, bytes: u64, address: u64) -> io::Result<()> {
        self.check(register, offset, bytes);
        assert!([offset, bytes, address].iter().all(|number| number.is_multiple_of(PAGE)), "no pages");
        let allowed = |(first, length): &(u64, u64)| *first <= offset && offset + bytes <= first + length;
        assert!(self.regions[register].direct.iter().any(allowed), "{offset:#x} cannot be mapped");
        let mut seen = self.seen();
        let overlaps = |(other, (_, _, size)): (&u64, &(usize, u64, u64))| {
            *other < address + bytes && address < other + size
        };
        assert!(!seen.mapped.iter().any(overlaps), "{address:#x} is mapped already");
        seen.mapped.insert(address, (register, offset, bytes));
        Ok(())
    }

    fn unmap(&self, address: u64) {
        assert!(self.seen().mapped.remove(&address).is_some(), "{address:#x} is not mapped");
    }

    fn reset(&self) -> io::Result<()> {
        let mut seen = self.seen();
        assert!(seen.connected.is_none(), "a reset while it interrupts");
        seen.resets += 1;
        seen.command = 0;
        Ok(())
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let mut seen = self.seen();
        assert!(seen.mapped.is_empty(), "given back while mapped");
        seen.gone = true;
    }
}
