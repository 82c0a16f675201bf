//! One request, from a name to a mounted bundle.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use kata_oci::registry::{self, Reference, Registry, Resolved};
use kata_oci::{Digest, Image, ImageError, Interrupt, RegistryOptions, Store, StoreError};
use tokio::sync::Semaphore;

use crate::bundle::{self, Bundle, BundleError};
use crate::config::Config;
use crate::policy::PolicyError;
use crate::words::sentence;

/// Where the servers for names are written (resolv.conf(5)).
const RESOLVERS: &str = "/etc/resolv.conf";

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The image cannot be had.
    #[error("cannot pull {image}")]
    Image {
        /// Its name.
        image: String,
        /// Why.
        #[source]
        source: Box<ImageError>,
    },
    /// The image may not be pulled.
    #[error("may not pull {image}")]
    Policy {
        /// Its name.
        image: String,
        /// Why.
        #[source]
        source: Box<PolicyError>,
    },
    /// It took too long.
    #[error("cannot pull {image} within {seconds} s")]
    Timeout {
        /// Its name.
        image: String,
        /// What it may take.
        seconds: u64,
    },
    /// The registry has a name, and nobody is there to ask what it means.
    #[error("cannot look up {host}: {RESOLVERS} names no server")]
    NoResolver {
        /// The registry.
        host: String,
    },
    /// The bundle is the fault.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The layers' directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The same bundle is being made.
    #[error("{0} is being pulled into already")]
    Busy(String),
}

/// Pulls images, several at a time.
pub struct Puller {
    config: Config,
    slots: Semaphore,
    /// Ids of the bundles that are being made.
    busy: Mutex<BTreeSet<String>>,
}

impl Puller {
    /// Makes the directories, and removes what an earlier process has left.
    ///
    /// # Errors
    /// The directories cannot be used.
    pub fn new(config: Config) -> Result<Self, PullError> {
        Store::open(&config.work_dir, Interrupt::default())?.sweep()?;
        bundle::sweep(&config.work_dir, |_| false)?;
        Ok(Self { slots: Semaphore::new(config.concurrency), busy: Mutex::default(), config })
    }

    /// Pulls `image` into the bundle at `path`, and tells the digest of its manifest. Dropping the future ends the pull, and
    /// nothing but layers that are whole stays of it.
    ///
    /// # Errors
    /// [`PullError`].
    pub async fn pull(&self, image: &str, path: &str) -> Result<Digest, PullError> {
        let reference = registry::parse(image).map_err(|source| refused(image, source))?;
        let bundle = Bundle::at(path, &self.config.bundles, &self.config.work_dir)?;
        let _busy = Busy::new(&self.busy, bundle.id()).ok_or_else(|| PullError::Busy(path.to_owned()))?;
        let interrupt = Interrupt::default();
        let _ends = Ends(interrupt.clone());
        let pulled = tokio::time::timeout(self.config.pull_timeout, async {
            // Nobody closes the semaphore.
            let _slot = self.slots.acquire().await;
            self.fill(&reference, bundle, interrupt).await
        });
        let seconds = self.config.pull_timeout.as_secs();
        pulled.await.unwrap_or_else(|_| Err(PullError::Timeout { image: image.to_owned(), seconds }))
    }

    async fn fill(
        &self,
        reference: &Reference,
        bundle: Bundle,
        interrupt: Interrupt,
    ) -> Result<Digest, PullError> {
        let swept = bundle::sweep(&self.config.work_dir, |id| self.locked().contains(id));
        if let Err(error) = swept {
            tracing::warn!("{}", sentence(&error));
        }
        let store = Store::open(&self.config.work_dir, interrupt.clone())?.within(self.config.limits);
        let (digest, image) = self.fetch(reference, &store).await?;
        let made = tokio::task::spawn_blocking(move || bundle.make(&image, &interrupt)).await;
        made.unwrap_or(Err(BundleError::Interrupted))?;
        Ok(digest)
    }

    /// Asks mirrors and registry in turn, until one has the image as it has to be.
    async fn fetch(&self, reference: &Reference, store: &Store) -> Result<(Digest, Image), PullError> {
        let mut endpoints = self.config.endpoints(reference.registry()).into_iter().peekable();
        loop {
            let Some(options) = endpoints.next() else {
                return Err(refused(&reference.whole(), ImageError::Interrupted));
            };
            let mirror = options.mirror.clone();
            match self.fetch_from(reference, options, store).await {
                Err(error) if endpoints.peek().is_some() => {
                    tracing::warn!(mirror, "{}", sentence(&error));
                }
                done => return done,
            }
        }
    }

    async fn fetch_from(
        &self,
        reference: &Reference,
        options: RegistryOptions,
        store: &Store,
    ) -> Result<(Digest, Image), PullError> {
        let image = reference.whole();
        let fault = |source| refused(&image, source);
        let registry = Registry::connect(reference.clone(), options).map_err(fault)?;
        resolvable(registry.reference().resolve_registry())?;
        let resolved = registry.resolve(store).await.map_err(fault)?;
        self.admit(&registry, &resolved).await?;
        let digest = resolved.digest.clone();
        tracing::info!(image, %digest, "pulling");
        let pulled = registry.pull(resolved, store.clone()).await.map_err(fault)?;
        Ok((digest, pulled))
    }

    async fn admit(&self, registry: &Registry, resolved: &Resolved) -> Result<(), PullError> {
        self.config.policy.check(registry, resolved).await.map_err(|source| PullError::Policy {
            image: registry.reference().whole(),
            source: Box::new(source),
        })
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refused(image: &str, source: ImageError) -> PullError {
    PullError::Image { image: image.to_owned(), source: Box::new(source) }
}

/// Without a server the resolver would ask one in the internet, which nobody has named.
fn resolvable(host: &str) -> Result<(), PullError> {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let literal = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok();
    let proxies = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
    if literal || name == "localhost" || proxies.iter().any(|name| std::env::var_os(name).is_some()) {
        return Ok(());
    }
    let text = std::fs::read_to_string(RESOLVERS).unwrap_or_default();
    let names_one = |line: &str| line.trim_start().starts_with("nameserver");
    match text.lines().any(names_one) {
        true => Ok(()),
        false => Err(PullError::NoResolver { host: host.to_owned() }),
    }
}

/// Stops threads that unpack, whatever ends the pull.
struct Ends(Interrupt);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.set();
    }
}

/// A bundle that nobody else may make meanwhile.
struct Busy<'a> {
    all: &'a Mutex<BTreeSet<String>>,
    id: String,
}

impl<'a> Busy<'a> {
    fn new(all: &'a Mutex<BTreeSet<String>>, id: &str) -> Option<Self> {
        let fresh = all.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned());
        fresh.then(|| Self { all, id: id.to_owned() })
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}
