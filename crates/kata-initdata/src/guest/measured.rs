//! Where the keys become files.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::Initdata;
use crate::document::{POLICY, WHOLE};

/// Longest reason that a policy carries, in characters.
const REASON_MAX: usize = 2000;

/// Why there are no files.
#[derive(Debug, thiserror::Error)]
pub enum MeasuredError {
    /// It was done before, or somebody else did.
    #[error("{path} is there already; initdata is taken once, when the guest boots", path = .0.display())]
    Again(PathBuf),
    /// A file cannot be written.
    #[error("cannot write {path}", path = .path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

pub(super) fn is_first(dir: &Path) -> Result<(), MeasuredError> {
    match dir.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(_) => Err(MeasuredError::Again(dir.to_owned())),
        Err(source) => Err(MeasuredError::Write { path: dir.to_owned(), source }),
    }
}

/// Writes every key, and the document as it came.
pub(super) fn write(dir: &Path, initdata: &Initdata) -> Result<(), MeasuredError> {
    let files = initdata.data().iter().map(|(name, text)| (name.as_str(), text.as_bytes()));
    fill(dir, files.chain([(WHOLE, initdata.raw())]))
}

/// Writes a policy that denies everything and says why.
pub(super) fn deny(dir: &Path, reason: &str) -> Result<(), MeasuredError> {
    let policy = format!(
        "package agent_policy\n\n# The guest's configuration cannot be trusted.\ndefault AllowRequestsFailingPolicy := false\n\n\
         reason := {}\n",
        quoted(reason)
    );
    fill(dir, [(POLICY, policy.as_bytes())].into_iter())
}

/// The directory appears under its name when all is in it.
fn fill<'a>(dir: &Path, files: impl Iterator<Item = (&'a str, &'a [u8])>) -> Result<(), MeasuredError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| MeasuredError::Write { path, source }
    };
    let parent = dir.parent().unwrap_or_else(|| Path::new("/"));
    std::fs::create_dir_all(parent).map_err(failed(parent))?;
    let fresh =
        tempfile::Builder::new().prefix(".measured-cfg-").tempdir_in(parent).map_err(failed(parent))?;
    for (name, bytes) in files {
        let path = fresh.path().join(name);
        std::fs::write(&path, bytes).map_err(failed(&path))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).map_err(failed(&path))?;
    }
    // Services that are not root's read theirs.
    std::fs::set_permissions(fresh.path(), std::fs::Permissions::from_mode(0o755)).map_err(failed(dir))?;
    let exclusive = rustix::fs::RenameFlags::NOREPLACE;
    match rustix::fs::renameat_with(rustix::fs::CWD, fresh.path(), rustix::fs::CWD, dir, exclusive) {
        Err(rustix::io::Errno::EXIST) => Err(MeasuredError::Again(dir.to_owned())),
        outcome => outcome.map_err(|error| failed(dir)(error.into())),
    }
}

/// A string of Rego, which are those of JSON.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars().take(REASON_MAX) {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            c if c.is_control() => quoted.push(' '),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}
