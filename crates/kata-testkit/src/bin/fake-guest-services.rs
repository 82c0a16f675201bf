//! Services of a guest that need no authority: for guest images and extensions that tests make, never for others.
//!
//! | socket | what it does |
//! |---|---|
//! | `sealed-secrets.socket` | the plaintext of `sealed.fake.TEXT` is TEXT; anything else is `INVALID_ARGUMENT` |
//! | `secure-mount.socket` | a volume of type `block-device` that asks for LUKS is a tmpfs with a file `OPTIONS`, which has what was asked for |
//!
//! `fake-guest-services [DIRECTORY]`, by default `/run/guest-services`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's program fails by panicking")]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use kata_api::guest::{SERVICES_DIR, service};
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
        std::fs::write(Path::new(&request.mount_point).join("OPTIONS"), text).unwrap();
        Ok(SecureMountResponse::new())
    }
}

fn main() {
    let dir = std::env::args().nth(1).unwrap_or_else(|| SERVICES_DIR.to_owned());
    std::fs::create_dir_all(&dir).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let services = [
            (service::SEALED_SECRETS, create_sealed_secret_service(Arc::new(Fake))),
            (service::SECURE_MOUNT, create_secure_mount_service(Arc::new(Fake))),
        ];
        let mut servers = Vec::new();
        for (name, service) in services {
            let path = Path::new(&dir).join(name).with_extension("socket");
            let _ = std::fs::remove_file(&path);
            let server = Server::new().bind(&format!("unix://{}", path.display())).unwrap();
            let mut server = server.register_service(service);
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
            server.start().await.unwrap();
            servers.push(server);
        }
        println!("ready");
        std::future::pending::<()>().await;
    });
}
