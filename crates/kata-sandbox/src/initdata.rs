//! The document that a pod's owner has bound to its machine, on its way to the guest.
//!
//! ```text
//!   hypervisor.qemu.initdata ── parsed, bounded ──┬── <run_dir>/initdata.img, 0600 ── disk "initdata", read-only
//!   (annotation cc_init_data)                     └── digest ── host data of a confidential machine
//! ```
//!
//! All of it happens before anything of the pod runs: a guest that were started without what was asked for would serve requests
//! that its owner has forbidden.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kata_config::{Artefacts, Config};
use kata_hypervisor::Disk;
use kata_hypervisor::process::{Record, RecordError};
use kata_image::manifest::{ManifestError, Need, capability};
use kata_initdata::{DocumentError, ImageError, Initdata, POLICY, SERIAL, write_image};

use crate::boot::image;
use crate::error::ErrorKind;

/// What asks for it, as users write it.
const ASKED_BY: &str =
    "hypervisor.qemu.initdata (annotation io.katacontainers.config.hypervisor.cc_init_data)";
/// What asks for a policy.
const POLICY_ASKED_BY: &str =
    "policy.rego in hypervisor.qemu.initdata (annotation io.katacontainers.config.hypervisor.cc_init_data)";
/// Name of the disk's file in the pod's directory.
const FILE: &str = "initdata.img";

/// Why a pod does not get its initdata.
#[derive(Debug, thiserror::Error)]
pub enum InitdataError {
    /// It is none.
    #[error(
        "the value of hypervisor.qemu.initdata (annotation io.katacontainers.config.hypervisor.cc_init_data) is of no use; \
         `kata-ctl initdata create` makes one that is"
    )]
    Document(#[from] DocumentError),
    /// The guest would not read it, or that cannot be known.
    #[error(transparent)]
    Image(#[from] ManifestError),
    /// Its disk cannot be made.
    #[error("cannot make the disk {path}", path = .path.display())]
    Disk {
        /// The disk's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ImageError,
    },
    /// The leak record cannot be written.
    #[error("cannot record the disk of initdata")]
    Record(#[from] RecordError),
}

impl InitdataError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Document(_) => ErrorKind::InvalidArgument,
            Self::Image(ManifestError::Lacks { .. }) => ErrorKind::Unimplemented,
            Self::Image(_) | Self::Disk { .. } | Self::Record(_) => ErrorKind::Internal,
        }
    }
}

/// A pod's initdata, on the disk that its machine is to have.
#[derive(Debug)]
pub(crate) struct PodInitdata {
    document: Initdata,
    path: PathBuf,
}

impl PodInitdata {
    /// Reads what the configuration has, and makes the disk; `None` where it has none.
    pub(crate) fn prepare(
        config: &Config,
        artefacts: &Artefacts,
        run_dir: &Path,
        record: &Record,
    ) -> Result<Option<Self>, InitdataError> {
        let text = &config.hypervisor.qemu.initdata;
        if text.is_empty() {
            return Ok(None);
        }
        let document = Initdata::from_annotation(text)?;
        check_image(config, artefacts, &document)?;
        let path = run_dir.join(FILE);
        record.file(&path)?;
        write(&document, &path).map_err(|source| InitdataError::Disk { path: path.clone(), source })?;
        tracing::info!(
            algorithm = %document.algorithm(),
            digest = kata_image::manifest::hex(document.digest()),
            keys = document.data().len(),
            "the machine gets initdata"
        );
        Ok(Some(Self { document, path }))
    }

    /// The disk, by whose serial number the guest finds it.
    pub(crate) fn disk(&self) -> Disk {
        Disk { id: SERIAL.to_owned(), path: self.path.clone(), readonly: true }
    }

    /// The digest as a field of `size` bytes in the hardware's report has it.
    pub(crate) fn host_data(&self, size: usize) -> Vec<u8> {
        self.document.host_data(size)
    }
}

/// What is in it may be secret, and only the owner opens it.
fn write(document: &Initdata, path: &Path) -> Result<(), ImageError> {
    // What another pod of the same name has left here is nobody's any more.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    write_image(document, OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?)
}

/// Refuses an image whose guests do not read initdata, or not what is in it. Of a root that the configuration names nobody knows.
fn check_image(config: &Config, artefacts: &Artefacts, document: &Initdata) -> Result<(), InitdataError> {
    let Some(manifest) = image::manifest(config, artefacts)? else {
        tracing::warn!(
            "whether the guest reads its initdata is not known: its root is the configuration's own (hypervisor.qemu.image, \
             hypervisor.qemu.initrd), and has no manifest"
        );
        return Ok(());
    };
    manifest.require(Need::new(capability::INITDATA, ASKED_BY))?;
    if document.data().contains_key(POLICY) {
        // An agent without a policy would serve everything that this one forbids.
        manifest.require(Need::new(capability::POLICY, POLICY_ASKED_BY))?;
    }
    Ok(())
}
