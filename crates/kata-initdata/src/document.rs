//! The document, and the form in which it travels.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::read::{GzDecoder, GzEncoder};
use serde::Deserialize;
use sha2::{Digest, Sha256, Sha384, Sha512};

/// Most bytes of the compressed document. All annotations of a Kubernetes object together have 256 KiB.
pub(crate) const COMPRESSED_MAX: u64 = 1024 * 1024;
/// Most bytes of the document.
const RAW_MAX: u64 = 8 * 1024 * 1024;
/// Longest name of a key: that of a file.
const NAME_MAX: usize = 255;
/// Most keys.
const KEYS_MAX: usize = 256;
/// The version that is understood.
const VERSION: &str = "0.1.0";
/// The key that holds the agent's policy.
pub const POLICY: &str = "policy.rego";
/// The file that holds the whole document, beside those of the keys.
pub(crate) const WHOLE: &str = "initdata.toml";

/// Why something is no initdata.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// The annotation is not base64.
    #[error("is not base64")]
    Base64(#[from] base64::DecodeError),
    /// The bytes do not unpack.
    #[error("is not gzip, or is damaged")]
    Gzip(#[source] std::io::Error),
    /// More than is taken.
    #[error("is larger than {limit} bytes {state}")]
    TooLarge {
        /// What there may be.
        limit: u64,
        /// `compressed`, `unpacked`.
        state: &'static str,
    },
    /// The document is no text.
    #[error("is not UTF-8")]
    Text(#[source] std::str::Utf8Error),
    /// The document is not TOML of this form.
    #[error("is not initdata")]
    Form(#[source] Box<toml::de::Error>),
    /// A document of another version.
    #[error("has version {0:?}, and only {VERSION:?} is understood")]
    Version(String),
    /// A key that can be no file of its own.
    #[error(
        "has the key {0:?}, which can be no file name: letters, digits, '.', '_' and '-' can, at most {NAME_MAX}, no '.' at the start, \
         and not {WHOLE:?}"
    )]
    Key(String),
    /// Too many keys.
    #[error("has {0} keys; at most {KEYS_MAX} are taken")]
    Keys(usize),
}

/// The hash function that the document names for its own digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// SHA-256, 32 bytes.
    Sha256,
    /// SHA-384, 48 bytes.
    Sha384,
    /// SHA-512, 64 bytes.
    Sha512,
}

impl Algorithm {
    fn digest(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::Sha256 => Sha256::digest(bytes).to_vec(),
            Self::Sha384 => Sha384::digest(bytes).to_vec(),
            Self::Sha512 => Sha512::digest(bytes).to_vec(),
        }
    }
}

/// As the document writes it.
impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    version: String,
    algorithm: Algorithm,
    #[serde(default)]
    data: BTreeMap<String, String>,
}

/// A document that can be used. What it holds may be secret: it has no `Debug` that shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Initdata {
    raw: Vec<u8>,
    algorithm: Algorithm,
    digest: Vec<u8>,
    data: BTreeMap<String, String>,
}

impl fmt::Debug for Initdata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys: Vec<&String> = self.data.keys().collect();
        f.debug_struct("Initdata")
            .field("algorithm", &self.algorithm)
            .field("keys", &keys)
            .finish_non_exhaustive()
    }
}

impl Initdata {
    /// Reads the TOML.
    ///
    /// # Errors
    /// Whatever is not a document of version 0.1.0 whose keys can be files.
    pub fn parse(raw: Vec<u8>) -> Result<Self, DocumentError> {
        let text = std::str::from_utf8(&raw).map_err(DocumentError::Text)?;
        // The error of the parser quotes a line of the document, which may be secret; only its message is kept.
        let form: Form = toml::from_str(text).map_err(|mut error| {
            error.set_input(None);
            DocumentError::Form(Box::new(error))
        })?;
        if form.version != VERSION {
            return Err(DocumentError::Version(form.version));
        }
        if form.data.len() > KEYS_MAX {
            return Err(DocumentError::Keys(form.data.len()));
        }
        if let Some(key) = form.data.keys().find(|key| !is_file_name(key)) {
            return Err(DocumentError::Key(key.clone()));
        }
        let digest = form.algorithm.digest(&raw);
        Ok(Self { raw, algorithm: form.algorithm, digest, data: form.data })
    }

    /// Unpacks and reads a compressed document.
    ///
    /// # Errors
    /// Too large, not gzip, or not a document.
    pub fn from_gzip(gzip: &[u8]) -> Result<Self, DocumentError> {
        if gzip.len() as u64 > COMPRESSED_MAX {
            return Err(DocumentError::TooLarge { limit: COMPRESSED_MAX, state: "compressed" });
        }
        let mut raw = Vec::new();
        // One byte more than is taken tells a bomb from a large document.
        GzDecoder::new(gzip).take(RAW_MAX + 1).read_to_end(&mut raw).map_err(DocumentError::Gzip)?;
        if raw.len() as u64 > RAW_MAX {
            return Err(DocumentError::TooLarge { limit: RAW_MAX, state: "unpacked" });
        }
        Self::parse(raw)
    }

    /// Reads the value of the annotation `io.katacontainers.config.hypervisor.cc_init_data`: base64 of gzip of the TOML.
    ///
    /// # Errors
    /// As of [`Self::from_gzip`], and what is not base64.
    pub fn from_annotation(text: &str) -> Result<Self, DocumentError> {
        Self::from_gzip(&STANDARD.decode(text.trim())?)
    }

    /// The value of the annotation for this document.
    ///
    /// # Errors
    /// None that are known; compressing into memory cannot fail.
    pub fn to_annotation(&self) -> Result<String, DocumentError> {
        Ok(STANDARD.encode(self.to_gzip()?))
    }

    pub(crate) fn to_gzip(&self) -> Result<Vec<u8>, DocumentError> {
        let mut gzip = Vec::new();
        GzEncoder::new(&*self.raw, Compression::best())
            .read_to_end(&mut gzip)
            .map_err(DocumentError::Gzip)?;
        Ok(gzip)
    }

    /// The TOML, byte for byte.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// What the digest is made with.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The digest of [`Self::raw`]: 32, 48 or 64 bytes.
    pub fn digest(&self) -> &[u8] {
        &self.digest
    }

    /// The digest as a TEE's field of `size` bytes holds it: cut, or filled with zeroes.
    pub fn host_data(&self, size: usize) -> Vec<u8> {
        let mut field = self.digest.clone();
        field.resize(size, 0);
        field
    }

    /// The files: their names and what they hold.
    pub fn data(&self) -> &BTreeMap<String, String> {
        &self.data
    }
}

/// Whether a key can be a file beside the others.
fn is_file_name(key: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !key.is_empty()
        && key.len() <= NAME_MAX
        && key.chars().all(allowed)
        && !key.starts_with('.')
        && key != WHOLE
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::write::GzEncoder as Writer;
    use proptest::prelude::*;

    use super::*;

    const TEXT: &str =
        "version = \"0.1.0\"\nalgorithm = \"sha384\"\n[data]\n\"policy.rego\" = 'package agent_policy'\n";

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new(), Compression::fast());
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    fn fault(text: &str) -> String {
        Initdata::parse(text.into()).unwrap_err().to_string()
    }

    #[test]
    fn digest_is_of_the_bytes_as_they_came() {
        let initdata = Initdata::parse(TEXT.into()).unwrap();
        assert_eq!(initdata.digest(), &Sha384::digest(TEXT)[..]);
        assert_eq!((initdata.raw(), initdata.algorithm().to_string().as_str()), (TEXT.as_bytes(), "sha384"));
        assert_eq!(initdata.data()["policy.rego"], "package agent_policy");
        let spaced = Initdata::parse(format!("{TEXT}\n").into()).unwrap();
        assert_ne!(initdata.digest(), spaced.digest());
    }

    #[test]
    fn digest_is_cut_or_filled_to_the_field_of_the_hardware() {
        let initdata = Initdata::parse(TEXT.into()).unwrap();
        assert_eq!(initdata.host_data(32), initdata.digest()[..32]);
        assert_eq!(initdata.host_data(48), initdata.digest());
        let filled = initdata.host_data(64);
        assert_eq!((&filled[..48], &filled[48..]), (initdata.digest(), &[0; 16][..]));
    }

    #[test]
    fn annotation_holds_the_document() {
        let initdata = Initdata::parse(TEXT.into()).unwrap();
        assert_eq!(Initdata::from_annotation(&initdata.to_annotation().unwrap()).unwrap(), initdata);
        assert!(matches!(Initdata::from_annotation("%"), Err(DocumentError::Base64(_))));
        let plain = STANDARD.encode(TEXT);
        assert!(matches!(Initdata::from_annotation(&plain), Err(DocumentError::Gzip(_))));
        let cut = packed(TEXT.as_bytes());
        assert!(matches!(Initdata::from_gzip(&cut[..cut.len() - 9]), Err(DocumentError::Gzip(_))));
    }

    #[test]
    fn bomb_is_not_unpacked() {
        let bomb = packed(&vec![b'#'; 64 * 1024 * 1024]);
        assert!(bomb.len() < 1024 * 1024);
        let error = Initdata::from_gzip(&bomb).unwrap_err().to_string();
        assert_eq!(error, "is larger than 8388608 bytes unpacked");
        let error = Initdata::from_gzip(&vec![0; 1024 * 1024 + 1]).unwrap_err().to_string();
        assert_eq!(error, "is larger than 1048576 bytes compressed");
    }

    #[test]
    fn key_that_is_no_file_name_is_refused() {
        for key in ["../etc/passwd", "a/b", "", ".", "..", ".hidden", "initdata.toml", "nul\\u0000", "ä"] {
            let text = format!("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"{key}\" = \"\"\n");
            assert!(fault(&text).contains("can be no file name"), "{key}");
        }
        let text =
            format!("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n{} = \"\"\n", "k".repeat(256));
        assert!(fault(&text).contains("can be no file name"));
    }

    #[test]
    fn another_version_and_another_form_are_refused() {
        assert_eq!(
            fault("version = \"0.2.0\"\nalgorithm = \"sha256\"\n"),
            "has version \"0.2.0\", and only \"0.1.0\" is understood"
        );
        for text in [
            "",
            "version = \"0.1.0\"",
            "version = \"0.1.0\"\nalgorithm = \"sha-256\"",
            &format!("more = 1\n{TEXT}"),
        ] {
            assert_eq!(fault(text), "is not initdata", "{text}");
        }
        assert!(matches!(Initdata::parse(vec![0xff]), Err(DocumentError::Text(_))));
    }

    #[test]
    fn fault_and_debug_do_not_show_what_the_document_holds() {
        let secret = TEXT.replace("package agent_policy", "hunter2");
        let initdata = Initdata::parse(secret.clone().into()).unwrap();
        assert!(
            !format!("{initdata:?}").contains("hunter2") && format!("{initdata:?}").contains("policy.rego")
        );
        let DocumentError::Form(source) =
            Initdata::parse(secret.replace("\n[data]", "\nx =\n[data]").into()).unwrap_err()
        else {
            panic!()
        };
        assert!(!source.to_string().contains("hunter2"), "{source}");
        let DocumentError::Form(source) =
            Initdata::parse(secret.replace("'hunter2'", "hunter2").into()).unwrap_err()
        else {
            panic!()
        };
        assert!(!source.to_string().contains("hunter2"), "{source}");
    }

    proptest! {
        #[test]
        fn whatever_comes_is_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..512), text in ".*") {
            let _ = Initdata::from_gzip(&bytes);
            let _ = Initdata::from_gzip(&packed(&bytes));
            let _ = Initdata::from_annotation(&text);
            let _ = Initdata::parse(text.into_bytes());
        }
    }
}
