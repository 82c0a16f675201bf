//! Images in registries (OCI distribution specification), pulled with `oci-client`.
//!
//! ```text
//!   reference ─▶ manifest (asked for each time a tag is named; the last one serves while the registry is away)
//!                   └▶ configuration, layers that the store lacks: three downloads at a time into nameless files,
//!                      unpacked from the lowest up while the rest arrives
//! ```

mod auth;
mod progress;

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use rustix::fs::{Mode, OFlags};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

use super::spec::{self, Descriptor, ImageConfig, Index, Manifest};
use super::{
    BlobError, Contents, Digest, Image, ImageError, Layer, RegistryOptions, Store, blocking, layout,
};
use progress::{Bars, Sink};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Without a byte for so long, a download has failed.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Downloads at a time.
const PARALLEL: usize = 3;
/// Kinds of manifests that are understood.
const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// Why an image cannot be pulled.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Not a reference.
    #[error("{reference:?} is not an image reference")]
    Reference {
        /// What was written.
        reference: String,
        /// Why not.
        #[source]
        source: oci_client::ParseError,
    },
    /// The registry refused, or cannot be reached.
    #[error("cannot pull {what} from {registry}{hint}")]
    Pull {
        /// The part of the image.
        what: String,
        /// Host and port.
        registry: String,
        /// What to do, where that is clear.
        hint: &'static str,
        /// What went wrong.
        #[source]
        source: Box<OciDistributionError>,
    },
    /// No client for HTTPS.
    #[error("cannot set up HTTPS")]
    Client(#[source] Box<OciDistributionError>),
    /// A file of credentials cannot be used.
    #[error(transparent)]
    Credentials(#[from] auth::AuthError),
}

/// Pulls what `store` lacks of the image called `reference`.
pub async fn fetch(reference: &str, store: Store, options: RegistryOptions) -> Result<Image, ImageError> {
    let parsed = Reference::from_str(reference)
        .map_err(|source| RegistryError::Reference { reference: reference.to_owned(), source })?;
    let registry = Registry::connect(parsed, options)?;
    let (manifest, config) = registry.documents(&store).await?;
    let layers = layout::layers(&manifest, &config);
    let bars = Bars::new(options.progress);
    let mut downloads = JoinSet::new();
    let mut pulled = Pulled { config, layers, files: Mutex::default() };
    registry.download_missing(&mut pulled, &store, &bars, &mut downloads)?;
    // The set ends with this function: whatever fails, nothing goes on downloading.
    let image = blocking(move || super::materialise(&pulled, &store)).await;
    bars.clear();
    image
}

struct Registry {
    client: Client,
    reference: Reference,
    auth: RegistryAuth,
}

impl Registry {
    fn connect(reference: Reference, options: RegistryOptions) -> Result<Self, ImageError> {
        // A second installation fails and changes nothing.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let host = reference.resolve_registry();
        let plain = options.insecure || is_loopback(host);
        let protocol =
            if plain { ClientProtocol::HttpsExcept(vec![host.to_owned()]) } else { ClientProtocol::Https };
        let config = ClientConfig {
            protocol,
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: concat!("kata-ctl/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).map_err(|error| RegistryError::Client(Box::new(error)))?;
        let auth = auth::lookup(reference.registry(), reference.repository())
            .map_err(RegistryError::Credentials)?
            .map_or(RegistryAuth::Anonymous, |(user, password)| RegistryAuth::Basic(user, password));
        Ok(Self { client, reference, auth })
    }

    /// Manifest and configuration for this host.
    async fn documents(&self, store: &Store) -> Result<(Manifest, ImageConfig), ImageError> {
        let remembered = Remembered::of(store, &self.reference);
        if self.reference.digest().is_some()
            && let Some(known) = remembered.recall()
        {
            return Ok(known);
        }
        match self.ask(&remembered).await {
            Err(ImageError::Registry(error)) if error.is_unreachable() => match remembered.recall() {
                Some(known) => {
                    tracing::warn!(
                        "{} cannot be reached: using the copy of {} that was pulled before",
                        self.reference.registry(),
                        self.reference
                    );
                    Ok(known)
                }
                None => Err(error.into()),
            },
            asked => asked,
        }
    }

    async fn ask(&self, remembered: &Remembered) -> Result<(Manifest, ImageConfig), ImageError> {
        let mut bytes = self.manifest(&self.reference).await?;
        if let Ok(index) = serde_json::from_slice::<Index>(&bytes) {
            let digest = index.for_host(&self.reference.whole())?.digest.to_string();
            bytes = self.manifest(&self.reference.clone_with_digest(digest)).await?;
        }
        let manifest: Manifest = spec::parse("the manifest", &bytes)?;
        let config_bytes = self.small_blob(&manifest.config).await?;
        let config = spec::parse_config(&config_bytes, manifest.layers.len())?;
        remembered.keep(&bytes, &config_bytes);
        Ok((manifest, config))
    }

    async fn manifest(&self, reference: &Reference) -> Result<Vec<u8>, ImageError> {
        let pulled = self.client.pull_manifest_raw(reference, &self.auth, &ACCEPTED).await;
        let (bytes, _) =
            pulled.map_err(|source| self.fault(format!("the manifest of {reference}"), source))?;
        if let Some(expected) = reference.digest() {
            let expected: Digest =
                expected.parse().map_err(|error: super::digest::DigestError| ImageError::Spec {
                    document: "the reference".to_owned(),
                    source: spec::SpecError::Unsupported(error.to_string()),
                })?;
            let actual = Digest::of(&bytes);
            if actual != expected {
                let name = "the image's manifest".to_owned();
                return Err(BlobError::Mismatch { name, expected, actual }.into());
            }
        }
        Ok(bytes.to_vec())
    }

    async fn small_blob(&self, at: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let mut sink = Sink::new(Vec::new(), at.size.min(spec::CONFIG_LIMIT), None);
        let digest = at.digest.to_string();
        let pulled = self.client.pull_blob(&self.reference, digest.as_str(), &mut sink).await;
        pulled.map_err(|source| self.fault("the image's configuration".to_owned(), source))?;
        Ok(sink.into_inner())
    }

    /// Starts a download for each layer that `store` lacks; `pulled` learns where each will arrive.
    fn download_missing(
        &self,
        pulled: &mut Pulled,
        store: &Store,
        bars: &Bars,
        downloads: &mut JoinSet<()>,
    ) -> Result<(), ImageError> {
        let slots = Arc::new(Semaphore::new(PARALLEL));
        let mut stack = store.stack();
        let mut files = Vec::new();
        for layer in &pulled.layers {
            let Some((digest, size)) = layer.blob.clone().filter(|_| !stack.push_cached(layer)) else {
                files.push(None);
                continue;
            };
            let (arrived, arrival) = oneshot::channel();
            files.push(Some(arrival));
            let file = nameless_file(store)?;
            let (client, reference, slots) =
                (self.client.clone(), self.reference.clone(), Arc::clone(&slots));
            let (bar, interrupt) = (bars.add(digest.hex(), size), store.interrupt().clone());
            downloads.spawn(async move {
                let Ok(_slot) = slots.acquire().await else { return };
                let sink = Sink::new(tokio::fs::File::from_std(file), size, Some((bar, interrupt)));
                // Nobody listens any more where an earlier layer failed.
                let _ = arrived.send(download(&client, &reference, &digest.to_string(), sink).await);
            });
        }
        pulled.files = Mutex::new(files);
        Ok(())
    }

    fn fault(&self, what: String, source: OciDistributionError) -> RegistryError {
        pull_error(&self.reference, what, source)
    }
}

async fn download(
    client: &Client,
    reference: &Reference,
    digest: &str,
    mut sink: Sink<tokio::fs::File>,
) -> Result<File, RegistryError> {
    let fault = |source| pull_error(reference, format!("layer {digest}"), source);
    client.pull_blob(reference, digest, &mut sink).await.map_err(fault)?;
    let mut file = sink.into_inner().into_std().await;
    file.seek(SeekFrom::Start(0)).map_err(|error| fault(error.into()))?;
    Ok(file)
}

/// A file without a name: it goes when the process does.
fn nameless_file(store: &Store) -> Result<File, ImageError> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(store.root(), flags, Mode::from_raw_mode(0o600));
    let read =
        |error: rustix::io::Errno| ImageError::Read { path: store.root().to_owned(), source: error.into() };
    file.map(File::from).map_err(read)
}

fn pull_error(reference: &Reference, what: String, source: OciDistributionError) -> RegistryError {
    let hint = match &source {
        OciDistributionError::UnauthorizedError { .. } | OciDistributionError::AuthenticationFailure(_) => {
            " (log in first, e.g. with `skopeo login`, or check the name: registries answer the same for images that are not there)"
        }
        OciDistributionError::RequestError(_) if !is_loopback(reference.registry()) => {
            " (a registry without TLS needs --insecure)"
        }
        _ => "",
    };
    RegistryError::Pull { what, registry: reference.registry().to_owned(), hint, source: Box::new(source) }
}

impl RegistryError {
    /// Whether the registry was not there, rather than answered.
    fn is_unreachable(&self) -> bool {
        match self {
            Self::Pull { source, .. } => {
                matches!(&**source, OciDistributionError::RequestError(error) if error.is_connect() || error.is_timeout())
            }
            _ => false,
        }
    }
}

/// `localhost`, `127.0.0.0/8`, with or without a port.
fn is_loopback(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost" || host.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback())
}

/// The documents of an image as they were when it was last pulled.
struct Remembered {
    dir: PathBuf,
    reference: PathBuf,
}

impl Remembered {
    fn of(store: &Store, reference: &Reference) -> Self {
        let name = Digest::of(reference.whole().as_bytes());
        Self {
            dir: store.root().join("documents"),
            reference: store.root().join("references").join(name.hex()),
        }
    }

    /// `None` where there is nothing, or nothing intact.
    fn recall(&self) -> Option<(Manifest, ImageConfig)> {
        let digest: Digest = fs::read_to_string(&self.reference).ok()?.trim().parse().ok()?;
        let manifest: Manifest = serde_json::from_slice(&self.document(&digest)?).ok()?;
        let config =
            spec::parse_config(&self.document(&manifest.config.digest)?, manifest.layers.len()).ok()?;
        Some((manifest, config))
    }

    fn document(&self, digest: &Digest) -> Option<Vec<u8>> {
        let bytes = fs::read(self.dir.join(digest.hex())).ok()?;
        (Digest::of(&bytes) == *digest).then_some(bytes)
    }

    /// Best effort: an image that cannot be remembered can still be run.
    fn keep(&self, manifest: &[u8], config: &[u8]) {
        let write = || {
            fs::create_dir_all(&self.dir)?;
            fs::create_dir_all(self.reference.parent().unwrap_or(&self.dir))?;
            for bytes in [config, manifest] {
                replace(&self.dir.join(Digest::of(bytes).hex()), bytes)?;
            }
            replace(&self.reference, Digest::of(manifest).to_string().as_bytes())
        };
        if let Err(error) = write() {
            tracing::warn!(%error, "the image's documents cannot be kept for later");
        }
    }
}

fn replace(path: &std::path::Path, bytes: &[u8]) -> io::Result<()> {
    let part = path.with_extension(format!("{}.part", std::process::id()));
    fs::write(&part, bytes)?;
    fs::rename(&part, path)
}

type Arrival = oneshot::Receiver<Result<File, RegistryError>>;

/// An image on its way.
struct Pulled {
    config: ImageConfig,
    layers: Vec<Layer>,
    /// Where the layers arrive that were not in the store.
    files: Mutex<Vec<Option<Arrival>>>,
}

impl Contents for Pulled {
    fn config(&self) -> &ImageConfig {
        &self.config
    }

    fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Waits for the download.
    fn open(&self, index: usize) -> Result<Box<dyn Read + '_>, ImageError> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let arrival = files.get_mut(index).and_then(Option::take);
        drop(files);
        // Without a download, the layer was there when this began, and somebody has removed it since.
        let arrival = arrival.ok_or_else(|| ImageError::Missing {
            archive: "the store".to_owned(),
            member: self.layers.get(index).map(|layer| layer.name.clone()).unwrap_or_default(),
        })?;
        let file = arrival.blocking_recv().unwrap_or_else(|_| {
            Err(RegistryError::Pull {
                what: "a layer".to_owned(),
                registry: "the registry".to_owned(),
                hint: "",
                source: Box::new(io::Error::other("the download was given up").into()),
            })
        })?;
        Ok(Box::new(file))
    }
}

#[cfg(test)]
mod tests;
