//! How to talk to a registry, and whom to tell how far it is.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::Digest;

/// Where registries may be spoken to without TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlainHttp {
    /// Nowhere.
    Never,
    /// On this machine's loopback: what listens there is as trusted as the machine is.
    Loopback,
    /// With the image's registry, wherever it is.
    Always,
}

/// Where user names and passwords of registries are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// In the files of the user's, where login commands leave them (containers-auth.json(5)).
    OfTheUser,
    /// In this file of the same format, which has to be there.
    File(PathBuf),
    /// Nowhere: images of anybody only.
    Nowhere,
}

/// Advice that depends on the program: it goes after what went wrong, in parentheses, with a space before it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hints {
    /// The registry wants to know who asks, or who asks may not have the image.
    pub unauthorized: &'static str,
    /// The registry cannot be spoken to, and TLS may be the reason.
    pub no_tls: &'static str,
}

/// Sees a pull go on.
pub trait Progress: Send + Sync {
    /// The download of the layer called `digest`, of `size` bytes, is about to begin.
    fn layer(&self, digest: &Digest, size: u64) -> Box<dyn Advance>;
}

/// Sees one download go on.
pub trait Advance: Send + Sync {
    /// So many bytes more have arrived.
    fn by(&self, bytes: u64);
}

/// How to talk to a registry.
#[derive(Clone)]
pub struct RegistryOptions {
    /// Who is asking, as `program/version`.
    pub user_agent: &'static str,
    /// Where TLS is not needed.
    pub plain: PlainHttp,
    /// Who is asking, where the registry wants to know.
    pub credentials: Credentials,
    /// Certificates (PEM) of authorities beside those of the system.
    pub authorities: Vec<Vec<u8>>,
    /// Host and port of a registry that is asked in place of the image's own.
    pub mirror: Option<String>,
    /// Without a byte for so long, a download has failed.
    pub stall: Duration,
    /// Downloads at a time.
    pub downloads: usize,
    /// Keep what a tag meant last, and use that while the registry cannot be reached.
    pub remember: bool,
    /// Advice in errors.
    pub hints: Hints,
    /// Whom to tell how far it is.
    pub progress: Option<Arc<dyn Progress>>,
}

impl RegistryOptions {
    /// The usual ones, of a program that calls itself `user_agent`.
    #[must_use]
    pub fn new(user_agent: &'static str) -> Self {
        Self {
            user_agent,
            plain: PlainHttp::Never,
            credentials: Credentials::Nowhere,
            authorities: Vec::new(),
            mirror: None,
            stall: Duration::from_secs(60),
            downloads: 3,
            remember: false,
            hints: Hints::default(),
            progress: None,
        }
    }
}

impl fmt::Debug for RegistryOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryOptions")
            .field("user_agent", &self.user_agent)
            .field("plain", &self.plain)
            .field("credentials", &self.credentials)
            .field("mirror", &self.mirror)
            .finish_non_exhaustive()
    }
}
