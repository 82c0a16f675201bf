//! Names this build, so that a snapshot of another is told apart: a digest of all that decides what its structures mean.

#![allow(clippy::unwrap_used, reason = "what fails here fails the build")]

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

fn main() {
    let mut files = BTreeSet::new();
    for root in ["src", "../kata-vmm-api/src", "Cargo.toml", "../../Cargo.lock"] {
        println!("cargo::rerun-if-changed={root}");
        collect(Path::new(root), &mut files);
    }
    let mut digest = DefaultHasher::new();
    for file in files {
        file.hash(&mut digest);
        std::fs::read(&file).unwrap().hash(&mut digest);
    }
    for variable in ["TARGET", "PROFILE", "OPT_LEVEL"] {
        std::env::var(variable).unwrap().hash(&mut digest);
    }
    println!("cargo::rustc-env=KATA_VMM_BUILD={:016x}", digest.finish());
}

fn collect(path: &Path, files: &mut BTreeSet<PathBuf>) {
    if path.is_dir() {
        std::fs::read_dir(path).unwrap().for_each(|entry| collect(&entry.unwrap().path(), files));
    } else if path.exists() {
        files.insert(path.to_owned());
    }
}
