//! The page about the OCI runtime specification: its text, and the table of fields that the tests check.

use std::fmt::Write as _;

use super::Generated;
use crate::Chores;
use crate::shell::{at, tree};

// The table alone, not the crate around it: a chore must not wait for the whole sandbox to be built.
#[allow(dead_code, reason = "the tests beside the table use more of it")]
#[path = "../../../crates/kata-sandbox/src/guest_spec/fields.rs"]
mod fields;

use fields::{FIELDS, Fate, Field};

const PAGE: &str = "docs/oci.md";
/// The table is what stands between these lines.
const BEGIN: &str = "<!-- fields: written by `cargo xtask docs` -->\n";
const END: &str = "<!-- end of fields -->\n";

/// The page with the table as it is now.
pub fn generate() -> Chores<Generated> {
    let path = tree().join(PAGE);
    let page = std::fs::read_to_string(&path).map_err(at("read", &path))?;
    Ok(vec![(PAGE, with_table(&page))])
}

fn with_table(page: &str) -> String {
    let (head, rest) = page.split_once(BEGIN).unwrap_or((page, ""));
    let tail = rest.split_once(END).map_or("", |(_, tail)| tail);
    format!("{head}{BEGIN}\n{}\n{END}{tail}", table())
}

fn table() -> String {
    let mut table = "| field | what becomes of it | seen by |\n|---|---|---|\n".to_owned();
    for Field { path, fate, test } in FIELDS {
        let (what, why) = match fate {
            Fate::Guest(how) => ("in the guest", how),
            Fate::Host(how) => ("on the host", how),
            Fate::Meaningless(why) => ("means nothing in a guest", why),
            Fate::Refused(why) => ("**refused**", why),
        };
        let separator = if why.is_empty() { "" } else { ": " };
        // A string cannot fail to be written to.
        let _ = writeln!(table, "| `{path}` | {what}{separator}{why} | `{test}` |");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_takes_the_place_of_the_former_one_and_the_text_stays() {
        let page = format!("before\n{BEGIN}the former table\n{END}after\n");
        let written = with_table(&page);
        assert!(
            written.starts_with("before\n")
                && written.ends_with("after\n")
                && !written.contains("former table")
        );
        assert!(written.contains("| `linux.intelRdt` | **refused**: "));
        assert_eq!(with_table(&written), written);
    }
}
