//! What a value may be, and how values become fields.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use toml::de::DeValue;

use crate::error::Fault;

/// The type of a key's value, with its range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// `true` or `false`
    Boolean,
    /// A whole number, both bounds included.
    Integer {
        /// The least.
        least: i64,
        /// The greatest.
        most: u64,
    },
    /// A decimal number, both bounds included.
    Number {
        /// The least.
        least: f64,
        /// The greatest.
        most: f64,
    },
    /// Text without a NUL character.
    Text,
    /// An absolute path; empty is unset, so that a later layer can take back what an earlier one gave.
    Path,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A list of texts.
    List,
    /// Tables with keys of their own, `[[…]]`.
    Tables,
}

impl Kind {
    /// Any whole number from 0.
    pub(crate) const COUNT: Self = Self::Integer { least: 0, most: u64::MAX };

    /// The type in a word or two, as in the reference.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Boolean => "boolean",
            Self::Integer { .. } => "integer",
            Self::Number { .. } => "number",
            Self::Text => "string",
            Self::Path => "path",
            Self::Word(_) => "word",
            Self::List => "list of strings",
            Self::Tables => "array of tables",
        }
    }

    /// The range, or the words; `None` where the type says it all.
    pub fn range(&self) -> Option<String> {
        match self {
            Self::Integer { least: 0, most: u64::MAX } => Some("from 0".to_owned()),
            Self::Integer { least, most } => Some(format!("{least} to {most}")),
            Self::Number { least, most } => {
                Some(if least.is_finite() { format!("{least} to {most}") } else { format!("up to {most}") })
            }
            Self::Word(words) => Some(words.join(", ")),
            Self::Path => Some("absolute".to_owned()),
            Self::Boolean | Self::Text | Self::List | Self::Tables => None,
        }
    }

    /// Whether `value` is of this type and within its range.
    pub(crate) fn check(&self, value: &DeValue<'_>) -> Result<(), Fault> {
        match *self {
            Self::Boolean => boolean(value).map(drop),
            Self::Integer { least, most } => within(value, least, most),
            Self::Number { least, most } => {
                let fits = |count: &f64| (least..=most).contains(count);
                let range = || self.range().unwrap_or_default();
                let fault = || Fault::Invalid(format!("must be a decimal number {}", range()));
                number(value)?.filter(fits).map(drop).ok_or_else(fault)
            }
            Self::Text => text(value).map(drop),
            Self::Path => path(value).map(drop),
            Self::Word(words) => {
                let written = text(value)?;
                if words.contains(&written.as_str()) { Ok(()) } else { Err(not_a_word(&written, words)) }
            }
            Self::List => list(value).map(drop),
            Self::Tables => match value {
                DeValue::Array(items) if items.iter().all(|item| item.get_ref().is_table()) => Ok(()),
                other => Err(wrong_type("array of tables", other)),
            },
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A field's type: which values it takes, and how they are read. [`Kind::check`] has passed before.
pub(crate) trait Value: Sized {
    /// The type, unless the key narrows it.
    const KIND: Kind;

    fn read(value: &DeValue<'_>) -> Result<Self, Fault>;
}

impl Value for bool {
    const KIND: Kind = Kind::Boolean;

    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        boolean(value)
    }
}

impl Value for u64 {
    const KIND: Kind = Kind::COUNT;

    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        let number = integer(value).and_then(|number| Self::try_from(number).ok());
        number.ok_or_else(|| wrong_type("integer", value))
    }
}

impl Value for f64 {
    const KIND: Kind = Kind::Number { least: Self::NEG_INFINITY, most: Self::MAX };

    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        number(value)?.ok_or_else(|| wrong_type("number", value))
    }
}

impl Value for String {
    const KIND: Kind = Kind::Text;

    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        text(value)
    }
}

impl Value for Option<PathBuf> {
    const KIND: Kind = Kind::Path;

    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        path(value)
    }
}

/// Empty for none.
impl Value for PathBuf {
    const KIND: Kind = Kind::Path;

    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        Ok(path(value)?.unwrap_or_default())
    }
}

impl Value for Vec<String> {
    const KIND: Kind = Kind::List;

    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        list(value)
    }
}

/// Words of what is tried out.
impl Value for Vec<crate::Feature> {
    const KIND: Kind = Kind::List;

    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        let word = |word: String| word.parse().map_err(Fault::Invalid);
        list(value)?.into_iter().map(word).collect()
    }
}

/// Reads a text with a form of its own.
pub(crate) fn parsed<T: FromStr<Err = String>>(value: &DeValue<'_>) -> Result<T, Fault> {
    text(value)?.parse().map_err(Fault::Invalid)
}

fn not_a_word(written: &str, words: &[&str]) -> Fault {
    let nearest = nearest(written, words.iter().copied()).map(|word| format!("; did you mean {word:?}?"));
    let all = words.join(", ");
    Fault::Invalid(format!("{written:?} is not one of {all}{}", nearest.unwrap_or_default()))
}

/// The word spelt most alike, if one is near enough to be meant.
pub fn nearest<'a>(written: &str, words: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let distances = words.map(|word| (strsim::osa_distance(written, word), word));
    // Of equals the first one.
    let best = distances.min_by_key(|(distance, _)| *distance);
    best.filter(|(distance, _)| *distance <= 1 + written.len() / 4).map(|(_, word)| word)
}

fn wrong_type(expected: &'static str, value: &DeValue<'_>) -> Fault {
    Fault::WrongType { expected, found: value.type_str() }
}

fn boolean(value: &DeValue<'_>) -> Result<bool, Fault> {
    value.as_bool().ok_or_else(|| wrong_type("boolean", value))
}

fn text(value: &DeValue<'_>) -> Result<String, Fault> {
    let text = value.as_str().ok_or_else(|| wrong_type("string", value))?;
    // Texts end up as arguments of programs, which cannot carry it.
    if text.contains('\0') {
        return Err(Fault::Invalid("holds a NUL character".to_owned()));
    }
    Ok(text.to_owned())
}

fn path(value: &DeValue<'_>) -> Result<Option<PathBuf>, Fault> {
    let path = PathBuf::from(text(value)?);
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    if !path.is_absolute() {
        return Err(Fault::Invalid(format!("{} is not an absolute path", path.display())));
    }
    Ok(Some(path))
}

fn list(value: &DeValue<'_>) -> Result<Vec<String>, Fault> {
    let items = value.as_array().ok_or_else(|| wrong_type("array of strings", value))?;
    items.iter().map(|item| text(item.get_ref())).collect()
}

fn integer(value: &DeValue<'_>) -> Option<i128> {
    let number = value.as_integer()?;
    i128::from_str_radix(number.as_str(), number.radix()).ok()
}

fn within(value: &DeValue<'_>, least: i64, most: u64) -> Result<(), Fault> {
    if !value.is_integer() {
        return Err(wrong_type("integer", value));
    }
    let fits = |number: &i128| (i128::from(least)..=i128::from(most)).contains(number);
    let fault = || match (least, most) {
        (0, u64::MAX) => Fault::Invalid("must not be negative".to_owned()),
        _ => Fault::Invalid(format!("must be from {least} to {most}")),
    };
    integer(value).filter(fits).map(drop).ok_or_else(fault)
}

/// Whole or not, as in upstream's files. `None` where it is a number and none that can be read.
fn number(value: &DeValue<'_>) -> Result<Option<f64>, Fault> {
    let digits = value.as_integer().map(|number| (number.as_str(), number.radix() == 10));
    let (digits, decimal) = digits
        .or_else(|| value.as_float().map(|number| (number.as_str(), true)))
        .ok_or_else(|| wrong_type("number", value))?;
    Ok(digits.parse::<f64>().ok().filter(|count| decimal && count.is_finite()))
}
