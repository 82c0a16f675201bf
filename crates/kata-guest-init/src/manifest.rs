//! `components.toml`, schema 1: what an extension brings, in the words of its author.
//!
//! ```toml
//! schema_version = 1
//! [paths]                                     # files, for variables
//! ocicrypt-config = "etc/ocicrypt_config.json"
//!
//! [[process]]
//! id = "attestation-agent"
//! level = 1                                   # 0: not started; a process follows those of lower levels
//! path = "usr/local/bin/attestation-agent"    # below the extension; or select and variants
//! select = "${attester_variant}"              # which variant; `default` where it is empty
//! variants.default.path = "usr/local/bin/attestation-agent"
//! args = ["--attestation_sock", "${aa_attestation_uri}"]
//! optional_args = [{ when = "initdata_toml_path", args = ["--initdata-toml", "${initdata_toml_path}"] }]
//! config = "${aa_config_path}"                # given as `-c FILE` where the file exists
//! env = { PATH = "${extension_root}/usr/sbin:/usr/bin" }
//! wait_socket = "${aa_attestation_socket}"    # started when this can be connected to
//! timeout_secs = "${launch_process_timeout}"
//! guest_services = ["get-resource"]           # of this project: names under /run/guest-services
//! network_namespace = "/run/netns/pod"        # of this project
//! ```
//!
//! Unknown keys are errors: a rule that is not understood is not one that may be left out.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Where an extension has it.
pub const PATH: &str = "etc/kata-extensions/components.toml";
/// No manifest is longer, in bytes.
pub const LENGTH_MAX: usize = 64 << 10;
const PROCESSES_MAX: usize = 32;

/// A manifest that makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// No UTF-8.
    #[error("it is not UTF-8")]
    Text(#[from] std::str::Utf8Error),
    /// No TOML, or keys that are none.
    #[error("it is no manifest")]
    Toml(#[from] toml::de::Error),
    /// Another schema.
    #[error("schema_version {0}: this guest knows 1")]
    Schema(u32),
    /// More than anybody needs.
    #[error("{0} processes are more than {PROCESSES_MAX}")]
    Many(usize),
    /// Longer than anybody needs.
    #[error("it is longer than {LENGTH_MAX} bytes")]
    Long,
}

/// The manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    schema_version: u32,
    /// Files, by what they are.
    #[serde(default)]
    pub paths: BTreeMap<String, String>,
    /// Programs to start.
    #[serde(default)]
    pub process: Vec<Declared>,
}

/// A program as it is declared; texts may have variables.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Declared {
    /// What it is called.
    pub id: String,
    /// Its turn; 0 for one that is not started.
    #[serde(default)]
    pub level: u32,
    /// Its file, below the extension.
    pub path: Option<String>,
    /// Which variant.
    pub select: Option<String>,
    /// The choice.
    #[serde(default)]
    pub variants: BTreeMap<String, Variant>,
    /// Arguments.
    #[serde(default)]
    pub args: Vec<String>,
    /// Arguments for when something is there.
    #[serde(default)]
    pub optional_args: Vec<Optional>,
    /// Its configuration file.
    pub config: Option<String>,
    /// Environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Where it listens.
    pub wait_socket: Option<String>,
    /// How long it may take to listen, in seconds.
    pub timeout_secs: Option<String>,
    /// What it does for the agent.
    #[serde(default)]
    pub guest_services: Vec<String>,
    /// Where it has its network, if not in the guest's.
    pub network_namespace: Option<String>,
}

/// Arguments that depend on a variable.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optional {
    /// The variable.
    pub when: String,
    /// The arguments.
    pub args: Vec<String>,
}

/// One build of a program out of several.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Instead of the process's.
    pub path: Option<String>,
    /// Behind the process's.
    #[serde(default)]
    pub args: Vec<String>,
    /// Over the process's.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

impl Manifest {
    /// Reads a manifest.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > LENGTH_MAX {
            return Err(ManifestError::Long);
        }
        let text = std::str::from_utf8(bytes)?;
        // First the version alone: a later schema is told as that, and not as keys that nobody knows.
        #[derive(Deserialize)]
        struct Version {
            schema_version: u32,
        }
        let Version { schema_version } = toml::from_str(text)?;
        if schema_version != 1 {
            return Err(ManifestError::Schema(schema_version));
        }
        let manifest: Self = toml::from_str(text)?;
        match manifest.process.len() {
            0..=PROCESSES_MAX => Ok(manifest),
            many => Err(ManifestError::Many(many)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_without_version_or_of_another_one_is_refused() {
        assert!(matches!(Manifest::parse(b""), Err(ManifestError::Toml(_))));
        assert!(matches!(Manifest::parse(b"schema_version = 2\nnew = 1"), Err(ManifestError::Schema(2))));
        assert!(Manifest::parse(b"schema_version = 1").unwrap().process.is_empty());
    }

    #[test]
    fn an_unknown_key_is_told_by_its_name() {
        for text in
            ["user = 'x'", "[[process]]\nid = 'a'\nuser = 'x'", "[[process]]\nid='a'\nvariants.b.user=1"]
        {
            let error = Manifest::parse(format!("schema_version = 1\n{text}").as_bytes()).unwrap_err();
            let source = std::error::Error::source(&error).unwrap().to_string();
            assert!(source.contains("user"), "{source}");
        }
    }

    #[test]
    fn a_huge_manifest_is_refused_before_it_is_read() {
        let text = format!("schema_version = 1\n#{}", "x".repeat(LENGTH_MAX));
        assert!(matches!(Manifest::parse(text.as_bytes()), Err(ManifestError::Long)));
        let text = format!("schema_version = 1\n{}", "[[process]]\nid = 'a'\n".repeat(33));
        assert!(matches!(Manifest::parse(text.as_bytes()), Err(ManifestError::Many(33))));
    }

    #[test]
    fn what_is_no_text_or_no_toml_or_deep_is_refused() {
        assert!(matches!(Manifest::parse(b"\xff"), Err(ManifestError::Text(_))));
        let deep = format!("schema_version = 1\nx = {}", "[".repeat(60_000));
        assert!(matches!(Manifest::parse(deep.as_bytes()), Err(ManifestError::Toml(_))));
        assert!(matches!(Manifest::parse(b"schema_version = -1"), Err(ManifestError::Toml(_))));
    }
}
