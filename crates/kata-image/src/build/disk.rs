//! A directory tree as a disk whose every block is verified: erofs, and dm-verity's hash area behind it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use super::tool::{ToolError, run, run_both};
use super::verity;
use crate::manifest::Verity;

/// The file system, for `rootfstype=` and the like.
pub const FSTYPE: &str = "erofs";
const HINT: &str = "install erofs-utils";

/// Why a disk cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is no `mkfs.erofs`, or it does not do.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The disk cannot be read or written.
    #[error("cannot make the disk {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Which `mkfs.erofs` there is: another one may lay the same tree out in another way.
pub fn tool_version() -> Result<String, ToolError> {
    // Not all versions have an option that tells it alone, and some tell it among their errors.
    let (output, errors) = run_both(Command::new("mkfs.erofs").arg("--help"), HINT)?;
    Ok(output.lines().chain(errors.lines()).next().unwrap_or_default().to_owned())
}

/// Makes the disk `output` of the directory `tree`. Everything in it belongs to root and is as old as the epoch; the same
/// tree and the same `seed`, of which salt and UUIDs are made, give the same bytes.
pub fn make(tree: &Path, output: &Path, seed: &str) -> Result<Verity, DiskError> {
    let uuid = uuid(seed);
    let mut mkfs = Command::new("mkfs.erofs");
    // No extended attributes: what the machine that builds has of them means nothing in the guest.
    mkfs.args(["-T0", "-x-1", "--all-root", "--quiet", "-U"]).arg(text(&uuid));
    // An image that is there would be written into, and what is behind its new end stay.
    let _ = fs::remove_file(output);
    run(mkfs.arg(output).arg(tree), HINT)?;
    let hash = || -> io::Result<Verity> {
        let mut file = File::options().read(true).write(true).open(output)?;
        let verity = verity::append(&mut file, &digest("salt", seed), &uuid)?;
        file.sync_all()?;
        Ok(verity)
    };
    hash().map_err(|source| DiskError::File { path: output.to_owned(), source })
}

fn digest(what: &str, seed: &str) -> [u8; 32] {
    Sha256::digest(format!("{what} {seed}")).into()
}

/// Of version 8, made of the seed alone.
fn uuid(seed: &str) -> [u8; 16] {
    let [mut a, mut b] = [0; 2].map(|_: i32| [0; 8]);
    let digest = digest("uuid", seed);
    let (head, tail) = digest.split_at(8);
    a.iter_mut().zip(head).for_each(|(place, byte)| *place = *byte);
    b.iter_mut().zip(tail).for_each(|(place, byte)| *place = *byte);
    let number = u128::from(u64::from_be_bytes(a)) << 64 | u128::from(u64::from_be_bytes(b));
    let number = number & !(0xf << 76) & !(0x3 << 62) | 0x8 << 76 | 0x2 << 62;
    number.to_be_bytes()
}

fn text(uuid: &[u8; 16]) -> String {
    let digits = crate::manifest::hex(uuid);
    let part = |range| digits.get(range).unwrap_or_default();
    [part(0..8), part(8..12), part(12..16), part(16..20), part(20..32)].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuid_is_made_of_the_seed_and_of_the_right_kind() {
        let made = text(&uuid("a"));
        assert_eq!(made, text(&uuid("a")));
        assert_ne!(made, text(&uuid("b")));
        assert_eq!((made.len(), &made[14..15]), (36, "8"));
        assert!("89ab".contains(&made[19..20]), "{made}");
    }

    #[test]
    fn the_same_tree_gives_the_same_disk_wherever_and_whenever_it_is_made() {
        if tool_version().is_err() {
            eprintln!("skipped: no mkfs.erofs (Debian package erofs-utils)");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..40).map(|n| format!("sub{}/file{n}", n % 3)).collect();
        let tree = |name: &str, order: &mut dyn Iterator<Item = &String>| {
            let root = dir.path().join(name);
            for path in order {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(&path, path.strip_prefix(&root).unwrap().to_str().unwrap().repeat(200)).unwrap();
            }
            root
        };
        let one = tree("one", &mut names.iter());
        let other = tree("other", &mut names.iter().rev());
        let disk = |tree: &Path, seed| {
            let output = tree.with_extension("img");
            (make(tree, &output, seed).unwrap(), fs::read(output).unwrap())
        };
        let (verity, bytes) = disk(&one, "seed");
        assert!((verity.clone(), bytes) == disk(&other, "seed"));
        assert_ne!(verity.root_hash, disk(&other, "another").0.root_hash);
    }
}
