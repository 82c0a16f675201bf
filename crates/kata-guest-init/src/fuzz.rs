//! The fuzz target: bytes become a command line, a superblock and a manifest.

use crate::cmdline::Cmdline;
use crate::manifest::Manifest;
use crate::plan::plan;
use crate::units::unit;
use crate::variables::Table;
use crate::verity::{Params, Superblock};

/// Reads `data` as each of what the host or an extension's author writes, and makes units of what is a manifest.
///
/// # Panics
/// Where a unit has a line that is not one of those that units have.
pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let _ = Cmdline::parse(&text);
    let _ = text.parse::<Params>();
    if let Some(block) = data.first_chunk() {
        let _ = Superblock::parse(block);
    }
    let Ok(manifest) = Manifest::parse(data) else { return };
    let Ok(table) = Table::built_in() else { return };
    let root = "/run/kata-extensions/x";
    let variables = table.variables(root, &manifest.paths, &[]);
    let Ok(processes) = plan(&manifest, &variables, &table) else { return };
    for process in &processes {
        check(&unit("extension-x", root, process, &processes).text);
    }
}

fn check(text: &str) {
    const KEYS: [&str; 19] = [
        "# Made at boot, from the manifest of extension-x.",
        "[Unit]",
        "Description=Guest service ",
        "DefaultDependencies=no",
        "Conflicts=shutdown.target",
        "Before=shutdown.target",
        "Requires=initdata.target",
        "After=",
        "StartLimit",
        "",
        "[Service]",
        "Type=exec",
        "ExecStart=\"/run/kata-guest-init/exec\" \"start\" ",
        "ExecStartPost=\"/run/kata-guest-init/exec\" \"wait\" \"/run/",
        "TimeoutStartSec=",
        "Environment=\"",
        "NetworkNamespacePath=/run/netns/",
        "Restart",
        "Slice=guest-services.slice",
    ];
    assert_eq!(text.matches("ExecStart=").count().min(1), 1);
    for line in text.lines() {
        let known =
            KEYS.iter().any(|key| if key.is_empty() { line.is_empty() } else { line.starts_with(key) });
        assert!(known && !line.contains(char::is_control), "{line:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::COCO;

    proptest::proptest! {
        #[test]
        fn whatever_an_argument_is_it_stays_one(word in ".{0,60}", name in "[A-Z]{1,4}", value in ".{0,60}") {
            let quoted = |text: &str| toml::Value::from(text).to_string();
            run(format!(
                "schema_version = 1\n[[process]]\nid = \"a\"\nlevel = 1\npath = \"bin/a\"\nargs = [{}]\nenv = {{ {name} = {} }}",
                quoted(&word),
                quoted(&value),
            ).as_bytes());
        }

        #[test]
        fn whatever_comes_is_read(bytes in proptest::collection::vec(0_u8.., 0..2048)) {
            run(&bytes);
        }
    }

    #[test]
    fn the_published_manifest_passes() {
        run(COCO.as_bytes());
    }
}
