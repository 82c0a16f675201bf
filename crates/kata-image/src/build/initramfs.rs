//! The lean root file system: the agent as `/init`, the modules that it loads, two device nodes, and the directories that
//! it mounts on. Nothing else runs in the guest, so nothing else is in it.
//!
//! ```text
//! /init                      the agent
//! /dev/console, /dev/null    the kernel opens the former as the agent's standard streams, before devtmpfs is mounted
//! /etc/kata-agent/modules    see [`super::modules`]
//! /lib/modules/<release>/…   the modules
//! /proc /sys /run /tmp …     mount points
//! ```

use super::cpio::{Archive, CpioError};
use super::modules::{LIST_PATH, Plan};

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

/// Lays out the root file system for `agent` (the program's bytes) and `plan`.
pub fn archive(agent: Vec<u8>, plan: &Plan) -> Result<Archive, CpioError> {
    let mut archive = Archive::default();
    for (path, mode) in DIRECTORIES {
        archive.directory(path, *mode)?;
    }
    archive.char_device("dev/console", 0o600, 5, 1)?;
    archive.char_device("dev/null", 0o666, 1, 3)?;
    archive.file("init", 0o755, agent)?;
    archive.file(LIST_PATH, 0o644, plan.list().into_bytes())?;
    for module in plan.modules() {
        archive.file(&module.path, 0o644, module.data.clone())?;
    }
    Ok(archive)
}
