//! Services of a guest that need no authority: for extensions that tests make, never for images that anybody gets.
//!
//! | service | what it does |
//! |---|---|
//! | sealed secrets | the plaintext of `sealed.fake.TEXT` is TEXT; anything else is `INVALID_ARGUMENT` |
//! | secure mount | a volume of type `block-device` that asks for LUKS is a tmpfs with a file `files/OPTIONS`, which has what was asked for; of an emptyDir, containers see `files` |
//!
//! `fake-guest-services SOCKET` serves both on one socket, as programs for real guests do; names lead to it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's program fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use kata_api::guest_services::{
    SecureMountRequest, SecureMountResponse, UnsealSecretRequest, UnsealSecretResponse,
};
use kata_api::guest_services_ttrpc::{
    SealedSecretService, SecureMountService, create_sealed_secret_service, create_secure_mount_service,
};
use rustix::mount::{MountFlags, mount};
use ttrpc::r#async::{Server, TtrpcContext};
use ttrpc::{Code, get_status};

struct Fake;

fn refuse<T>(text: impl std::fmt::Display) -> ttrpc::Result<T> {
    Err(ttrpc::Error::RpcStatus(get_status(Code::INVALID_ARGUMENT, text)))
}

#[async_trait]
impl SealedSecretService for Fake {
    async fn unseal_secret(
        &self,
        _: &TtrpcContext,
        request: UnsealSecretRequest,
    ) -> ttrpc::Result<UnsealSecretResponse> {
        match request.secret.strip_prefix(b"sealed.fake.") {
            Some(text) => Ok(UnsealSecretResponse { plaintext: text.to_vec(), ..Default::default() }),
            None => refuse("no secret of this service's"),
        }
    }
}

#[async_trait]
impl SecureMountService for Fake {
    async fn secure_mount(
        &self,
        _: &TtrpcContext,
        request: SecureMountRequest,
    ) -> ttrpc::Result<SecureMountResponse> {
        let options: BTreeMap<_, _> = request.options.iter().collect();
        let encrypts = request.options.get("encryptionType").is_some_and(|kind| kind == "luks2");
        if request.volume_type != "block-device" || !encrypts {
            return refuse(format!("no volume of type {:?} with {options:?}", request.volume_type));
        }
        let made = mount("none", request.mount_point.as_str(), "tmpfs", MountFlags::empty(), None);
        if let Err(error) = made {
            return refuse(format!("cannot mount at {}: {error}", request.mount_point));
        }
        let text: String = options.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        let files = Path::new(&request.mount_point).join("files");
        fs::create_dir(&files).unwrap();
        fs::write(files.join("OPTIONS"), text).unwrap();
        Ok(SecureMountResponse::new())
    }
}

fn main() {
    let socket = std::env::args().nth(1).unwrap();
    let socket = Path::new(&socket);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let server = Server::new().bind(&format!("unix://{}", socket.display())).unwrap();
        fs::set_permissions(socket, PermissionsExt::from_mode(0o600)).unwrap();
        let server = server.register_service(create_sealed_secret_service(Arc::new(Fake)));
        let mut server = server.register_service(create_secure_mount_service(Arc::new(Fake)));
        server.start().await.unwrap();
        std::future::pending::<()>().await;
    });
}
