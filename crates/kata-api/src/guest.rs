//! Paths and names inside the guest that both sides rely on.

/// Tag of the virtio-fs share that holds the pod's files.
pub const SHARE_TAG: &str = "kataShared";
/// Where the share is mounted in the guest.
pub const SHARE_DIR: &str = "/run/kata-containers/shared/containers";
/// Storage that lives as long as the sandbox (`shm`, ephemeral volumes).
pub const SANDBOX_DIR: &str = "/run/kata-containers/sandbox";
/// Per-container state of the agent.
pub const CONTAINER_DIR: &str = "/run/kata-containers";

/// Where services inside of the guest listen, each on `<name>.socket`.
pub const SERVICES_DIR: &str = "/run/guest-services";
/// Names of the services that there may be, see `proto/guest_services.proto`.
pub mod service {
    /// Pulls images.
    pub const IMAGE_PULL: &str = "image-pull";
    /// Unseals secrets.
    pub const SEALED_SECRETS: &str = "sealed-secrets";
    /// Mounts volumes that only the guest can read.
    pub const SECURE_MOUNT: &str = "secure-mount";
    /// Fetches resources of an authority.
    pub const GET_RESOURCE: &str = "get-resource";
}

#[cfg(test)]
mod tests {
    use crate::guest_services::{
        GetResourceRequest, GetResourceResponse, ImagePullRequest, ImagePullResponse, SecureMountRequest,
        UnsealSecretRequest, UnsealSecretResponse,
    };

    /// Numbers and kinds of the fields in a message, one byte each: all are of kind 2, and below 16.
    fn tags(message: &impl protobuf::Message) -> Vec<u8> {
        let bytes = message.write_to_bytes().unwrap();
        let mut rest = bytes.as_slice();
        let mut tags = Vec::new();
        while let [tag, length, after @ ..] = rest {
            tags.push(*tag);
            rest = &after[usize::from(*length)..];
        }
        tags
    }

    #[test]
    fn the_numbers_of_guest_services_are_those_that_others_use() {
        let field = |number: u8| number << 3 | 2;
        let x = || "x".to_owned();
        let mut pull = ImagePullRequest::new();
        (pull.image_url, pull.bundle_path) = (x(), x());
        assert_eq!(tags(&pull), [field(1), field(2)]);
        let mut pulled = ImagePullResponse::new();
        pulled.manifest_digest = x();
        assert_eq!(tags(&pulled), [field(1)]);
        let mut mount = SecureMountRequest::new();
        (mount.volume_type, mount.mount_point) = (x(), x());
        mount.options.insert(x(), x());
        mount.flags.push(x());
        let mut found = tags(&mount);
        found.sort_unstable();
        assert_eq!(found, [field(1), field(2), field(3), field(4)]);
        let (mut unseal, mut unsealed) = (UnsealSecretRequest::new(), UnsealSecretResponse::new());
        (unseal.secret, unsealed.plaintext) = (b"x".to_vec(), b"x".to_vec());
        assert_eq!((tags(&unseal), tags(&unsealed)), (vec![field(1)], vec![field(1)]));
        let (mut get, mut got) = (GetResourceRequest::new(), GetResourceResponse::new());
        (get.resource_path, got.resource) = (x(), b"x".to_vec());
        assert_eq!((tags(&get), tags(&got)), (vec![field(1)], vec![field(1)]));
    }
}
