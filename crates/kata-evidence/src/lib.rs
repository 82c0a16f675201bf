//! What the hardware says of a guest: who asks for it, and who looks into it.
//!
//! ```text
//!   guest:  Hardware::of ── what the processor says
//!           ask ── /sys/kernel/config/tsm/report ── the kernel ── firmware ──▶ Evidence
//!   anybody: Fields::of ── where in a report things are
//! ```
//!
//! Nothing here verifies a signature: that is for whoever has to trust the guest, with the keys of the hardware's maker.

mod ask;
mod fields;

use std::fmt;
use std::io;
use std::path::Path;

pub use ask::{DATA_MAX, Evidence, EvidenceError, REPORTS, ask};
pub use fields::Fields;

/// What protects a guest from its host, and can say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hardware {
    /// AMD's SEV-SNP.
    Snp,
    /// Intel's TDX.
    Tdx,
}

impl Hardware {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Snp, Self::Tdx];

    /// What the guest whose root is `root` runs under. The processor tells its kernel, and the host cannot hide it.
    ///
    /// # Errors
    /// `proc/cpuinfo` cannot be read.
    pub fn of(root: &Path) -> io::Result<Option<Self>> {
        let text = std::fs::read_to_string(root.join("proc/cpuinfo"))?;
        let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        Ok(Self::ALL.into_iter().find(|it| flags.split_whitespace().any(|flag| flag == it.flag())))
    }

    fn flag(self) -> &'static str {
        match self {
            Self::Snp => "sev_snp",
            Self::Tdx => "tdx_guest",
        }
    }

    /// What the kernel calls whoever makes its reports, which is the name of the module, too.
    pub fn provider(self) -> &'static str {
        match self {
            Self::Snp => "sev_guest",
            Self::Tdx => "tdx_guest",
        }
    }
}

impl fmt::Display for Hardware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Snp => "SEV-SNP",
            Self::Tdx => "TDX",
        })
    }
}
