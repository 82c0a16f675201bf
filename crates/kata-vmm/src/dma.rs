//! What of the guest's memory a device of the host reaches by itself (DMA), and what follows for all who give memory back.
//!
//! ```text
//!   device of the host comes ──▶ Dma::enter ─▶ all RAM, and what virtio-mem has plugged ─▶ mapped in its Domain, and pinned by the host
//!   virtio-mem ─ plug, unplug ─▶ the same blocks are mapped and unmapped
//!   balloon ─ discard ─────────▶ nothing, while there is such a device
//!   the last one goes ─────────▶ all of it is unmapped
//! ```
//!
//! A page that a device reaches must stay the guest's: were it given back to the host, the guest would get another one in its place,
//! and the device go on with the old one.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use thiserror::Error;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::memory;
use crate::virtio::Memory;
use crate::virtio::mem::BLOCK;

/// Where devices reach memory: an IOMMU's table. A range is unmapped as it was mapped.
pub trait Domain: Send + Sync {
    /// Lets them reach `bytes` of this process from the address `host` on, at the guest's address.
    fn map(&self, guest: u64, host: u64, bytes: u64) -> io::Result<()>;

    /// Ends that.
    fn unmap(&self, guest: u64, bytes: u64) -> io::Result<()>;
}

/// Why a device does not reach the guest's memory.
#[derive(Debug, Error)]
#[error(
    "{bytes:#x} bytes of guest memory at {guest:#x} cannot be reached by devices of the host{}",
    hint(.source)
)]
pub struct DmaError {
    /// First address.
    pub guest: u64,
    /// Bytes.
    pub bytes: u64,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// What to do about the usual reasons.
fn hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOMEM) => "; is RLIMIT_MEMLOCK at least the most memory that the guest can have?",
        Some(libc::ENOSPC) => "; the host's IOMMU takes no more ranges (vfio_iommu_type1.dma_entry_limit)",
        Some(libc::EINVAL | libc::ERANGE) => "; does the host's IOMMU reserve some of these addresses?",
        _ => "",
    }
}

/// Who reaches the guest's memory; a handle.
#[derive(Clone)]
pub struct Dma(Arc<RwLock<Reached>>);

struct Reached {
    memory: Memory,
    /// Blocks of later memory that the guest has.
    plugged: BTreeSet<u64>,
    domain: Option<Arc<dyn Domain>>,
    devices: usize,
}

/// One device that reaches the memory. Dropped, it does no more.
pub struct Reach(Dma);

impl Dma {
    /// Nobody, yet.
    pub fn new(memory: Memory) -> Dma {
        let reached = Reached { memory, plugged: BTreeSet::new(), domain: None, devices: 0 };
        Dma(Arc::new(RwLock::new(reached)))
    }

    /// Lets one more device reach the memory, in the domain of all others.
    pub fn enter(&self, domain: Arc<dyn Domain>) -> Result<Reach, DmaError> {
        let mut reached = self.write();
        if reached.devices == 0 {
            map_all(&*domain, &reached.ranges())?;
            reached.domain = Some(domain);
        }
        reached.devices += 1;
        drop(reached);
        Ok(Reach(self.clone()))
    }

    /// The guest is about to have these blocks of later memory; on an error it must not.
    pub fn plug(&self, address: u64, blocks: u64) -> Result<(), DmaError> {
        let mut reached = self.write();
        let addresses = (0..blocks).map(|block| address.saturating_add(block * BLOCK));
        if let Some(domain) = &reached.domain {
            let memory = reached.memory.memory();
            let ranges: Vec<_> =
                addresses.clone().filter_map(|address| range(&memory, address, BLOCK)).collect();
            map_all(&**domain, &ranges)?;
        }
        reached.plugged.extend(addresses);
        Ok(())
    }

    /// The guest has given up these bytes of later memory, of which nothing may be given back to the host before.
    pub fn unplug(&self, address: u64, bytes: u64) {
        let mut reached = self.write();
        let gone: Vec<u64> = reached.plugged.range(address..address.saturating_add(bytes)).copied().collect();
        for block in gone {
            reached.plugged.remove(&block);
            if let Some(domain) = &reached.domain {
                unmap(&**domain, block, BLOCK);
            }
        }
    }

    /// Gives memory back to the host that the guest can have again at any time, if no device reaches it. False where one does.
    pub fn discard(&self, give_back: impl FnOnce()) -> bool {
        let reached = self.read();
        let free = reached.devices == 0;
        if free {
            give_back();
        }
        free
    }

    fn read(&self) -> RwLockReadGuard<'_, Reached> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Reached> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reach {
    fn drop(&mut self) {
        let mut reached = self.0.write();
        reached.devices = reached.devices.saturating_sub(1);
        if reached.devices > 0 {
            return;
        }
        if let Some(domain) = reached.domain.take() {
            for (guest, _, bytes) in reached.ranges() {
                unmap(&*domain, guest, bytes);
            }
        }
    }
}

/// Guest address, address here, bytes.
type Range = (u64, u64, u64);

impl Reached {
    /// All that is to be reached now.
    fn ranges(&self) -> Vec<Range> {
        let memory = self.memory.memory();
        let ram = memory.iter().filter(|region| memory::is_ram(region));
        let ram = ram.filter_map(|region| range(&memory, region.start_addr().0, region.len()));
        let blocks = self.plugged.iter().filter_map(|block| range(&memory, *block, BLOCK));
        ram.chain(blocks).collect()
    }
}

fn range(memory: &GuestMemoryMmap, guest: u64, bytes: u64) -> Option<Range> {
    let host = memory.get_host_address(GuestAddress(guest)).ok()?;
    Some((guest, host as u64, bytes))
}

/// All of them or none.
fn map_all(domain: &dyn Domain, ranges: &[Range]) -> Result<(), DmaError> {
    for (done, (guest, host, bytes)) in ranges.iter().copied().enumerate() {
        if let Err(source) = domain.map(guest, host, bytes) {
            ranges.iter().take(done).for_each(|(guest, _, bytes)| unmap(domain, *guest, *bytes));
            return Err(DmaError { guest, bytes, source });
        }
    }
    Ok(())
}

fn unmap(domain: &dyn Domain, guest: u64, bytes: u64) {
    if let Err(error) = domain.unmap(guest, bytes) {
        tracing::error!(%error, guest, bytes, "devices of the host still reach memory that they should not");
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;

    /// A domain that writes down what is in it.
    #[derive(Default)]
    pub struct Table {
        /// Bytes, by the guest's address.
        pub mapped: Mutex<BTreeMap<u64, u64>>,
        /// How many it takes.
        pub most: Option<usize>,
    }

    impl Domain for Table {
        fn map(&self, guest: u64, _host: u64, bytes: u64) -> io::Result<()> {
            let mut mapped = self.mapped.lock().unwrap();
            if self.most.is_some_and(|most| mapped.len() >= most) {
                return Err(io::Error::from_raw_os_error(libc::ENOMEM));
            }
            assert_eq!(mapped.insert(guest, bytes), None, "{guest:#x} is mapped twice");
            Ok(())
        }

        fn unmap(&self, guest: u64, bytes: u64) -> io::Result<()> {
            assert_eq!(
                self.mapped.lock().unwrap().remove(&guest),
                Some(bytes),
                "{guest:#x} is not mapped so"
            );
            Ok(())
        }
    }

    const RAM: u64 = 64 << 20;

    fn dma() -> (Dma, u64) {
        let memory = memory::allocate(RAM, 64 << 20, memory::Backing::default()).unwrap();
        let (base, _) = memory::growth(&memory.memory()).unwrap();
        (Dma::new(memory), base)
    }

    fn mapped(table: &Table) -> Vec<(u64, u64)> {
        table.mapped.lock().unwrap().clone().into_iter().collect()
    }

    #[test]
    fn device_reaches_all_memory_and_what_comes_and_goes_while_it_is_there() {
        let (dma, base) = dma();
        dma.plug(base, 2).unwrap();
        let table = Arc::new(Table::default());
        let reach = dma.enter(table.clone()).unwrap();
        assert_eq!(mapped(&table), [(0, RAM), (base, BLOCK), (base + BLOCK, BLOCK)]);
        dma.plug(base + 4 * BLOCK, 1).unwrap();
        dma.unplug(base + BLOCK, BLOCK);
        assert_eq!(mapped(&table), [(0, RAM), (base, BLOCK), (base + 4 * BLOCK, BLOCK)]);
        let other = dma.enter(table.clone()).unwrap();
        drop(reach);
        assert_eq!(mapped(&table).len(), 3, "the other one is still there");
        dma.unplug(base, 64 << 20);
        drop(other);
        assert_eq!(mapped(&table), []);
        dma.plug(base, 1).unwrap();
        assert_eq!(mapped(&table), []);
    }

    #[test]
    fn nothing_is_given_back_while_a_device_reaches_memory() {
        let (dma, _) = dma();
        let mut given = 0;
        assert!(dma.discard(|| given += 1));
        let reach = dma.enter(Arc::new(Table::default())).unwrap();
        assert!(!dma.discard(|| given += 1));
        drop(reach);
        assert!(dma.discard(|| given += 1));
        assert_eq!(given, 2);
    }

    #[test]
    fn device_that_cannot_reach_all_of_it_reaches_none_and_the_guest_gets_no_block_more() {
        let (dma, base) = dma();
        dma.plug(base, 3).unwrap();
        let table = Arc::new(Table { most: Some(2), ..Table::default() });
        let error = dma.enter(table.clone()).err().unwrap();
        assert!(error.to_string().contains("RLIMIT_MEMLOCK"), "{error}");
        assert_eq!(mapped(&table), []);
        assert!(dma.discard(|| ()), "it did not come");

        let table = Arc::new(Table { most: Some(5), ..Table::default() });
        let _reach = dma.enter(table.clone()).unwrap();
        assert_eq!(dma.plug(base + 8 * BLOCK, 2).unwrap_err().guest, base + 9 * BLOCK);
        assert_eq!(mapped(&table).len(), 4);
        dma.plug(base + 8 * BLOCK, 1).unwrap();
    }
}
