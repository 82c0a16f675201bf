//! The fuzz target: bytes become a file, a drop-in, overrides and annotations.

use std::collections::BTreeMap;
use std::path::Path;

use crate::annotations;
use crate::deprecation::Registered;
use crate::layers::Layers;

/// Reads `data`, parted by NUL bytes: a base file, a drop-in, overrides and annotations, the last two one a line. Whatever is
/// understood is shown and serialised, and has to be understood again.
///
/// # Panics
/// Where a configuration that was understood is not one any more when it is written down.
pub fn run(data: &[u8]) {
    let mut parts = data.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    let mut part = || parts.next().unwrap_or_default();
    let mut layers = Layers::new(Registered::PROGRAM);
    layers.text(Path::new("base.toml"), &part());
    layers.text(Path::new("drop-in.toml"), &part());
    part().lines().for_each(|line| layers.assign(line));
    let pairs = part();
    let annotations: BTreeMap<String, String> = pairs
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, text)| (name.to_owned(), text.to_owned()))
        .collect();
    let opened = annotations::Opened::by(&layers.config.hypervisor.qemu);
    annotations::apply(&mut layers, &opened, &annotations);
    match layers.finish() {
        Ok(reading) => {
            let said: usize = reading.notes.iter().map(|note| note.to_string().len()).sum();
            let unmet: usize = reading.unmet.iter().map(|error| error.to_string().len()).sum();
            assert!(said >= reading.notes.len() && unmet >= reading.unmet.len());
            again(&reading.config);
        }
        Err(errors) => assert!(!errors.to_string().is_empty()),
    }
}

fn again(config: &crate::Config) {
    let Ok(text) = toml::to_string(config) else { return };
    let read = crate::Reading::of_text(Path::new("again.toml"), &text);
    // NaN is not a value that any key takes, so equality is what it says.
    assert_eq!(read.ok().map(|reading| reading.config).as_ref(), Some(config), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{self, Key};

    #[test]
    fn each_part_reaches_its_layer() {
        run(b"[hypervisor.qemu]\nenable_annotations = ['.*']\n\0runtime.log_level='warn'\0hypervisor.qemu.default_memory=512\0\
              io.katacontainers.config.hypervisor.default_vcpus=2\nio.katacontainers.config_path=/x");
        run(b"\xff\0\0\0=\n==");
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(data in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
            run(&data);
        }

        #[test]
        fn arbitrary_annotations_of_known_names_never_panic(
            index in 0..keys::all().filter(|key| key.annotation_name().is_some()).count(),
            text in r#"(-?[0-9]{1,40}|true|\[.{0,10}\]?|/[a-z./]{0,20}|[^\n\x00]{0,30})"#,
        ) {
            let name = keys::all().filter_map(Key::annotation_name).nth(index).unwrap_or_default();
            let listed = annotations::listing(&name).to_owned();
            let base = format!(
                "[hypervisor.qemu]\nenable_annotations = [{listed:?}]\nvalid_asset_paths = [\"/**\"]\nvalid_hypervisor_paths = [\"/*\"]"
            );
            run(format!("{base}\0\0\0{name}={text}").as_bytes());
        }
    }
}
