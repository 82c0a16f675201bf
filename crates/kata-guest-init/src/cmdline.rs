//! What the kernel's command line, which is measured, says of images.
//!
//! | word | |
//! |---|---|
//! | `kata.root.verity_params=P` | the root's image, on the disk `root` |
//! | `kata.extension.NAME.verity_params=P` | an extension's, on the disk `extension-NAME` |
//! | `systemd.unit=UNIT` | what to start; `kata-containers.target` without |

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::verity::{Params, ParamsError};

/// A virtio disk's serial number has 20 bytes, and `extension-` is ten of them.
const NAME_MAX: usize = 10;

/// A command line that does not say which images to trust.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CmdlineError {
    /// Nothing vouches for the root.
    #[error("kata.root.verity_params is missing: a root that nothing vouches for is not started")]
    NoRoot,
    /// A word of ours that is none.
    #[error("{0:?} is unknown: kata.root.verity_params and kata.extension.NAME.verity_params are")]
    Unknown(String),
    /// An image that has two parameters.
    #[error("{0} is there twice")]
    Twice(String),
    /// An extension that cannot be called so.
    #[error("{word}: {source}")]
    Name {
        /// The word.
        word: String,
        #[source]
        /// What is wrong.
        source: NameError,
    },
    /// Parameters that cannot be.
    #[error("{word}")]
    Params {
        /// The word.
        word: String,
        #[source]
        /// What is wrong.
        source: ParamsError,
    },
}

/// Something that an extension cannot be called.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name: 1 to 10 letters, digits, - and _, the first a letter or digit")]
pub struct NameError(String);

/// What an extension is called. Safe in paths, unit names and serial numbers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(String);

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let fits = (1..=NAME_MAX).contains(&text.len());
        let first = text.starts_with(|first: char| first.is_ascii_alphanumeric());
        let rest = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
        if fits && first && rest { Ok(Self(text.to_owned())) } else { Err(NameError(text.to_owned())) }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// What the command line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cmdline {
    /// The root's image.
    pub root: Params,
    /// The extensions' images.
    pub extensions: BTreeMap<Name, Params>,
    /// Whether it says what systemd is to start.
    pub names_unit: bool,
}

impl Cmdline {
    /// Reads `/proc/cmdline`'s text. Words of others are none of its business.
    ///
    /// # Errors
    /// [`CmdlineError`] for the first word of ours that is wrong, and without a root.
    pub fn parse(text: &str) -> Result<Self, CmdlineError> {
        let mut root = None;
        let mut extensions = BTreeMap::new();
        let mut names_unit = false;
        // What is behind `--` is for the kernel to hand on.
        for word in words(text).into_iter().take_while(|word| word != "--") {
            let (key, value) = word.split_once('=').unwrap_or((&word, ""));
            let params = || {
                value
                    .parse::<Params>()
                    .map_err(|source| CmdlineError::Params { word: key.to_owned(), source })
            };
            let before = if key == "kata.root.verity_params" {
                root.replace(params()?)
            } else if let Some(rest) = key.strip_prefix("kata.extension.") {
                let name = rest.strip_suffix(".verity_params");
                let name = name.ok_or_else(|| CmdlineError::Unknown(key.to_owned()))?;
                let name =
                    name.parse().map_err(|source| CmdlineError::Name { word: key.to_owned(), source })?;
                extensions.insert(name, params()?)
            } else if key.starts_with("kata.root.") {
                return Err(CmdlineError::Unknown(key.to_owned()));
            } else {
                names_unit |= key == "systemd.unit";
                None
            };
            if before.is_some() {
                return Err(CmdlineError::Twice(key.to_owned()));
            }
        }
        Ok(Self { root: root.ok_or(CmdlineError::NoRoot)?, extensions, names_unit })
    }
}

/// Words as the kernel parts them: a `"` begins and ends what spaces do not part, and is no part of the word.
fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for character in text.chars() {
        if character == '"' {
            quoted = !quoted;
        } else if character.is_ascii_whitespace() && !quoted {
            words.push(String::new());
        } else if let Some(word) = words.last_mut() {
            word.push(character);
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: &str = "root_hash=00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff,salt=aa,data_blocks=9,\
                     data_block_size=4096,hash_block_size=4096";

    #[test]
    fn root_and_extensions_are_found_among_words_of_others() {
        let text = format!(
            "console=ttyS0 kata.root.verity_params={P} quiet kata.extension.coco.verity_params=\"{P}\" \
             agent.log=debug x=\"kata.extension.b.verity_params= kata.root.verity_params=\"\n"
        );
        let cmdline = Cmdline::parse(&text).unwrap();
        assert_eq!(cmdline.root, P.parse().unwrap());
        assert_eq!(cmdline.extensions.keys().map(ToString::to_string).collect::<Vec<_>>(), ["coco"]);
        assert!(!cmdline.names_unit);
        assert!(Cmdline::parse(&format!("{text} systemd.unit=rescue.target")).unwrap().names_unit);
    }

    #[test]
    fn without_parameters_of_the_root_nothing_starts() {
        assert_eq!(Cmdline::parse("quiet root=/dev/vda"), Err(CmdlineError::NoRoot));
        let behind = format!("quiet -- kata.root.verity_params={P}");
        assert_eq!(Cmdline::parse(&behind), Err(CmdlineError::NoRoot));
        let none = Cmdline::parse("kata.root.verity_params=none").unwrap_err();
        assert!(matches!(none, CmdlineError::Params { .. }), "{none}");
    }

    #[test]
    fn an_image_with_two_parameters_is_refused() {
        for word in [format!("kata.root.verity_params={P}"), format!("kata.extension.a.verity_params={P}")] {
            let text = format!("{word} kata.root.verity_params={P} {word}");
            assert!(matches!(Cmdline::parse(&text), Err(CmdlineError::Twice(_))), "{word}");
        }
    }

    #[test]
    fn names_of_extensions_stay_within_paths_units_and_serial_numbers() {
        for name in ["", "..", "../x", "a/b", "a.b", "-a", "_a", "a b", "a%n", "elevenchars", "ä", "a\n"] {
            assert!(name.parse::<Name>().is_err(), "{name:?}");
        }
        for name in ["coco", "gpu", "a", "A-1_b", "tencharact"] {
            assert_eq!(name.parse::<Name>().unwrap().to_string(), name);
        }
        let text = format!("kata.root.verity_params={P} kata.extension.a/../b.verity_params={P}");
        assert!(matches!(Cmdline::parse(&text), Err(CmdlineError::Name { .. })));
    }

    #[test]
    fn a_misspelt_word_of_ours_is_no_word_of_others() {
        for word in ["kata.root.verity=1", "kata.extension.coco.verity-params=1", "kata.extension."] {
            let text = format!("kata.root.verity_params={P} {word}");
            assert!(matches!(Cmdline::parse(&text), Err(CmdlineError::Unknown(_))), "{word}");
        }
    }
}
