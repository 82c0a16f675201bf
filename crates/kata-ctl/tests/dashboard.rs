//! The dashboard asks for nothing that is not exported.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use serde_json::Value;

const DASHBOARD: &str = include_str!("../../../deploy/grafana/kata.json");
/// Compared with what a live pod tells by the tests of live pods.
const DOCS: &str = include_str!("../../../docs/observability.md");

/// Everything in a text that is spelt like one of our families.
fn families(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("kata_")).collect()
}

fn queries<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(keys) => {
            for (key, value) in keys {
                match value.as_str() {
                    Some(text) if key == "expr" || key == "query" => found.push(text),
                    _ => queries(value, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| queries(item, found)),
        _ => {}
    }
}

#[test]
fn every_family_that_the_dashboard_queries_is_exported() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut texts = Vec::new();
    queries(&dashboard, &mut texts);
    let exported = families(DOCS);
    let asked: BTreeSet<&str> = texts.iter().flat_map(|text| families(text)).collect();
    assert!(asked.len() > 20, "{asked:?}");
    let unknown: Vec<_> = asked
        .iter()
        .map(|name| name.strip_suffix("_bucket").unwrap_or(name))
        .filter(|name| !exported.contains(name))
        .collect();
    assert!(unknown.is_empty(), "asked for and not exported: {unknown:?}");
}

#[test]
fn every_panel_has_a_place_of_its_own() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut taken = BTreeSet::new();
    for panel in dashboard.get("panels").unwrap().as_array().unwrap() {
        let place = |key: &str| panel.get("gridPos").unwrap().get(key).unwrap().as_u64().unwrap();
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                assert!(x < 24 && taken.insert((x, y)), "{} lies over another", panel.get("title").unwrap());
            }
        }
    }
}
