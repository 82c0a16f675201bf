//! Files that are made of the code, and kept beside it so that everybody can read them: pages, man pages, schemas.
//!
//! `cargo xtask docs` writes them, `make lint` fails where they are not what would be written.

pub mod configuration;
pub mod deprecations;
pub mod oci;

use crate::shell::{ChoreError, at, tree};
use crate::{Chores, say};

/// A file of the tree, by its path in it, and what it must hold.
pub type Generated = Vec<(&'static str, String)>;

fn generated() -> Chores<Generated> {
    let mut all = configuration::generate()?;
    all.extend(deprecations::generate()?);
    all.extend(oci::generate()?);
    Ok(all)
}

/// Writes every generated file.
pub fn write() -> Chores {
    crate::deprecations::write_ledger()?;
    for (path, text) in generated()? {
        let file = tree().join(path);
        if let Some(dir) = file.parent() {
            std::fs::create_dir_all(dir).map_err(at("create", dir))?;
        }
        std::fs::write(&file, text).map_err(at("write", &file))?;
    }
    Ok(())
}

/// Fails, naming every generated file that is not what would be written.
pub fn check() -> Chores {
    say("generated documentation");
    let read = |path: &str| std::fs::read_to_string(tree().join(path)).ok();
    let stale = stale(&generated()?, read);
    if stale.is_empty() { Ok(()) } else { Err(ChoreError::Found(stale.join("\n       "))) }
}

fn stale(generated: &[(&'static str, String)], read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let stale = generated.iter().filter(|(path, text)| read(path).as_deref() != Some(text));
    stale.map(|(path, _)| format!("{path} is out of date: run `cargo xtask docs`")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_differs_or_is_absent_is_named() {
        let generated = [("a.md", "new".to_owned()), ("b.md", "same".to_owned()), ("c.md", String::new())];
        let read = |path: &str| match path {
            "a.md" => Some("old".to_owned()),
            "b.md" => Some("same".to_owned()),
            _ => None,
        };
        assert_eq!(
            stale(&generated, read),
            ["a.md is out of date: run `cargo xtask docs`", "c.md is out of date: run `cargo xtask docs`",]
        );
    }
}
