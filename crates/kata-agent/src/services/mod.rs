//! What programs inside of the guest do for the agent: pull images, open secrets, mount what only the guest can read.
//!
//! ```text
//!                  /run/guest-services/
//!  mount ─ pull ──▶  image-pull.socket       PullImage
//!  mount ─ disk ──▶  secure-mount.socket     SecureMount
//!  rpc ── sealed ─▶  sealed-secrets.socket   UnsealSecret
//!                    get-resource.socket     GetResource: nothing in the agent needs a resource, so nothing asks
//! ```
//!
//! The contract is docs/guest-services.md. The agent knows the sockets and no program. Each call has a connection of its own: a
//! service may be restarted between any two of them, and a call that is given up is closed, which ends it there as well.
//! What a service says is bounded, and believed only as far as the agent cannot look for itself.

mod error;
pub mod sealed;
mod unit;

use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kata_api::guest::service;
use kata_api::guest_services::{ImagePullRequest, SecureMountRequest, UnsealSecretRequest};
use kata_api::guest_services_ttrpc::{
    ImagePullServiceClient, SealedSecretServiceClient, SecureMountServiceClient,
};
use tokio::net::UnixStream;
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::Context;

pub use error::ServiceError;
use error::{Fault, Reach};
use unit::Units;

use crate::cmdline::Settings;
use crate::reaper::Reaper;

/// Longest secret that is taken, in bytes: what Kubernetes stores.
pub const SECRET_MAX: usize = 1 << 20;
/// How long a service may be on its way up, as long as its unit says that it is.
const STARTING: Duration = Duration::from_secs(30);
/// Between two attempts to reach one that is.
const TRY_AGAIN: Duration = Duration::from_millis(50);

/// A service of the contract.
#[derive(Clone, Copy, Debug)]
struct Service {
    /// Its socket's name, and its unit's.
    name: &'static str,
    /// What it does, after "service that".
    does: &'static str,
}

const IMAGE_PULL: Service = Service { name: service::IMAGE_PULL, does: "pulls images" };
const SEALED_SECRETS: Service = Service { name: service::SEALED_SECRETS, does: "opens sealed secrets" };
const SECURE_MOUNT: Service = Service { name: service::SECURE_MOUNT, does: "mounts encrypted volumes" };

/// The services of the guest. Clones are the same.
#[derive(Clone, Debug)]
pub struct Services {
    dir: PathBuf,
    pull_timeout: Duration,
    timeout: Duration,
    units: Units,
}

impl Services {
    /// Those with sockets in `dir`. Nobody is connected to before somebody asks.
    #[must_use]
    pub fn new(dir: &Path, settings: &Settings, reaper: Reaper) -> Self {
        Self {
            dir: dir.to_owned(),
            pull_timeout: settings.image_pull_timeout,
            timeout: settings.guest_service_timeout,
            units: Units::of_guest(reaper),
        }
    }

    /// The same, for somebody who waits no longer than this.
    #[must_use]
    pub fn within(&self, limit: Duration) -> Self {
        let (pull_timeout, timeout) = (self.pull_timeout.min(limit), self.timeout.min(limit));
        Self { pull_timeout, timeout, ..self.clone() }
    }

    /// Pulls the image `reference` to `<bundle>/rootfs`. The answer is its manifest's digest; empty where the service tells none.
    ///
    /// # Errors
    /// [`ServiceError`]. There may be something at `<bundle>` all the same.
    pub async fn pull_image(&self, reference: &str, bundle: &Path) -> Result<String, ServiceError> {
        let request = ImagePullRequest {
            image_url: reference.to_owned(),
            bundle_path: bundle.to_string_lossy().into_owned(),
            ..Default::default()
        };
        let call = |client, context| async move {
            ImagePullServiceClient::new(client).pull_image(context, &request).await
        };
        let digest = self.call(IMAGE_PULL, self.pull_timeout, call).await?.manifest_digest;
        if digest.is_empty() || is_digest(&digest) {
            Ok(digest)
        } else {
            Err(self.broken(IMAGE_PULL, "it tells a digest that is none".to_owned()).await)
        }
    }

    /// The text of a secret that begins with `sealed.`.
    ///
    /// # Errors
    /// [`ServiceError`]; never with anything of the secret in it.
    pub async fn unseal(&self, secret: &[u8]) -> Result<Vec<u8>, ServiceError> {
        let request = UnsealSecretRequest { secret: secret.to_owned(), ..Default::default() };
        let call = |client, context| async move {
            SealedSecretServiceClient::new(client).unseal_secret(context, &request).await
        };
        let plain = self.call(SEALED_SECRETS, self.timeout, call).await?.plaintext;
        if plain.len() > SECRET_MAX {
            let what = format!("it answers with a secret of {} bytes, {SECRET_MAX} are taken", plain.len());
            return Err(self.broken(SEALED_SECRETS, what).await);
        }
        Ok(plain)
    }

    /// Has a volume made and mounted.
    ///
    /// # Errors
    /// [`ServiceError`]. There may be something at the mount point all the same.
    pub async fn secure_mount(&self, request: SecureMountRequest) -> Result<(), ServiceError> {
        let call = |client, context| async move {
            SecureMountServiceClient::new(client).secure_mount(context, &request).await
        };
        self.call(SECURE_MOUNT, self.timeout, call).await.map(drop)
    }

    /// One call on a connection of its own.
    async fn call<T, F: Future<Output = ttrpc::Result<T>>>(
        &self,
        service: Service,
        limit: Duration,
        method: impl FnOnce(Client, Context) -> F,
    ) -> Result<T, ServiceError> {
        let work = async {
            let stream = match self.connect(service).await {
                Ok(stream) => stream,
                Err(reach) => return Err(self.unreachable(service, reach).await),
            };
            // The client's own bound only tells the service: ours is the one that is told as that.
            let told = limit.saturating_add(Duration::from_secs(1));
            let nanoseconds = i64::try_from(told.as_nanos()).unwrap_or(i64::MAX);
            let context = ttrpc::context::with_timeout(nanoseconds);
            match method(Client::new(Socket::new(stream)), context).await.map_err(Fault::of) {
                Ok(answer) => Ok(answer),
                Err(Fault::Absent) => Err(self.unreachable(service, Reach::NotServed).await),
                Err(Fault::Refused { code, text }) => {
                    Err(ServiceError::Refused { name: service.name, code, text })
                }
                Err(Fault::Broken(what)) => Err(self.broken(service, what).await),
            }
        };
        let late = |_| ServiceError::Late { name: service.name, limit };
        tokio::time::timeout(limit, work).await.map_err(late)?
    }

    /// Connects, and waits for a service whose unit is being started.
    async fn connect(&self, service: Service) -> Result<UnixStream, Reach> {
        let path = self.socket(service);
        let patience = tokio::time::Instant::now() + STARTING;
        let mut is_starting = None;
        loop {
            let reach = match reach(&path).await {
                Ok(stream) => return Ok(stream),
                Err(reach) => reach,
            };
            if tokio::time::Instant::now() > patience {
                return Err(reach);
            }
            // One look will do: a unit that fails while this waits is told when the patience has ended.
            let starting = match is_starting {
                Some(starting) => starting,
                None => *is_starting.insert(self.units.is_starting(service.name).await),
            };
            if !starting {
                return Err(reach);
            }
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }

    fn socket(&self, service: Service) -> PathBuf {
        self.dir.join(service.name).with_extension("socket")
    }

    async fn unreachable(&self, service: Service, reach: Reach) -> ServiceError {
        let unit = self.units.tell(service.name).await;
        ServiceError::Unreachable { does: service.does, socket: self.socket(service), reach, unit }
    }

    async fn broken(&self, service: Service, what: String) -> ServiceError {
        let unit = self.units.tell(service.name).await;
        ServiceError::Broken { name: service.name, what, unit }
    }
}

async fn reach(path: &Path) -> Result<UnixStream, Reach> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let linked = std::fs::symlink_metadata(path).is_ok();
            return Err(if linked { Reach::Dangling } else { Reach::NoSocket });
        }
        Err(error) => return Err(Reach::Failed(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(Reach::NotASocket),
        Ok(_) => {}
    }
    UnixStream::connect(path).await.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Reach::NoSocket,
        ErrorKind::ConnectionRefused => Reach::Deaf,
        _ => Reach::Failed(error),
    })
}

fn is_digest(text: &str) -> bool {
    let hex = |digits: &str| {
        digits.len() == 64 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    };
    text.strip_prefix("sha256:").is_some_and(hex)
}

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
