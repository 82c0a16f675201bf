//! Signatures of images as `cosign sign --key` leaves them in a registry, made with `openssl`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::containerd::Containerd;
use crate::host::stderr;
use crate::registry::{REGISTRY, Registry};

/// A pair of keys in a directory of its own: ECDSA on P-256.
pub struct Key(PathBuf);

impl Key {
    /// A new one in `dir`; `None` (said and counted) where `openssl` is missing.
    #[track_caller]
    pub fn new(dir: &Path) -> Option<Self> {
        if Command::new("openssl").arg("version").output().is_err() {
            crate::skip("openssl is not installed");
            return None;
        }
        fs::create_dir_all(dir).unwrap();
        let key = Self(dir.to_owned());
        key.openssl("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key");
        key.openssl("pkey -in key -pubout -out public.pem");
        Some(key)
    }

    /// The public key in PEM.
    pub fn public(&self) -> String {
        fs::read_to_string(self.0.join("public.pem")).unwrap()
    }

    /// Signs the image of `repository` with this digest, as one of that repository.
    #[track_caller]
    pub fn sign(&self, rig: &Containerd, registry: &Registry, repository: &str, digest: &str) {
        let payload = json!({
            "critical": {
                "identity": { "docker-reference": format!("{REGISTRY}/{repository}") },
                "image": { "docker-manifest-digest": digest },
                "type": "cosign container image signature",
            },
            "optional": null,
        });
        let (payload, config) = (payload.to_string(), "{}");
        fs::write(self.0.join("payload"), &payload).unwrap();
        self.openssl("dgst -sha256 -sign key -out signature payload");
        let signature = STANDARD.encode(fs::read(self.0.join("signature")).unwrap());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": sha256(config), "size": config.len(),
            },
            "layers": [{
                "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
                "digest": sha256(&payload), "size": payload.len(),
                "annotations": { "dev.cosignproject.cosign/signature": signature },
            }],
        });
        for blob in [payload.as_str(), config] {
            registry.push_blob(rig, repository, &sha256(blob), blob.as_bytes());
        }
        let tag = format!("{}.sig", digest.replace(':', "-"));
        registry.push_manifest(rig, repository, &tag, &manifest.to_string());
    }

    #[track_caller]
    fn openssl(&self, words: &str) {
        let mut command = Command::new("openssl");
        let output = command.args(words.split_whitespace()).current_dir(&self.0).output().unwrap();
        assert!(output.status.success(), "{words}: {}", stderr(&output));
    }
}

fn sha256(text: &str) -> String {
    let digest = Sha256::digest(text);
    digest.iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}
