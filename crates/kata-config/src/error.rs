//! What can be wrong with a configuration. All faults are reported together.

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::deprecation::Refused;

/// Where a setting was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A file, with the line where known (from 1).
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: Option<usize>,
    },
    /// A variable of the environment.
    Environment(&'static str),
    /// An override on the command line.
    Override,
}

impl Origin {
    pub(crate) fn file(path: &Path, line: Option<usize>) -> Self {
        Self::File { path: path.to_owned(), line }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line: Some(line) } => write!(f, "{}:{line}", path.display()),
            Self::File { path, line: None } => write!(f, "{}", path.display()),
            Self::Environment(variable) => f.write_str(variable),
            Self::Override => f.write_str("--set"),
        }
    }
}

/// What is wrong with one setting.
#[derive(Debug, Error)]
pub enum Fault {
    /// The file could not be read.
    #[error("cannot be read: {0}")]
    Unreadable(std::io::Error),
    /// The text is not TOML.
    #[error("not valid TOML: {0}")]
    Syntax(String),
    /// An override without `=`.
    #[error("{0:?} is not of the form key.path=value")]
    NotAnAssignment(String),
    /// No such key, here or upstream.
    #[error("unknown key{}", .nearest.as_ref().map(|key| format!("; did you mean {key}?")).unwrap_or_default())]
    Unknown {
        /// The valid key spelt most alike.
        nearest: Option<String>,
    },
    /// A key of upstream's that this version does not carry.
    #[error("not supported by this version; remove the key")]
    NotSupported,
    /// Something that was removed, is off by default, or is deprecated where the user wants none of that.
    #[error(transparent)]
    Deprecated(Refused),
    /// A value of another type.
    #[error("expected {expected}, found {found}")]
    WrongType {
        /// The type that the key has.
        expected: &'static str,
        /// The type that was written.
        found: &'static str,
    },
    /// The right type, an impossible value.
    #[error("{0}")]
    Invalid(String),
    /// Two settings that cannot both hold.
    #[error("{0}")]
    Contradiction(String),
}

/// One fault, where it is and which key it is about.
#[derive(Debug, Error)]
pub struct ConfigError {
    /// Where it was written.
    pub origin: Origin,
    /// Dotted path of the key; empty where the fault is about a whole file.
    pub key: String,
    /// What is wrong.
    pub fault: Fault,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key.as_str() {
            "" => write!(f, "{}: {}", self.origin, self.fault),
            key => write!(f, "{}: {key}: {}", self.origin, self.fault),
        }
    }
}

/// All faults of one configuration, in the order of its layers. Never empty. One line for each.
#[derive(Debug, Error)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if index == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}
