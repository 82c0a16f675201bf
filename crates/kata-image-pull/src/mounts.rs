//! What is mounted (proc_pid_mountinfo(5)), as far as overlays and mount points matter here.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The mounts of this process' namespace, at one moment.
pub struct Mounts {
    /// Mount point and source.
    all: Vec<(PathBuf, String)>,
}

impl Mounts {
    /// Those of now.
    ///
    /// # Errors
    /// The kernel's list cannot be read.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read("/proc/self/mountinfo")?))
    }

    fn parse(text: &[u8]) -> Self {
        let mount = |line: &[u8]| {
            let mut fields = line.split(|byte| *byte == b' ');
            let point = PathBuf::from(OsString::from_vec(unescape(fields.nth(4)?)));
            // Optional fields end with a dash; type and source follow.
            fields.by_ref().find(|field| *field == b"-")?;
            let source = String::from_utf8_lossy(fields.nth(1)?).into_owned();
            Some((point, source))
        };
        Self { all: text.split(|byte| *byte == b'\n').filter_map(mount).collect() }
    }

    /// Whether something is mounted at `path`, which is written without links.
    pub fn at(&self, path: &Path) -> bool {
        self.all.iter().any(|(point, _)| point == path)
    }

    /// Whether a mount has `source`.
    pub fn from(&self, source: &str) -> bool {
        self.all.iter().any(|(_, other)| other == source)
    }
}

/// Spaces and the like are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = |digits: &[u8; 3]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok();
        match after.first_chunk::<3>().and_then(octal) {
            Some(byte) if *first == b'\\' => {
                plain.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_and_sources_are_found_whatever_is_in_between() {
        let text = b"22 1 0:20 / /proc rw - proc proc rw\n\
            36 35 98:0 /m /mnt/with\\040space rw,noatime shared:1 master:2 - overlay image-1 rw,lowerdir=0\n\
            \nbroken line\n";
        let mounts = Mounts::parse(text);
        assert!(mounts.at(Path::new("/mnt/with space")) && mounts.at(Path::new("/proc")));
        assert!(mounts.from("image-1") && mounts.from("proc"));
        assert!(!mounts.at(Path::new("/mnt")) && !mounts.from("image"));
    }

    #[test]
    fn the_kernels_list_has_the_root() {
        assert!(Mounts::read().unwrap().at(Path::new("/")));
    }
}
