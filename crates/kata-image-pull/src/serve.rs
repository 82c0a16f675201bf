//! The socket, the service on it, and its end.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use kata_api::guest::{SERVICES_DIR, service};
use kata_api::guest_services::{ImagePullRequest, ImagePullResponse};
use kata_api::guest_services_ttrpc::{ImagePullService, create_image_pull_service};
use kata_oci::registry::RegistryError;
use kata_oci::{ImageError, StoreError, UnpackError};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::r#async::{Server, TtrpcContext};
use ttrpc::{Code, get_status};

use crate::bundle::BundleError;
use crate::config::Config;
use crate::policy::PolicyError;
use crate::pull::{PullError, Puller};
use crate::words::sentence;

/// The service cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket.
    #[error("cannot {action} {}", path.display())]
    Socket {
        /// What was tried.
        action: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Something else is where the socket should be.
    #[error("{} is there, and is no socket", .0.display())]
    NoSocket(PathBuf),
    /// What systemd hands over is not what the service needs.
    #[error("systemd has handed over {0} sockets, and one is needed")]
    HandedOver(usize),
    /// The system.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The RPC server.
    #[error("cannot serve")]
    Rpc(#[source] ttrpc::Error),
    /// The directory of layers.
    #[error(transparent)]
    Pull(#[from] PullError),
}

/// Serves until a signal asks to end.
///
/// # Errors
/// [`ServeError`].
pub fn run(config: Config, socket: Option<&Path>) -> Result<(), ServeError> {
    let listener = match handed_over()? {
        Some(listener) => listener,
        None => {
            let usual = Path::new(SERVICES_DIR).join(service::IMAGE_PULL).with_extension("socket");
            bind(socket.unwrap_or(&usual))?
        }
    };
    let puller = Arc::new(Puller::new(config)?);
    let system = |action| move |source| ServeError::System { action, source };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(system("start the runtime"))?;
    let served = runtime.block_on(async {
        let mut ends = signal(SignalKind::terminate()).map_err(system("wait for SIGTERM"))?;
        let mut interrupts = signal(SignalKind::interrupt()).map_err(system("wait for SIGINT"))?;
        let listener = tokio::net::UnixListener::from_std(listener).map_err(system("listen"))?;
        let service = create_image_pull_service(Arc::new(Service { puller }));
        let mut server = Server::new().add_listener(listener.into()).register_service(service);
        server.start().await.map_err(ServeError::Rpc)?;
        tell(&[NotifyState::Ready]);
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "serving");
        tokio::select! {
            _ = ends.recv() => {}
            _ = interrupts.recv() => {}
        }
        tell(&[NotifyState::Stopping]);
        // Pulls end with their connections.
        server.shutdown().await.map_err(ServeError::Rpc)
    });
    // A thread that the kernel holds would keep the service from its end; the next one sweeps.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    served
}

/// The socket that systemd listens on for the service (sd_listen_fds(3)).
fn handed_over() -> Result<Option<UnixListener>, ServeError> {
    let fault = |source| ServeError::System { action: "take over the socket from systemd", source };
    let fds: Vec<RawFd> = sd_notify::listen_fds().map_err(fault)?.collect();
    match fds.as_slice() {
        [] => Ok(None),
        [fd] => {
            // SAFETY: systemd has opened the descriptor for this process, and nothing here closes it meanwhile.
            let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
            let listener = UnixListener::from(fd.try_clone_to_owned().map_err(fault)?);
            listener.set_nonblocking(true).map_err(fault)?;
            // One of another kind would fail at each connection.
            listener.local_addr().map_err(fault)?;
            Ok(Some(listener))
        }
        several => Err(ServeError::HandedOver(several.len())),
    }
}

/// Listens at `path`, for root alone. A socket that nobody listens on any more makes room.
fn bind(path: &Path) -> Result<UnixListener, ServeError> {
    let fault = |action| move |source| ServeError::Socket { action, path: path.to_owned(), source };
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(fault("make the directory of"))?;
    }
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fault("look at")(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(ServeError::NoSocket(path.to_owned())),
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(fault("listen on")(io::ErrorKind::AddrInUse.into()));
        }
        Ok(_) => fs::remove_file(path).map_err(fault("replace"))?,
    }
    let listener = UnixListener::bind(path).map_err(fault("listen on"))?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(fault("set the mode of"))?;
    listener.set_nonblocking(true).map_err(fault("set up"))?;
    Ok(listener)
}

/// Tells systemd, if it wants to know.
fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd cannot be told");
    }
}

struct Service {
    puller: Arc<Puller>,
}

#[async_trait]
impl ImagePullService for Service {
    async fn pull_image(
        &self,
        _: &TtrpcContext,
        request: ImagePullRequest,
    ) -> ttrpc::Result<ImagePullResponse> {
        let began = Instant::now();
        let image = &request.image_url;
        match self.puller.pull(image, &request.bundle_path).await {
            Ok(digest) => {
                let milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                tracing::info!(bundle = request.bundle_path, %digest, milliseconds, "pulled");
                Ok(ImagePullResponse { manifest_digest: digest.to_string(), ..Default::default() })
            }
            Err(error) => {
                let text = sentence(&error);
                tracing::error!(bundle = request.bundle_path, "{text}");
                Err(ttrpc::Error::RpcStatus(get_status(code(&error), text)))
            }
        }
    }
}

/// What kind of failure it is for the caller; docs/guest-services.md has the table.
fn code(error: &PullError) -> Code {
    match error {
        PullError::Timeout { .. } => Code::DEADLINE_EXCEEDED,
        PullError::NoResolver { .. } => Code::UNAVAILABLE,
        PullError::Busy(_) | PullError::Bundle(BundleError::Exists(_)) => Code::ALREADY_EXISTS,
        PullError::Bundle(BundleError::Place { .. }) => Code::INVALID_ARGUMENT,
        PullError::Bundle(_) | PullError::Store(_) => Code::INTERNAL,
        PullError::Policy { source, .. } => match &**source {
            PolicyError::Fetch(error) => image_code(error),
            _ => Code::PERMISSION_DENIED,
        },
        PullError::Image { source, .. } => image_code(source),
    }
}

fn image_code(error: &ImageError) -> Code {
    match error {
        ImageError::Registry(RegistryError::Reference { .. }) => Code::INVALID_ARGUMENT,
        ImageError::Registry(error) if error.is_unauthorized() => Code::UNAUTHENTICATED,
        ImageError::Registry(error) if error.is_not_found() => Code::NOT_FOUND,
        ImageError::Registry(error) if error.is_corrupt() => Code::DATA_LOSS,
        ImageError::Registry(RegistryError::Pull { .. }) => Code::UNAVAILABLE,
        ImageError::NoSuchImage { .. } | ImageError::Platform { .. } => Code::NOT_FOUND,
        ImageError::Blob(_) => Code::DATA_LOSS,
        ImageError::Store(
            StoreError::Layers { .. }
            | StoreError::Size { .. }
            | StoreError::Unpack { source: UnpackError::TooLarge | UnpackError::TooMany, .. },
        ) => Code::RESOURCE_EXHAUSTED,
        ImageError::Interrupted => Code::CANCELLED,
        _ => Code::INTERNAL,
    }
}
