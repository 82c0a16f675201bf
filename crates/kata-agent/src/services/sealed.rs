//! Sealed secrets of a container: opened where the container asks for it, or the agent's own setting does.
//!
//! | `io.katacontainers.guest.unseal` | is opened |
//! |---|---|
//! | `env` | values of environment variables that begin with `sealed.` |
//! | `files=/a:/b` | files that begin so, in the mounts at `/a` and `/b` |
//! | `env,files=/a` | both |
//! | absent | nothing; with `agent.unseal=implicit` variables, and files of small read-only volumes |
//!
//! Opened files are in memory of the guest: a tmpfs of the container's own takes a copy of the mount's tree with the secrets open,
//! and the container gets that. It does not follow later changes of the volume. What was found and cannot be opened fails the
//! container. Of a volume that is larger than secrets are, no more than the beginning is looked through: something sealed there
//! fails the container, and what is behind stays as it is. No text of a secret is in an error or in the log.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::{Mount, Spec};
use tokio::sync::Mutex;

use super::{ServiceError, Services};
use crate::aside::{self, AsideError};

mod tree;

use tree::Tree;
pub use tree::TreeError;

/// What a container says it wants opened.
pub const ANNOTATION: &str = "io.katacontainers.guest.unseal";
/// What a sealed secret begins with.
const PREFIX: &str = "sealed.";
/// Longest value of a variable that the kernel passes on to a program, `MAX_ARG_STRLEN`, with its name and an end.
const VARIABLE_MAX: usize = 128 << 10;
/// Where Kubernetes mounts what it makes itself, which is never sealed.
const NEVER_SEALED: [&str; 5] = [
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/dev/termination-log",
    "/var/run/secrets/kubernetes.io/serviceaccount",
];

/// Secrets that are not opened.
#[derive(Debug, thiserror::Error)]
pub enum SealedError {
    /// The annotation makes no sense.
    #[error("annotation {ANNOTATION}: {0}")]
    Annotation(String),
    /// A path that it names is none of the container's.
    #[error("annotation {ANNOTATION} names {0:?}, where the container has no bind mount")]
    NoMount(PathBuf),
    /// Nothing is sealed at a path that it names.
    #[error("annotation {ANNOTATION} names {0:?}, where nothing is sealed")]
    NothingSealed(PathBuf),
    /// The service did not open one.
    #[error("opening {what}")]
    Service {
        /// Which.
        what: String,
        /// Why not.
        #[source]
        source: ServiceError,
    },
    /// What came back cannot be a variable's value.
    #[error("the secret in environment variable {0:?} is no text, or too long for a variable")]
    NotText(String),
    /// The files.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The work was dropped before it was done.
    #[error(transparent)]
    Aside(#[from] AsideError),
}

/// What of a container is to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    /// By its annotation.
    Named { env: bool, files: Vec<PathBuf> },
    /// Whatever looks sealed.
    Implicit,
}

impl Wanted {
    fn of(spec: &Spec, implicit: bool) -> Result<Self, SealedError> {
        let annotation = spec.annotations().as_ref().and_then(|all| all.get(ANNOTATION));
        let Some(text) = annotation else {
            return Ok(if implicit { Self::Implicit } else { Self::Named { env: false, files: Vec::new() } });
        };
        let (mut env, mut files) = (false, Vec::new());
        for word in text.split(',') {
            match word.trim().split_once('=') {
                None if word.trim() == "env" => env = true,
                Some(("files", paths)) => files.extend(paths.split(':').map(PathBuf::from)),
                _ => {
                    let known = "\"env\" and \"files=/PATH[:/PATH…]\" are known";
                    return Err(SealedError::Annotation(format!("{word:?} is not understood; {known}")));
                }
            }
        }
        match files.iter().find(|path| !path.is_absolute()) {
            Some(path) => Err(SealedError::Annotation(format!("{path:?} is not an absolute path"))),
            None => Ok(Self::Named { env, files }),
        }
    }

    fn env(&self) -> bool {
        matches!(self, Self::Named { env: true, .. } | Self::Implicit)
    }
}

/// The way to a container's secrets, and those that were opened for it: programs that are run in it later have the same variables.
pub struct Secrets {
    services: Services,
    wanted: Wanted,
    opened: Mutex<HashMap<String, String>>,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets").field("wanted", &self.wanted).finish_non_exhaustive()
    }
}

impl Secrets {
    /// Those of a container of `spec`. Nothing is opened yet.
    ///
    /// # Errors
    /// [`SealedError::Annotation`].
    pub fn of(spec: &Spec, implicit: bool, services: Services) -> Result<Arc<Self>, SealedError> {
        let wanted = Wanted::of(spec, implicit)?;
        Ok(Arc::new(Self { services, wanted, opened: Mutex::default() }))
    }

    /// Opens variables, `NAME=value` each, where the container wants that.
    ///
    /// # Errors
    /// [`SealedError`]; the variables are as they were then, or open in part.
    pub async fn open_env(&self, env: &mut [String]) -> Result<(), SealedError> {
        if !self.wanted.env() {
            return Ok(());
        }
        for variable in env {
            let Some((name, sealed)) =
                variable.split_once('=').filter(|(_, value)| value.starts_with(PREFIX))
            else {
                continue;
            };
            let value = self.open_variable(name, sealed).await?;
            *variable = format!("{name}={value}");
        }
        Ok(())
    }

    async fn open_variable(&self, name: &str, sealed: &str) -> Result<String, SealedError> {
        let mut opened = self.opened.lock().await;
        if let Some(value) = opened.get(sealed) {
            return Ok(value.clone());
        }
        let failed = |source| SealedError::Service { what: format!("environment variable {name:?}"), source };
        let plain = self.services.unseal(sealed.as_bytes()).await.map_err(failed)?;
        let not_text = || SealedError::NotText(name.to_owned());
        let value = String::from_utf8(plain).map_err(|_| not_text())?;
        if value.contains('\0') || name.len() + value.len() + 2 > VARIABLE_MAX {
            return Err(not_text());
        }
        opened.insert(sealed.to_owned(), value.clone());
        Ok(value)
    }

    /// Copies of the mounts with sealed files that the container wants opened, not open yet; each with its place in the list of
    /// mounts. `volumes` are the directories whose contents the host gives.
    ///
    /// # Errors
    /// [`SealedError`].
    pub async fn find(&self, spec: &Spec, volumes: &[PathBuf]) -> Result<Sealed, SealedError> {
        let mounts = spec.mounts().clone().unwrap_or_default();
        let mut found = Sealed::default();
        match &self.wanted {
            Wanted::Named { files, .. } => {
                for path in files {
                    let named = |mount: &&Mount| mount.destination() == path;
                    // The last one is what the container sees.
                    let (at, mount) = mounts
                        .iter()
                        .enumerate()
                        .rev()
                        .find(|(_, mount)| named(mount))
                        .ok_or_else(|| SealedError::NoMount(path.clone()))?;
                    let source = mount.source().clone().filter(|_| is_bind(mount));
                    let source = source.ok_or_else(|| SealedError::NoMount(path.clone()))?;
                    let tree = read(source).await??;
                    if !tree.is_sealed() {
                        return Err(SealedError::NothingSealed(path.clone()));
                    }
                    found.0.push((at, tree));
                }
            }
            Wanted::Implicit => {
                for (at, mount) in mounts.iter().enumerate() {
                    let Some(source) = mount.source().clone().filter(|_| may_be_sealed(mount, volumes))
                    else {
                        continue;
                    };
                    match read(source).await? {
                        Ok(tree) if tree.is_sealed() => found.0.push((at, tree)),
                        Ok(_) => {}
                        // A volume of data, as far as can be told.
                        Err(TreeError::TooMuch { path, sealed: false }) => {
                            tracing::info!(
                                ?path,
                                "not looked through for secrets: it holds more than those do"
                            );
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
            }
        }
        Ok(found)
    }

    /// Opens what was found, and puts it below `dir`, which is there.
    ///
    /// # Errors
    /// [`SealedError`]; something may be in `dir` then.
    pub async fn open_files(&self, found: Sealed, dir: &Path, spec: &mut Spec) -> Result<(), SealedError> {
        for (number, (at, mut tree)) in found.0.into_iter().enumerate() {
            for (path, content) in tree.sealed() {
                let failed = |source| SealedError::Service { what: format!("file {path:?}"), source };
                *content = self.services.unseal(content.trim_ascii_end()).await.map_err(failed)?;
            }
            let place = dir.join(number.to_string());
            let target = place.clone();
            aside::run(format!("writing secrets to {}", place.display()), move || tree.write(&target))
                .await??;
            if let Some(mount) = spec.mounts_mut().as_mut().and_then(|mounts| mounts.get_mut(at)) {
                mount.set_source(Some(place));
            }
        }
        Ok(())
    }
}

/// Mounts that hold sealed files.
#[derive(Debug, Default)]
pub struct Sealed(Vec<(usize, Tree)>);

impl Sealed {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

async fn read(source: PathBuf) -> Result<Result<Tree, TreeError>, AsideError> {
    let what = format!("reading {} for secrets", source.display());
    aside::run(what, move || Tree::read(&source)).await
}

fn is_bind(mount: &Mount) -> bool {
    let binds = |option: &String| matches!(option.as_str(), "bind" | "rbind");
    mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(binds)
}

/// Whether Kubernetes may have mounted a secret there: those are read-only.
fn may_be_sealed(mount: &Mount, volumes: &[PathBuf]) -> bool {
    let readonly = mount.options().iter().flatten().any(|option| matches!(option.as_str(), "ro" | "rro"));
    let given =
        mount.source().as_ref().is_some_and(|source| volumes.iter().any(|dir| source.starts_with(dir)));
    let excluded = NEVER_SEALED.iter().any(|path| mount.destination().starts_with(path));
    is_bind(mount) && readonly && given && !excluded
}

#[cfg(test)]
mod tests;
