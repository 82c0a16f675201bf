use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::process::Command;

use tar::{EntryType, Header};

use super::*;

mod layers;
mod sources;

/// A directory for a test, with a store in it.
struct Place {
    dir: tempfile::TempDir,
    store: Store,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("state"), Interrupt::default()).unwrap();
        Self { dir, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What the store holds, beside its directories.
    fn stored(&self) -> Vec<String> {
        let entries = |name: &str| fs::read_dir(self.path("state/images").join(name)).unwrap();
        let names =
            entries("layers").chain(entries("locks")).map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    fn layout(&self, name: &str, tag: Option<&str>) -> Result<Image, ImageError> {
        materialise(&layout::Layout::open(&self.path(name), tag)?, &self.store)
    }
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(|error| format!("{error}: ")).collect()
}

/// Whether the named programs can be run; says so where not.
fn have(programs: &[&str]) -> bool {
    for program in programs {
        if Command::new(program).arg("--version").output().is_err() {
            eprintln!("skipped: {program} is not installed");
            return false;
        }
    }
    true
}

/// Layers need device nodes, owners and trusted attributes.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: unpacking layers needs root");
    }
    root
}

fn tool(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A tar stream.
struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// The path is written as it is, however bad.
    fn entry(
        mut self,
        path: &str,
        kind: EntryType,
        change: impl FnOnce(&mut Header),
        content: &[u8],
    ) -> Self {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_mtime(1_000_000_000);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(content.len() as u64);
        let name = &mut header.as_old_mut().name;
        name[..path.len()].copy_from_slice(path.as_bytes());
        change(&mut header);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    fn file(self, path: &str, content: &str) -> Self {
        self.entry(path, EntryType::Regular, |_| {}, content.as_bytes())
    }

    fn dir(self, path: &str) -> Self {
        self.entry(path, EntryType::Directory, |header| header.set_mode(0o755), b"")
    }

    fn link(self, kind: EntryType, path: &str, target: &str) -> Self {
        self.entry(path, kind, |header| header.set_link_name_literal(target).unwrap(), b"")
    }

    fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Makes an OCI layout with one image of these layers, tagged `latest`; each is (as stored, as tar).
fn write_layout(dir: &Path, layers: &[(Vec<u8>, Vec<u8>)]) -> Vec<Digest> {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        digest
    };
    let describe = |bytes: &[u8], kind: &str| serde_json::json!({ "mediaType": kind, "digest": put(bytes), "size": bytes.len() });
    let diff_ids: Vec<Digest> = layers.iter().map(|(_, tar)| Digest::of(tar)).collect();
    let config = serde_json::json!({
        "architecture": spec::Platform::host().architecture, "os": "linux",
        "config": { "Cmd": ["/bin/x"], "Env": null }, "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let layers: Vec<_> = layers
        .iter()
        .map(|(stored, _)| describe(stored, "application/vnd.oci.image.layer.v1.tar+gzip"))
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "layers": layers,
        "config": describe(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json"),
    });
    let mut entry = describe(manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json");
    entry["annotations"] = serde_json::json!({ spec::REF_NAME: "latest" });
    fs::write(
        dir.join("index.json"),
        serde_json::json!({ "schemaVersion": 2, "manifests": [entry] }).to_string(),
    )
    .unwrap();
    diff_ids
}
