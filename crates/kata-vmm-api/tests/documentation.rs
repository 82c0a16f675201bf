//! The lines of the documentation are lines of the interface.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use kata_vmm_api::{Reply, Request};
use serde_json::Value;

const PAGE: &str = include_str!("../../../docs/vmm-jail.md");

#[test]
fn every_line_of_the_documentation_is_read_as_it_is_written() {
    let (mut commands, mut replies) = (BTreeSet::new(), 0);
    for line in PAGE.lines().filter(|line| line.starts_with('{')) {
        let value: Value = serde_json::from_str(line).unwrap();
        let again = if let Some(command) = value.get("command") {
            let name = command.as_str().or_else(|| command.as_object()?.keys().next().map(String::as_str));
            commands.insert(name.unwrap().to_owned());
            serde_json::to_value(serde_json::from_str::<Request>(line).unwrap()).unwrap()
        } else {
            replies += 1;
            serde_json::to_value(serde_json::from_str::<Reply>(line).unwrap()).unwrap()
        };
        // What the page leaves out has a default; what it says is what is read.
        assert!(contains(&again, &value), "{line}\n{again}");
    }
    assert!(replies > 0);
    let all = [
        "add-disk",
        "add-host-device",
        "add-nic",
        "boot",
        "create",
        "info",
        "metrics",
        "pause",
        "remove-device",
        "resize",
        "resume",
        "shutdown",
        "snapshot",
    ];
    assert_eq!(commands, all.map(str::to_owned).into());
}

/// Whether all that `part` says is said by `whole`.
fn contains(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            part.iter().all(|(key, part)| whole.get(key).is_some_and(|whole| contains(whole, part)))
        }
        (Value::Array(whole), Value::Array(part)) => {
            whole.len() == part.len() && whole.iter().zip(part).all(|(whole, part)| contains(whole, part))
        }
        (whole, part) => whole == part,
    }
}
