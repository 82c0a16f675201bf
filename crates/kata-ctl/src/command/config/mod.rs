//! `config`: what the configuration is, whether it is right, what a setting means, and how upstream's files become ours.
//!
//! ```text
//!  show, validate, diff ─▶ Reading (kata-config) ─▶ values with their origins, faults, notes
//!  explain ──────────────▶ the table of keys, the registry of deprecations
//!  migrate ──────────────▶ Reading says what is not acted on ─▶ the file without it, comments and all
//! ```

mod diff;
mod explain;
mod migrate;
mod show;
mod validate;

use std::path::PathBuf;

use kata_config::{ConfigErrors, Origin, Sources};
use serde_json::{Value, json};
use thiserror::Error;

use super::Outcome;
use crate::cli::{ConfigCommand, ConfigSources};

/// Exit code for a key that nobody knows.
const NO_SUCH: u8 = 3;

#[derive(Debug, Error)]
enum ConfigVerbError {
    #[error("the configuration cannot be understood:\n{0}")]
    Faults(ConfigErrors),
    #[error("no such key or annotation: {name}{}", .nearest.as_ref().map(|key| format!("; did you mean {key}?")).unwrap_or_default())]
    Unknown { name: String, nearest: Option<String> },
}

/// Does what is asked.
pub fn run(command: &ConfigCommand) -> Outcome {
    match command {
        ConfigCommand::Show(args) => show::run(args),
        ConfigCommand::Validate(args) => validate::run(args),
        ConfigCommand::Explain(args) => explain::run(args),
        ConfigCommand::Diff(args) => diff::run(args),
        ConfigCommand::Migrate(args) => migrate::run(args),
    }
}

fn sources(args: &ConfigSources) -> Sources {
    Sources { file: args.config.clone(), overrides: args.set.clone(), ..Sources::default() }
}

/// This file and its drop-ins alone, whatever the environment says.
fn file(path: PathBuf) -> Sources {
    Sources { file: Some(path), ..Sources::default() }
}

/// A value written as TOML, as JSON; a value that is none is null.
fn as_json(value: Option<&str>) -> Value {
    let table = value.and_then(|value| format!("v = {value}").parse::<toml::Table>().ok());
    let value = table.as_ref().and_then(|table| table.get("v"));
    value.and_then(|value| serde_json::to_value(value).ok()).unwrap_or(Value::Null)
}

/// Where a value comes from; `None` is the default.
fn origin_as_json(origin: Option<&Origin>) -> Value {
    match origin {
        None => json!({ "kind": "default" }),
        Some(Origin::File { path, line }) => json!({ "kind": "file", "file": path, "line": line }),
        Some(Origin::Environment(variable)) => json!({ "kind": "environment", "variable": variable }),
        Some(Origin::Override) => json!({ "kind": "override" }),
        Some(Origin::Annotation(name)) => json!({ "kind": "annotation", "annotation": name }),
    }
}
