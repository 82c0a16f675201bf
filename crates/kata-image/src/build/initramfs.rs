//! The initial RAM file system: a program as `/init`, the modules that it loads, two device nodes, and the directories that
//! it mounts on. In the lean image that program is the agent, and this is all of the root; in the services image it is what
//! leads to the root on a disk.
//!
//! ```text
//! /init                      the agent, or the boot layer
//! /dev/console, /dev/null    the kernel opens the former as the program's standard streams, before devtmpfs is mounted
//! /etc/…/modules             see [`super::modules`]
//! /lib/modules/<release>/…   the modules
//! /proc /sys /run /tmp …     mount points
//! ```

use super::cpio::{Archive, CpioError};
use super::modules::Plan;

/// Directories that programs and the agent take for granted.
const DIRECTORIES: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("etc", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var", 0o755),
];

/// What makes one initramfs another.
#[derive(Clone, Copy, Debug)]
pub struct Init<'a> {
    /// The program.
    pub program: &'a [u8],
    /// Where it looks for its list of modules.
    pub list: &'static str,
}

impl Init<'_> {
    /// Lays out the file system, with the modules of `plan`.
    pub fn archive(&self, plan: &Plan) -> Result<Archive, CpioError> {
        let mut archive = Archive::default();
        for (path, mode) in DIRECTORIES {
            archive.directory(path, *mode)?;
        }
        archive.char_device("dev/console", 0o600, 5, 1)?;
        archive.char_device("dev/null", 0o666, 1, 3)?;
        archive.file("init", 0o755, self.program.to_vec())?;
        archive.file(self.list, 0o644, plan.list().into_bytes())?;
        for module in plan.modules() {
            archive.file(&module.path, 0o644, module.data.clone())?;
        }
        Ok(archive)
    }
}
