//! Text forms of the settings: keyword enums, uid ranges, kernel parameters.

use std::fmt;
use std::str::FromStr;

use toml::de::{DeString, DeValue};

use crate::error::Fault;
use crate::keys::{Kind, Value, parsed};
use crate::settings::{KernelParams, UidRange};

/// An enum that is written as one of a few words.
macro_rules! keywords {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $(#[doc = concat!("`", $word, "`")] $variant),+
        }

        impl $name {
            /// Every word that may be written.
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            /// The word in the configuration.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(format!("{text:?} is not one of {}", Self::WORDS.join(", "))),
                }
            }
        }

        impl $crate::keys::Value for $name {
            const KIND: $crate::keys::Kind = $crate::keys::Kind::Word(Self::WORDS);

            fn read(value: &toml::de::DeValue<'_>) -> Result<Self, $crate::Fault> {
                $crate::keys::parsed(value)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(self.as_str())
            }
        }
    };
}
pub(crate) use keywords;

impl FromStr for UidRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shape = || format!("{text:?} is not of the form \"first-last\" with two user ids");
        let (first, last) = text.split_once('-').ok_or_else(shape)?;
        let first: u32 = first.trim().parse().map_err(|_| shape())?;
        let last: u32 = last.trim().parse().map_err(|_| shape())?;
        if first == 0 {
            return Err("the range must not hold user 0".to_owned());
        }
        if first > last {
            return Err(format!("the range is empty: {first} is above {last}"));
        }
        // The kernel reserves the highest id as "no change" (chown(2)).
        if last == u32::MAX {
            return Err(format!("{last} is not a valid user id"));
        }
        Ok(Self { first, last })
    }
}

impl Value for UidRange {
    const KIND: Kind = Kind::Text;

    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        parsed(value)
    }
}

impl FromStr for KernelParams {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        kernel_words(line).map(Self)
    }
}

impl Value for KernelParams {
    const KIND: Kind = Kind::Text;

    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        parsed(value)
    }
}

impl fmt::Display for KernelParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(" "))
    }
}

impl serde::Serialize for KernelParams {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl fmt::Display for UidRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl serde::Serialize for UidRange {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// Splits a kernel command line at blanks outside double quotes, as the kernel does (`lib/cmdline.c`, `next_arg`).
fn kernel_words(line: &str) -> Result<Vec<String>, String> {
    if let Some(bad) = line.chars().find(|c| c.is_control() && !c.is_whitespace()) {
        return Err(format!("holds the control character {bad:?}"));
    }
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    for c in line.chars() {
        quoted ^= c == '"';
        if !c.is_whitespace() || quoted {
            word.push(c);
        } else if !word.is_empty() {
            words.push(std::mem::take(&mut word));
        }
    }
    if quoted {
        return Err("has an unclosed double quote".to_owned());
    }
    words.extend((!word.is_empty()).then_some(word));
    Ok(words)
}

/// A value as it would be written on one line.
pub(crate) fn as_toml(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => toml::Value::from(text.as_ref()).to_string(),
        DeValue::Boolean(on) => on.to_string(),
        DeValue::Integer(number) => match (number.radix(), number.as_str()) {
            (16, digits) => format!("0x{digits}"),
            (8, digits) => format!("0o{digits}"),
            (2, digits) => format!("0b{digits}"),
            (_, digits) => digits.to_owned(),
        },
        DeValue::Float(number) => number.as_str().to_owned(),
        DeValue::Datetime(moment) => moment.to_string(),
        DeValue::Array(items) => {
            let items: Vec<_> = items.iter().map(|item| as_toml(item.get_ref())).collect();
            format!("[{}]", items.join(", "))
        }
        DeValue::Table(table) => {
            let entry = |(key, value): (&toml::Spanned<DeString<'_>>, &toml::Spanned<DeValue<'_>>)| {
                format!("{} = {}", toml::Value::from(key.get_ref().as_ref()), as_toml(value.get_ref()))
            };
            let entries: Vec<_> = table.iter().map(entry).collect();
            format!("{{ {} }}", entries.join(", "))
        }
    }
}
