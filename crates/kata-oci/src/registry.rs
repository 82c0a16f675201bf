//! Images in registries (OCI distribution specification), pulled with `oci-client`.
//!
//! ```text
//!   reference ─▶ manifest (asked for each time a tag is named; the last one serves while the registry is away)
//!                   └▶ configuration, layers that the store lacks: three downloads at a time into nameless files,
//!                      unpacked from the lowest up while the rest arrives
//! ```

mod auth;
mod remembered;
mod sink;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use auth::AuthError;
use oci_client::Client;
pub use oci_client::Reference;
use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::secrets::RegistryAuth;
use rustix::fs::{Mode, OFlags};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

use super::spec::{self, Descriptor, ImageConfig, Index, Manifest};
use super::{
    BlobError, Contents, Digest, Hints, Image, ImageError, Interrupt, Layer, PlainHttp, RegistryOptions,
    Store, blocking, layout,
};
use remembered::Remembered;
use sink::Sink;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
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
    let registry = Registry::connect(parse(reference)?, options)?;
    let resolved = registry.resolve(&store).await?;
    registry.pull(resolved, store).await
}

/// The reference that `text` is: a name without a registry is one of Docker's.
///
/// # Errors
/// [`RegistryError::Reference`].
pub fn parse(text: &str) -> Result<Reference, ImageError> {
    let reference = text.to_owned();
    Ok(Reference::from_str(text).map_err(|source| RegistryError::Reference { reference, source })?)
}

/// One image of a registry.
pub struct Registry {
    client: Client,
    reference: Reference,
    auth: RegistryAuth,
    options: RegistryOptions,
}

/// What a reference means: the documents of an image for this machine.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Of the image's manifest.
    pub digest: Digest,
    /// Of the index that led to it, where there was one.
    pub index: Option<Digest>,
    /// What the image says about how to run it.
    pub config: ImageConfig,
    manifest: Manifest,
}

impl Registry {
    /// Makes a client for the image called `reference`; nothing is asked yet.
    ///
    /// # Errors
    /// [`RegistryError::Client`], [`RegistryError::Credentials`].
    pub fn connect(mut reference: Reference, options: RegistryOptions) -> Result<Self, ImageError> {
        // Whose credentials: a mirror never gets those of the registry that it stands for.
        let whose = options.mirror.clone().unwrap_or_else(|| reference.registry().to_owned());
        if let Some(mirror) = &options.mirror {
            reference.set_mirror_registry(mirror.clone());
        }
        let client = client(reference.resolve_registry(), &options)
            .map_err(|error| RegistryError::Client(Box::new(error)))?;
        let auth = auth::lookup(&options.credentials, &whose, reference.repository())
            .map_err(RegistryError::Credentials)?
            .map_or(RegistryAuth::Anonymous, |(user, password)| RegistryAuth::Basic(user, password));
        Ok(Self { client, reference, auth, options })
    }

    /// The image's name.
    #[must_use]
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// Manifest and configuration for this host.
    ///
    /// # Errors
    /// [`ImageError`].
    pub async fn resolve(&self, store: &Store) -> Result<Resolved, ImageError> {
        let remembered = self.options.remember.then(|| Remembered::of(store, &self.reference));
        let recall = || remembered.as_ref().and_then(Remembered::recall);
        if self.reference.digest().is_some()
            && let Some(known) = recall()
        {
            return Ok(known);
        }
        match self.ask(remembered.as_ref()).await {
            Err(ImageError::Registry(error)) if error.is_unreachable() => match recall() {
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

    async fn ask(&self, remembered: Option<&Remembered>) -> Result<Resolved, ImageError> {
        let mut bytes = self.manifest(&self.reference).await?;
        let mut index = None;
        if let Ok(several) = serde_json::from_slice::<Index>(&bytes) {
            index = Some(Digest::of(&bytes));
            let digest = several.for_host(&self.reference.whole())?.digest.to_string();
            bytes = self.manifest(&self.reference.clone_with_digest(digest)).await?;
        }
        let manifest: Manifest = spec::parse("the manifest", &bytes)?;
        let config_bytes =
            self.blob(&manifest.config, "the image's configuration", spec::CONFIG_LIMIT).await?;
        let config = spec::parse_config(&config_bytes, manifest.layers.len())?;
        if let Some(remembered) = remembered {
            remembered.keep(&bytes, &config_bytes);
        }
        Ok(Resolved { digest: Digest::of(&bytes), index, config, manifest })
    }

    /// Downloads, verifies and unpacks the layers that `store` lacks. Dropping the future ends the downloads; unpacking ends
    /// with the store's interrupt.
    ///
    /// # Errors
    /// [`ImageError`]; nothing of a layer that failed stays in the store.
    pub async fn pull(&self, resolved: Resolved, store: Store) -> Result<Image, ImageError> {
        let layers = layout::layers(&resolved.manifest, &resolved.config);
        store.admit(&layers)?;
        let mut downloads = JoinSet::new();
        let mut pulled = Pulled { config: resolved.config, layers, files: Mutex::default() };
        self.download_missing(&mut pulled, &store, &mut downloads)?;
        // The set ends with this function: whatever fails, nothing goes on downloading.
        blocking(move || super::materialise(&pulled, &store)).await
    }

    /// The manifest of another tag in the image's repository, as it is; `None` where there is none.
    ///
    /// # Errors
    /// [`RegistryError::Pull`].
    pub async fn sibling(&self, tag: &str) -> Result<Option<Manifest>, ImageError> {
        let (registry, repository) = (self.reference.registry(), self.reference.repository());
        let mut reference = Reference::with_tag(registry.to_owned(), repository.to_owned(), tag.to_owned());
        if let Some(mirror) = &self.options.mirror {
            reference.set_mirror_registry(mirror.clone());
        }
        match self.manifest(&reference).await {
            Ok(bytes) => spec::parse("the manifest", &bytes).map(Some),
            Err(ImageError::Registry(error)) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
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

    /// A small blob, verified; `what` is for the error.
    ///
    /// # Errors
    /// [`RegistryError::Pull`], also for more than `limit` bytes.
    pub async fn blob(&self, at: &Descriptor, what: &str, limit: u64) -> Result<Vec<u8>, ImageError> {
        let mut sink = Sink::new(Vec::new(), at.size.min(limit), Interrupt::default(), None);
        let digest = at.digest.to_string();
        let pulled = self.client.pull_blob(&self.reference, digest.as_str(), &mut sink).await;
        pulled.map_err(|source| self.fault(what.to_owned(), source))?;
        Ok(sink.into_inner())
    }

    /// Starts a download for each layer that `store` lacks; `pulled` learns where each will arrive.
    fn download_missing(
        &self,
        pulled: &mut Pulled,
        store: &Store,
        downloads: &mut JoinSet<()>,
    ) -> Result<(), ImageError> {
        let slots = Arc::new(Semaphore::new(self.options.downloads));
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
            let advance = self.options.progress.as_ref().map(|progress| progress.layer(&digest, size));
            let sink = Sink::new(tokio::fs::File::from_std(file), size, store.interrupt().clone(), advance);
            let (client, reference, slots) =
                (self.client.clone(), self.reference.clone(), Arc::clone(&slots));
            let hints = self.options.hints;
            downloads.spawn(async move {
                let Ok(_slot) = slots.acquire().await else { return };
                // Nobody listens any more where an earlier layer failed.
                let _ = arrived.send(download(&client, &reference, &digest.to_string(), sink, hints).await);
            });
        }
        pulled.files = Mutex::new(files);
        Ok(())
    }

    fn fault(&self, what: String, source: OciDistributionError) -> RegistryError {
        pull_error(&self.reference, what, source, self.options.hints)
    }
}

/// A client that speaks to `host`.
fn client(host: &str, options: &RegistryOptions) -> Result<Client, OciDistributionError> {
    // A second installation fails and changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let plain = match options.plain {
        PlainHttp::Never => false,
        PlainHttp::Loopback => is_loopback(host),
        PlainHttp::Always => true,
    };
    let config = ClientConfig {
        protocol: match plain {
            true => ClientProtocol::HttpsExcept(vec![host.to_owned()]),
            false => ClientProtocol::Https,
        },
        extra_root_certificates: options.authorities.iter().map(|pem| certificate(pem)).collect(),
        connect_timeout: Some(CONNECT_TIMEOUT),
        read_timeout: Some(options.stall),
        user_agent: options.user_agent,
        ..ClientConfig::default()
    };
    // On its way the library makes a client of no options too, and panics where the system has no authority at all.
    if !options.authorities.is_empty() {
        Client::try_from(ClientConfig::default())?;
    }
    Client::try_from(config)
}

fn certificate(pem: &[u8]) -> Certificate {
    Certificate { encoding: CertificateEncoding::Pem, data: pem.to_owned() }
}

async fn download(
    client: &Client,
    reference: &Reference,
    digest: &str,
    mut sink: Sink<tokio::fs::File>,
    hints: Hints,
) -> Result<File, RegistryError> {
    let fault = |source| pull_error(reference, format!("layer {digest}"), source, hints);
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

fn pull_error(
    reference: &Reference,
    what: String,
    source: OciDistributionError,
    hints: Hints,
) -> RegistryError {
    let registry =
        if reference.namespace().is_some() { reference.resolve_registry() } else { reference.registry() };
    let hint = match &source {
        OciDistributionError::UnauthorizedError { .. } | OciDistributionError::AuthenticationFailure(_) => {
            hints.unauthorized
        }
        OciDistributionError::RequestError(_) if !is_loopback(registry) => hints.no_tls,
        _ => "",
    };
    RegistryError::Pull { what, registry: registry.to_owned(), hint, source: Box::new(source) }
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

    /// Whether the registry wants to know who asks, or who asks may not have the image.
    #[must_use]
    pub fn is_unauthorized(&self) -> bool {
        match self {
            Self::Credentials(_) => true,
            Self::Pull { source, .. } => matches!(
                **source,
                OciDistributionError::UnauthorizedError { .. }
                    | OciDistributionError::AuthenticationFailure(_)
            ),
            _ => false,
        }
    }

    /// Whether something else arrived than what was asked for.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        matches!(self, Self::Pull { source, .. } if matches!(**source, OciDistributionError::DigestError(_)))
    }

    /// Whether the registry answered that it has no such thing.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        let Self::Pull { source, .. } = self else { return false };
        match &**source {
            OciDistributionError::ImageManifestNotFoundError(_) => true,
            OciDistributionError::ServerError { code, .. } => *code == 404,
            OciDistributionError::RegistryError { envelope, .. } => envelope.errors.iter().any(|error| {
                matches!(
                    error.code,
                    OciErrorCode::ManifestUnknown | OciErrorCode::NameUnknown | OciErrorCode::NotFound
                )
            }),
            _ => false,
        }
    }
}

/// `localhost`, `127.0.0.0/8`, with or without a port.
fn is_loopback(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost" || host.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback())
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
