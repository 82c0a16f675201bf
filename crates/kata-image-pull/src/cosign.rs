//! Signatures as cosign leaves them beside an image, made with a key (ECDSA on P-256, SHA-256):
//!
//! ```text
//!   tag sha256-<hex>.sig ─▶ manifest ─▶ layer: payload (JSON, "simple signing"), its signature in an annotation
//!                                         └▶ critical.image.docker-manifest-digest: the image that was signed
//! ```

use base64::Engine as _;
use kata_oci::registry::Registry;
use kata_oci::{Descriptor, Digest};
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;

use crate::policy::PolicyError;

/// Kind of the layers that are payloads.
const PAYLOAD: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// The annotation with the signature of a payload, in base64.
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
/// What a payload says that it is.
const TYPE: &str = "cosign container image signature";
/// Longest payload that is read.
const PAYLOAD_LIMIT: u64 = 64 << 10;
/// Most signatures of one image that are looked at.
const MOST: usize = 32;
/// What stands before the point in the DER of a P-256 public key (RFC 5480, section 2): two identifiers, a bit string.
const SPKI_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// Length of an uncompressed point.
const POINT: usize = 65;

/// A file that is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Not PEM with a public key.
    #[error("not a public key in PEM")]
    Pem,
    /// Another algorithm or curve.
    #[error("not an ECDSA key on the curve P-256")]
    Kind,
}

/// Why a signature does not count.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// The registry's manifest has none.
    #[error("there is no payload with a signature")]
    Nothing,
    /// Not base64.
    #[error("the signature is not base64")]
    Encoding,
    /// No key made it.
    #[error("it was made by none of the keys, or for something else")]
    Key,
    /// The payload is of another shape.
    #[error("the payload is not one of cosign's")]
    Payload(#[source] Option<serde_json::Error>),
    /// A signature of another image.
    #[error("it signs {signed}, and the image is {image}")]
    Image {
        /// In the payload.
        signed: String,
        /// What was pulled.
        image: Digest,
    },
    /// A signature of an image that was pushed elsewhere.
    #[error("it signs an image of {signed}, not of {repository}")]
    Repository {
        /// In the payload.
        signed: String,
        /// Where the image is.
        repository: String,
    },
}

/// Someone whose signature counts.
#[derive(Debug)]
pub struct PublicKey {
    /// Uncompressed.
    point: Vec<u8>,
}

impl PublicKey {
    /// Reads PEM as cosign and openssl write it.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn from_pem(pem: &[u8]) -> Result<Self, KeyError> {
        let der = SubjectPublicKeyInfoDer::from_pem_slice(pem).map_err(|_| KeyError::Pem)?;
        match der.as_ref().strip_prefix(&SPKI_PREFIX) {
            Some(point) if point.len() == POINT && point.starts_with(&[4]) => {
                Ok(Self { point: point.to_vec() })
            }
            _ => Err(KeyError::Kind),
        }
    }

    fn made(&self, signature: &[u8], message: &[u8]) -> bool {
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &self.point).verify(message, signature).is_ok()
    }
}

/// What is signed, as far as it is looked at.
#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    identity: Identity,
    image: SignedImage,
    r#type: String,
}

#[derive(Deserialize)]
struct Identity {
    #[serde(rename = "docker-reference")]
    docker_reference: String,
}

#[derive(Deserialize)]
struct SignedImage {
    #[serde(rename = "docker-manifest-digest")]
    docker_manifest_digest: String,
}

/// Looks for a signature of one of `digests` by one of `keys`; for an image of `repository`, where that matters.
///
/// # Errors
/// [`PolicyError`]: there is none that counts.
pub async fn check(
    registry: &Registry,
    digests: &[&Digest],
    keys: &[PublicKey],
    repository: Option<&str>,
) -> Result<(), PolicyError> {
    let image = registry.reference().whole();
    let fetch = |error| PolicyError::Fetch(Box::new(error));
    let mut fault = None;
    for digest in digests {
        let Some(manifest) = registry.sibling(&tag(digest)).await.map_err(fetch)? else { continue };
        fault = fault.or(Some(SignatureError::Nothing));
        let payloads = manifest.layers.iter().filter(|layer| layer.media_type == PAYLOAD);
        for layer in payloads.take(MOST) {
            let payload = registry.blob(layer, "a signature", PAYLOAD_LIMIT).await.map_err(fetch)?;
            match verify(layer, &payload, digest, keys, repository) {
                Ok(()) => {
                    tracing::info!(image, %digest, "signature verified");
                    return Ok(());
                }
                Err(error) => fault = Some(error),
            }
        }
    }
    Err(match fault {
        Some(source) => PolicyError::Signature { image, source },
        None => PolicyError::Unsigned { image, tags: digests.iter().map(|digest| tag(digest)).collect() },
    })
}

/// Where the signatures of an image are.
fn tag(digest: &Digest) -> String {
    format!("sha256-{}.sig", digest.hex())
}

fn verify(
    layer: &Descriptor,
    payload: &[u8],
    image: &Digest,
    keys: &[PublicKey],
    repository: Option<&str>,
) -> Result<(), SignatureError> {
    let text =
        layer.annotations.as_ref().and_then(|all| all.get(SIGNATURE)).ok_or(SignatureError::Nothing)?;
    let signature = base64::engine::general_purpose::STANDARD
        .decode(text.trim())
        .map_err(|_| SignatureError::Encoding)?;
    // Before the payload is looked at: until here, anybody may have written it.
    if !keys.iter().any(|key| key.made(&signature, payload)) {
        return Err(SignatureError::Key);
    }
    let Payload { critical } =
        serde_json::from_slice(payload).map_err(|error| SignatureError::Payload(Some(error)))?;
    if critical.r#type != TYPE {
        return Err(SignatureError::Payload(None));
    }
    let signed = critical.image.docker_manifest_digest;
    if signed != image.to_string() {
        return Err(SignatureError::Image { signed, image: image.clone() });
    }
    let signed = critical.identity.docker_reference;
    match repository {
        Some(repository) if named(&signed) != repository => {
            Err(SignatureError::Repository { signed, repository: repository.to_owned() })
        }
        _ => Ok(()),
    }
}

/// The repository of a reference, without tag or digest. Docker's own registry has several names.
fn named(reference: &str) -> String {
    let whole = reference.split_once('@').map_or(reference, |(name, _)| name);
    let name = match whole.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => whole,
    };
    match name.strip_prefix("index.docker.io/") {
        Some(name) => format!("docker.io/{name}"),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};

    use super::*;

    struct Signer(EcdsaKeyPair);

    impl Signer {
        fn new() -> Self {
            let random = SystemRandom::new();
            let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
            let pair =
                EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.as_ref(), &random).unwrap();
            Self(pair)
        }

        fn public(&self) -> PublicKey {
            let der = [SPKI_PREFIX.as_slice(), self.0.public_key().as_ref()].concat();
            let text = base64::engine::general_purpose::STANDARD.encode(der);
            let pem = format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n");
            PublicKey::from_pem(pem.as_bytes()).unwrap()
        }

        fn layer(&self, payload: &[u8]) -> Descriptor {
            let signature = self.0.sign(&SystemRandom::new(), payload).unwrap();
            let text = base64::engine::general_purpose::STANDARD.encode(signature);
            serde_json::from_value(serde_json::json!({
                "mediaType": PAYLOAD, "digest": Digest::of(payload), "size": payload.len(),
                "annotations": { SIGNATURE: text },
            }))
            .unwrap()
        }
    }

    fn payload(image: &Digest, reference: &str, kind: &str) -> Vec<u8> {
        serde_json::json!({
            "critical": {
                "identity": { "docker-reference": reference },
                "image": { "docker-manifest-digest": image.to_string() },
                "type": kind,
            },
            "optional": null,
        })
        .to_string()
        .into_bytes()
    }

    #[test]
    fn a_signature_counts_for_its_image_repository_and_key_only() {
        let (signer, other) = (Signer::new(), Signer::new());
        let (image, another) = (Digest::of(b"image"), Digest::of(b"another"));
        let good = payload(&image, "r.test/app", TYPE);
        let layer = signer.layer(&good);
        let keys = [other.public(), signer.public()];
        let repository = Some("r.test/app");
        assert!(verify(&layer, &good, &image, &keys, repository).is_ok());
        assert!(matches!(verify(&layer, &good, &image, &keys[..1], repository), Err(SignatureError::Key)));
        assert!(matches!(
            verify(&layer, &good, &another, &keys, repository),
            Err(SignatureError::Image { .. })
        ));
        assert!(matches!(
            verify(&layer, &good, &image, &keys, Some("r.test/other")),
            Err(SignatureError::Repository { .. })
        ));
        assert!(verify(&layer, &good, &image, &keys, None).is_ok(), "any repository");
        let changed = payload(&another, "r.test/app", TYPE);
        assert!(matches!(verify(&layer, &changed, &another, &keys, repository), Err(SignatureError::Key)));
    }

    #[test]
    fn something_else_that_was_signed_with_the_key_is_no_signature_of_an_image() {
        let signer = Signer::new();
        let image = Digest::of(b"image");
        for text in [payload(&image, "r.test/app", "attestation"), b"{}".to_vec(), b"not json".to_vec()] {
            let found = verify(&signer.layer(&text), &text, &image, &[signer.public()], None);
            assert!(matches!(found, Err(SignatureError::Payload(_))), "{found:?}");
        }
    }

    #[test]
    fn keys_of_other_kinds_are_refused() {
        assert!(matches!(PublicKey::from_pem(b"nonsense"), Err(KeyError::Pem)));
        let pem = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----\n";
        assert!(matches!(PublicKey::from_pem(pem.as_bytes()), Err(KeyError::Kind)), "Ed25519");
    }

    #[test]
    fn references_in_payloads_are_compared_by_repository() {
        assert_eq!(named("r.test:5000/a/b:v1"), "r.test:5000/a/b");
        assert_eq!(named("r.test:5000/a/b"), "r.test:5000/a/b");
        assert_eq!(named("r.test/a@sha256:00"), "r.test/a");
        assert_eq!(named("index.docker.io/library/a"), "docker.io/library/a");
    }
}
