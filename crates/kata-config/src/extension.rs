//! `[[hypervisor.*.guest_extension_images]]`: disks that bring further services into a guest.

use std::path::PathBuf;

use serde::Serialize;
use toml::de::DeValue;

use crate::error::Fault;
use crate::keys::{Kind, Value};

/// Longest name: with what precedes it, it is the serial number of a virtio disk, 20 bytes.
const NAME_MAX: usize = 10;
const KEYS: [&str; 3] = ["name", "path", "verity_params"];

/// One extension image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExtensionImage {
    /// What the guest knows it by.
    pub name: String,
    /// The file on the host.
    pub path: PathBuf,
    /// What its blocks are verified against: `root_hash=…,salt=…,data_blocks=…,data_block_size=…,hash_block_size=…`.
    pub verity_params: String,
}

impl ExtensionImage {
    fn read(item: &DeValue<'_>) -> Result<Self, Fault> {
        let table =
            item.as_table().ok_or_else(|| Fault::WrongType { expected: "table", found: item.type_str() })?;
        let names = || table.iter().map(|(key, _)| key.get_ref());
        if let Some(unknown) = names().find(|key| !KEYS.contains(&key.as_ref())) {
            return Err(Fault::Invalid(format!(
                "{unknown:?} is no key of an image; its keys are {}",
                KEYS.join(", ")
            )));
        }
        let value = |key| match table.get(key) {
            Some(value) => String::read(value.get_ref()),
            None => Err(Fault::Invalid(format!("an image has no {key}"))),
        };
        let (name, path) = (value("name")?, PathBuf::from(value("path")?));
        let plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
        let first = name.starts_with(|first: char| first.is_ascii_lowercase());
        if !first || name.len() > NAME_MAX || !name.bytes().all(plain) {
            let rule = format!("1 to {NAME_MAX} lower-case letters, digits and dashes, a letter first");
            return Err(Fault::Invalid(format!("name: {name:?} is not {rule}")));
        }
        if !path.is_absolute() {
            return Err(Fault::Invalid(format!("path: {} is not an absolute path", path.display())));
        }
        Ok(Self { name, path, verity_params: value("verity_params")? })
    }
}

impl Value for Vec<ExtensionImage> {
    const KIND: Kind = Kind::Tables;

    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        let items = value.as_array().into_iter().flatten();
        let images: Self =
            items.map(|item| ExtensionImage::read(item.get_ref())).collect::<Result<_, _>>()?;
        let twice = images
            .iter()
            .enumerate()
            .find(|(at, image)| images.iter().take(*at).any(|earlier| earlier.name == image.name));
        match twice {
            Some((_, image)) => Err(Fault::Invalid(format!("two images have the name {:?}", image.name))),
            None => Ok(images),
        }
    }
}
