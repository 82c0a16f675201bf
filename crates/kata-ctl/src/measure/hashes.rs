//! What QEMU tells the firmware of the kernel, the initrd and the command line, byte for byte as it does (target/i386/sev.c): the
//! firmware boots nothing else.

use sha2::{Digest, Sha256};

use super::PAGE;
use super::firmware::guid;

const TABLE: [u8; 16] = guid(0x9438_d606_4f22_4cc9_b479_a793_d411_fd21);
const KERNEL: [u8; 16] = guid(0x4de7_9437_abd2_427f_b835_d5b1_72d2_045b);
const INITRD: [u8; 16] = guid(0x44ba_f731_3a2f_4bd7_9af1_41e2_9169_781d);
const COMMAND_LINE: [u8; 16] = guid(0x97d0_2dd8_bd20_4c94_aa78_e771_4d36_ab2a);
/// Bytes of a GUID and the length behind it.
const HEAD: usize = 18;
/// Bytes of an entry.
const ENTRY: usize = HEAD + 32;
/// Bytes of the table, and with what fills it up.
const LENGTH: usize = HEAD + 3 * ENTRY;
const PADDED: usize = LENGTH.next_multiple_of(16);

/// SHA-256 of what a machine boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hashes {
    kernel: [u8; 32],
    initrd: [u8; 32],
    command_line: [u8; 32],
}

impl Hashes {
    /// Of the files' bytes, no initrd being an empty one, and the command line's text.
    pub fn of(kernel: &[u8], initrd: &[u8], command_line: &str) -> Self {
        // The firmware is given the byte that ends the text.
        let command_line = [command_line.as_bytes(), b"\0"].concat();
        Self {
            kernel: Sha256::digest(kernel).into(),
            initrd: Sha256::digest(initrd).into(),
            command_line: Sha256::digest(command_line).into(),
        }
    }

    fn table(&self) -> Vec<u8> {
        let mut table = Vec::with_capacity(PADDED);
        let head = |table: &mut Vec<u8>, guid: [u8; 16], length: usize| {
            table.extend_from_slice(&guid);
            table.extend_from_slice(&u16::try_from(length).unwrap_or_default().to_le_bytes());
        };
        head(&mut table, TABLE, LENGTH);
        for (guid, hash) in [(COMMAND_LINE, self.command_line), (INITRD, self.initrd), (KERNEL, self.kernel)]
        {
            head(&mut table, guid, ENTRY);
            table.extend_from_slice(&hash);
        }
        table.resize(PADDED, 0);
        table
    }

    /// The page that has the table at `place`; `None` where it does not fit.
    pub(super) fn page(&self, place: usize) -> Option<Vec<u8>> {
        let table = self.table();
        let mut page = vec![0; PAGE];
        page.get_mut(place..)?.get_mut(..table.len())?.copy_from_slice(&table);
        Some(page)
    }
}

/// Whether QEMU tells the firmware of this kernel: of a bare ELF it does not (Linux, x86 boot protocol, "HdrS" at 0x202).
pub fn is_bz_image(kernel: &[u8]) -> bool {
    kernel.get(0x202..0x206) == Some(b"HdrS")
}
