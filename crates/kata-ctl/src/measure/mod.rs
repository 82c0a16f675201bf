//! What hardware will say of a machine that was started as it should be: the launch digest of SEV-SNP, MRTD of TDX.
//!
//! ```text
//!   SEV-SNP: firmware, page by page ─▶ sections that the firmware names ─▶ first state of each processor ─▶ 48 bytes
//!                                      (zeroes, secrets, CPUID, hashes of kernel, initrd and command line)
//!   TDX:     sections that the firmware names, page by page ─▶ 48 bytes
//! ```
//!
//! For SEV-SNP each page is chained to the digest so far as the hardware does it (SEV Secure Nested Paging Firmware ABI, 8.17.2, PAGE_INFO), in
//! the order in which QEMU hands the pages over. What the host may choose freely is in none of them: the host data, which the
//! report has beside the digest, and the ID block, which has to fit it.

mod firmware;
mod hashes;
mod processor;
mod tdx;

use sha2::{Digest as _, Sha384};

pub use firmware::{Firmware, FirmwareError};
pub use hashes::{Hashes, is_bz_image};
pub use processor::{MODELS, Model};
pub use tdx::mrtd;

use firmware::Kind;

/// Bytes of a page.
const PAGE: usize = 4096;
/// Bytes of a digest.
const SIZE: usize = 48;
/// Where the hardware says that a processor's state is, whatever its address: all ones, as far as addresses go.
const STATE_ADDRESS: u64 = 0xffff_ffff_f000;

/// Why there is no digest.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The firmware has no place for the hashes of what is booted.
    #[error(
        "the firmware has no place for hashes of kernel, initrd and command line: use OVMF that is built as AmdSev"
    )]
    NoHashes,
    /// The firmware does not say where further processors start.
    #[error("the firmware does not say where processors but the first start, and the machine has {0}")]
    NoReset(u32),
    /// A section that pages do not make.
    #[error("the firmware's section at {0:#x} is not made of whole pages")]
    Section(u32),
}

/// What a machine is started with.
#[derive(Debug)]
pub struct Machine {
    /// Its firmware.
    pub firmware: Firmware,
    /// Of what it boots.
    pub hashes: Hashes,
    /// How many processors it has.
    pub vcpus: u32,
    /// Their signature, see [`Model`].
    pub signature: u32,
}

/// The kinds of pages (SEV Secure Nested Paging Firmware ABI, 8.17.2, PAGE_TYPE).
#[derive(Clone, Copy)]
enum Page {
    Normal = 1,
    State = 2,
    Zero = 3,
    Secrets = 5,
    Cpuid = 6,
}

/// The digest of the pages so far.
struct Launch([u8; SIZE]);

impl Launch {
    fn add(&mut self, kind: Page, address: u64, contents: [u8; SIZE]) {
        /// Bytes of PAGE_INFO.
        const LENGTH: u16 = 0x70;
        let mut hash = Sha384::new();
        hash.update(self.0);
        hash.update(contents);
        hash.update(LENGTH.to_le_bytes());
        // No initial migration image, and no permissions of lower levels.
        hash.update([kind as u8, 0, 0, 0, 0, 0]);
        hash.update(address.to_le_bytes());
        self.0 = hash.finalize().into();
    }

    fn add_bytes(&mut self, kind: Page, address: u64, bytes: &[u8]) {
        for (address, page) in (address..).step_by(PAGE).zip(bytes.chunks(PAGE)) {
            self.add(kind, address, Sha384::digest(page).into());
        }
    }

    /// Pages whose contents the hardware does not look at.
    fn add_unread(&mut self, kind: Page, address: u64, size: usize) {
        for address in (address..).step_by(PAGE).take(size / PAGE) {
            self.add(kind, address, [0; SIZE]);
        }
    }
}

/// The digest with which the hardware would report the machine.
///
/// # Errors
/// [`MeasureError`].
pub fn launch_digest(machine: &Machine) -> Result<[u8; SIZE], MeasureError> {
    let Machine { firmware, hashes, vcpus, signature } = machine;
    let mut launch = Launch([0; SIZE]);
    launch.add_bytes(Page::Normal, firmware.address(), firmware.bytes());
    let mut has_hashes = false;
    for section in firmware.sections() {
        let (address, size) = (u64::from(section.address), section.size as usize);
        if size % PAGE != 0 || address % PAGE as u64 != 0 {
            return Err(MeasureError::Section(section.address));
        }
        match section.kind {
            Kind::Memory => launch.add_unread(Page::Zero, address, size),
            Kind::Secrets => launch.add_unread(Page::Secrets, address, PAGE),
            Kind::Cpuid => launch.add_unread(Page::Cpuid, address, PAGE),
            Kind::Hashes => {
                let place = firmware.hashes().ok_or(MeasureError::NoHashes)?;
                let page =
                    hashes.page(place as usize % PAGE).ok_or(MeasureError::Section(section.address))?;
                launch.add_bytes(Page::Normal, address, &page);
                has_hashes = true;
            }
        }
    }
    if !has_hashes {
        return Err(MeasureError::NoHashes);
    }
    let further = firmware.reset();
    for number in 0..*vcpus {
        let start = match (number, further) {
            (0, _) => processor::FIRST,
            (_, Some(start)) => start,
            (_, None) => return Err(MeasureError::NoReset(*vcpus)),
        };
        launch.add_bytes(Page::State, STATE_ADDRESS, &processor::state(start, *signature));
    }
    Ok(launch.0)
}

#[cfg(test)]
mod tests;
