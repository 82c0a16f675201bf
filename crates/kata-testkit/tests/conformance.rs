//! docs/conformance.md names tests: each of them exists.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

#[test]
fn every_test_that_the_conformance_table_names_exists() {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let table = std::fs::read_to_string(tree.join("docs/conformance.md")).unwrap();
    let code = kata_testkit::code();
    let cells = table.lines().filter(|line| line.starts_with('|')).filter_map(|line| line.rsplit('|').nth(1));
    let quoted = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    let names: Vec<&str> = quoted.filter(|word| word.contains('_')).collect();
    assert!(names.len() > 40, "the table is read: {names:?}");
    let missing: Vec<&&str> = names.iter().filter(|name| !code.contains(&format!("fn {name}("))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
