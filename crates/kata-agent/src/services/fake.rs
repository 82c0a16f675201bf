//! For tests: services that answer as they are told to.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kata_api::guest_services::{
    ImagePullRequest, ImagePullResponse, SecureMountRequest, SecureMountResponse, UnsealSecretRequest,
    UnsealSecretResponse,
};
use kata_api::guest_services_ttrpc::{
    ImagePullService, SealedSecretService, SecureMountService, create_image_pull_service,
    create_sealed_secret_service, create_secure_mount_service,
};
use ttrpc::r#async::{Server, Service, TtrpcContext};

use super::Services;
use crate::cmdline::Settings;
use crate::reaper::Reaper;

/// What a service does with a request.
type Answer<Q, A> = Box<dyn Fn(&Q) -> ttrpc::Result<A> + Send + Sync>;

struct Fake<Q, A>(Answer<Q, A>);

#[async_trait]
impl ImagePullService for Fake<ImagePullRequest, ImagePullResponse> {
    async fn pull_image(
        &self,
        _: &TtrpcContext,
        request: ImagePullRequest,
    ) -> ttrpc::Result<ImagePullResponse> {
        (self.0)(&request)
    }
}

#[async_trait]
impl SealedSecretService for Fake<UnsealSecretRequest, UnsealSecretResponse> {
    async fn unseal_secret(
        &self,
        _: &TtrpcContext,
        request: UnsealSecretRequest,
    ) -> ttrpc::Result<UnsealSecretResponse> {
        (self.0)(&request)
    }
}

#[async_trait]
impl SecureMountService for Fake<SecureMountRequest, SecureMountResponse> {
    async fn secure_mount(
        &self,
        _: &TtrpcContext,
        request: SecureMountRequest,
    ) -> ttrpc::Result<SecureMountResponse> {
        (self.0)(&request)
    }
}

/// Serves until dropped.
pub(crate) struct Running(Option<Server>);

impl Running {
    /// The service goes, with its socket.
    pub(crate) async fn stop(mut self) {
        if let Some(mut server) = self.0.take() {
            let _ = server.shutdown().await;
        }
    }
}

async fn serve(dir: &Path, name: &str, services: HashMap<String, Service>) -> Running {
    let address = format!("unix://{}/{name}.socket", dir.display());
    let mut server = Server::new().bind(&address).unwrap().register_service(services);
    server.start().await.unwrap();
    Running(Some(server))
}

/// One that pulls images.
pub(crate) async fn pulls(
    dir: &Path,
    answer: impl Fn(&ImagePullRequest) -> ttrpc::Result<ImagePullResponse> + Send + Sync + 'static,
) -> Running {
    serve(dir, "image-pull", create_image_pull_service(Arc::new(Fake(Box::new(answer))))).await
}

/// One that opens secrets.
pub(crate) async fn unseals(
    dir: &Path,
    answer: impl Fn(&UnsealSecretRequest) -> ttrpc::Result<UnsealSecretResponse> + Send + Sync + 'static,
) -> Running {
    serve(dir, "sealed-secrets", create_sealed_secret_service(Arc::new(Fake(Box::new(answer))))).await
}

/// One that mounts volumes.
pub(crate) async fn mounts(
    dir: &Path,
    answer: impl Fn(&SecureMountRequest) -> ttrpc::Result<SecureMountResponse> + Send + Sync + 'static,
) -> Running {
    serve(dir, "secure-mount", create_secure_mount_service(Arc::new(Fake(Box::new(answer))))).await
}

/// Opens `sealed.X` as `open X`.
pub(crate) fn open(request: &UnsealSecretRequest) -> ttrpc::Result<UnsealSecretResponse> {
    let sealed = String::from_utf8(request.secret.clone()).unwrap();
    let plaintext = format!("open {}", sealed.strip_prefix("sealed.").unwrap()).into_bytes();
    Ok(UnsealSecretResponse { plaintext, ..Default::default() })
}

/// The way to those in `dir`, which waits for no more than this.
pub(crate) fn services(dir: &Path, timeout: Duration) -> Services {
    let settings =
        Settings { image_pull_timeout: timeout, guest_service_timeout: timeout, ..Settings::default() };
    Services::new(dir, &settings, Reaper::new())
}
