//! What the hardware says of a guest: who asks for it, and who looks into it.
//!
//! ```text
//!   guest:  Hardware::of ── what the kernel has of the processor
//!           ask ── /sys/kernel/config/tsm/report ── the kernel ── firmware ──▶ Evidence
//!           host_data ── what the machine was started with, from where the host has no say
//!   anybody: Fields::of ── where in a report things are
//! ```
//!
//! Nothing here verifies a signature: that is for whoever has to trust the guest, with the keys of the hardware's maker.

mod ask;
mod fields;
mod host_data;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

pub use ask::{DATA_MAX, Evidence, EvidenceError, REPORTS, ask};
pub use fields::Fields;
pub use host_data::{HostDataError, host_data};

/// What protects the guest cannot be told.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}, so what protects the guest is not known", path = .path.display())]
pub struct HardwareError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

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

    /// What the guest whose root is `root` runs under. The host can neither hide nor feign it:
    ///
    /// - Linux makes the device `sev-guest` where the register `SEV_STATUS` says SEV-SNP, which no hypervisor gets to answer for. The
    ///   flag `sev_snp` of `/proc/cpuinfo` is that of a host which starts such guests; Linux takes it from every guest.
    /// - It sets the flag `tdx_guest` where leaf 0x21 of CPUID says TDX, which is answered by the TDX module.
    ///
    /// # Errors
    /// `/sys` or `/proc` of it cannot be read, so that nobody knows.
    pub fn of(root: &Path) -> Result<Option<Self>, HardwareError> {
        let of = |path: &Path| {
            let path = path.to_owned();
            move |source| HardwareError { path, source }
        };
        let devices = root.join("sys/devices/platform");
        // Every machine has the directory: a guest where it is not there has no sysfs, and is not an ordinary one for that.
        devices.metadata().map_err(of(&devices))?;
        let device = devices.join("sev-guest");
        if device.try_exists().map_err(of(&device))? {
            return Ok(Some(Self::Snp));
        }
        let cpuinfo = root.join("proc/cpuinfo");
        let text = std::fs::read_to_string(&cpuinfo).map_err(of(&cpuinfo))?;
        let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        Ok(flags.split_whitespace().any(|flag| flag == "tdx_guest").then_some(Self::Tdx))
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

#[cfg(test)]
mod tests;
