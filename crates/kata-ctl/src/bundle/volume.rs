//! Files and directories of the host in a container: `-v SRC:DST[:ro]`.

use std::io;
use std::path::Path;

/// A bind mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// On the host: absolute, links resolved.
    pub source: String,
    /// In the container: absolute.
    pub destination: String,
    /// No writing.
    pub read_only: bool,
}

/// A volume that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// Not of the form.
    #[error("volume {0:?} is not SRC:DST[:ro|:rw]")]
    Form(String),
    /// An unknown option.
    #[error("volume {volume:?} has the option {option:?}; only ro and rw are supported")]
    Option {
        /// The volume.
        volume: String,
        /// The option.
        option: String,
    },
    /// A place in the container that depends on something, or is its root.
    #[error("volume {volume:?}: {destination:?} is not an absolute path below the container's root")]
    Destination {
        /// The volume.
        volume: String,
        /// Its place.
        destination: String,
    },
    /// Nothing there on the host.
    #[error("volume {volume:?}: cannot use {source_path:?}")]
    Source {
        /// The volume.
        volume: String,
        /// The host's path.
        source_path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Volume {
    /// Reads `SRC:DST[:ro]`. SRC has to exist: nothing is made on the host behind the user's back.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn parse(text: &str) -> Result<Self, VolumeError> {
        let form = || VolumeError::Form(text.to_owned());
        let mut parts = text.split(':');
        let (source, destination) = (parts.next().unwrap_or_default(), parts.next().ok_or_else(form)?);
        let read_only = match parts.next() {
            None | Some("rw") => false,
            Some("ro") => true,
            Some(option) => {
                return Err(VolumeError::Option { volume: text.to_owned(), option: option.to_owned() });
            }
        };
        if source.is_empty() || parts.next().is_some() {
            return Err(form());
        }
        let at_root = Path::new(destination).components().count() < 2;
        if !destination.starts_with('/') || at_root || destination.split('/').any(|part| part == "..") {
            let destination = destination.to_owned();
            return Err(VolumeError::Destination { volume: text.to_owned(), destination });
        }
        let fault = |error| VolumeError::Source {
            volume: text.to_owned(),
            source_path: source.to_owned(),
            source: error,
        };
        let real = Path::new(source).canonicalize().map_err(fault)?;
        let source = real.into_os_string().into_string().map_err(|_| fault(io::Error::other("not UTF-8")))?;
        Ok(Self { source, destination: destination.trim_end_matches('/').to_owned(), read_only })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_read_write_unless_it_says_ro() {
        let volume = |text| Volume::parse(text).unwrap();
        assert!(!volume("/tmp:/data").read_only);
        assert!(!volume("/tmp:/data:rw").read_only);
        assert!(volume("/tmp:/data:ro").read_only);
    }

    #[test]
    fn the_source_is_made_absolute() {
        let here = std::env::current_dir().unwrap().canonicalize().unwrap();
        assert_eq!(Path::new(&Volume::parse(".:/data/").unwrap().source), here);
        assert_eq!(Volume::parse(".:/data/").unwrap().destination, "/data");
    }

    #[test]
    fn what_is_no_volume_is_refused_with_its_text() {
        for (text, what) in [
            ("/tmp", "SRC:DST"),
            (":/data", "SRC:DST"),
            ("/tmp:/data:ro:x", "SRC:DST"),
            ("/tmp:/data:z", "\"z\""),
            ("/tmp:data", "absolute"),
            ("/tmp:/", "below the container's root"),
            ("/tmp:/a/../b", "absolute"),
            ("/nonexistent-for-sure:/data", "/nonexistent-for-sure"),
        ] {
            let error = Volume::parse(text).unwrap_err().to_string();
            assert!(error.contains(what), "{text}: {error}");
        }
    }
}
