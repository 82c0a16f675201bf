//! What can be wrong with a configuration. All faults are reported together.

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::deprecation::{Deprecation, Refused};

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
    /// An annotation of the pod, by its full name.
    Annotation(String),
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
            Self::Annotation(name) => write!(f, "annotation {name}"),
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
    /// No such annotation, here or upstream.
    #[error("unknown annotation{}", .nearest.as_ref().map(|name| format!("; did you mean {name}?")).unwrap_or_default())]
    UnknownAnnotation {
        /// The valid annotation spelt most alike.
        nearest: Option<String>,
    },
    /// A value of upstream's that asks for what this version does not do. The file is well-formed, but no pod is made with
    /// it: whoever wrote the value counts on what it asks for.
    #[error("not carried out by this version; remove it{}", .default.map(|value| format!(" or set it to {value}")).unwrap_or_default())]
    Planned {
        /// A value that asks for nothing, as TOML.
        default: Option<&'static str>,
    },
    /// A word of upstream's that this version has nothing for. Like [`Fault::Planned`].
    #[error("{word:?} is not carried out by this version, which knows {}", .words.join(", "))]
    PlannedWord {
        /// What was written.
        word: String,
        /// What may be written.
        words: &'static [&'static str],
    },
    /// An annotation that the administrator has not opened.
    #[error("pods may not set it: add {listing:?} to {list} to let them")]
    Denied {
        /// What to write.
        listing: String,
        /// Where to write it.
        list: String,
    },
    /// A path in an annotation that lies nowhere the administrator allows.
    #[error("{path} is not below anything in {list}: {why}")]
    PathDenied {
        /// The path that the pod asked for.
        path: PathBuf,
        /// The key with the patterns.
        list: String,
        /// What is the matter with it.
        why: String,
    },
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
    /// Settings that are understood each, and that no machine can have together.
    #[error("{0}")]
    Unfit(String),
}

impl Fault {
    /// Whether the configuration can be understood all the same, and only no pod be made with it.
    pub fn is_unmet(&self) -> bool {
        matches!(self, Self::Planned { .. } | Self::PlannedWord { .. } | Self::Deprecated(_) | Self::Unfit(_))
    }
}

/// Something to know about a configuration that is not wrong.
#[derive(Clone, Debug)]
pub enum Remark {
    /// A key that this version does not act on, with a value that asks for nothing.
    Idle,
    /// Upstream's own part, which works otherwise than this version's: that is used.
    Foreign,
    /// A key that is gone, with a value that asks for nothing.
    Removed(&'static Deprecation),
    /// The section of a driver that is not the chosen one.
    NoDriver {
        /// How many keys are in it.
        keys: usize,
        /// Whether this version has the driver at all.
        known: bool,
    },
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => {
                f.write_str("upstream's virtio-fs daemon is started in another way; kata-virtiofsd is used")
            }
            Self::Idle => f.write_str("not acted on by this version; the value asks for nothing"),
            Self::Removed(item) => {
                write!(f, "removed [{} {}]; the value asks for nothing", item.id, item.title)
            }
            Self::NoDriver { keys, known } => {
                let why =
                    if *known { "not the driver that is chosen" } else { "no such driver in this version" };
                write!(f, "{why}; its {keys} settings are well-formed and not used")
            }
        }
    }
}

/// A remark, where it is due and on which key or section.
#[derive(Clone, Debug)]
pub struct Note {
    /// Where it was written.
    pub origin: Origin,
    /// Dotted path of the key or section.
    pub key: String,
    /// What there is to know.
    pub remark: Remark,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.origin, self.key, self.remark)
    }
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
