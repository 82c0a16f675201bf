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

#[derive(Debug, Error)]
enum ConfigVerbError {
    #[error("the configuration cannot be understood:\n{0}")]
    Faults(ConfigErrors),
    #[error("no such key or annotation: {name}{}", .nearest.as_ref().map(|key| format!("; did you mean {key}?")).unwrap_or_default())]
    Unknown { name: String, nearest: Option<String> },
}

/// Does what is asked. `policy` is an override that holds for every configuration that is read.
pub fn run(command: &ConfigCommand, policy: Option<&str>) -> Outcome {
    let with_policy = |mut sources: Sources| {
        sources.overrides.extend(policy.map(str::to_owned));
        sources
    };
    let of = |file: Option<&PathBuf>| with_policy(Sources { file: file.cloned(), ..Sources::default() });
    match command {
        ConfigCommand::Show(args) => {
            let ConfigSources { config: file, set: overrides } = args.sources.clone();
            show::run(args, &with_policy(Sources { file, overrides, ..Sources::default() }))
        }
        ConfigCommand::Validate(args) => validate::run(args, &of(args.file.as_ref())),
        ConfigCommand::Explain(args) => explain::run(args),
        ConfigCommand::Diff(args) => match (args.first.as_ref(), args.second.as_ref()) {
            (first, None) => diff::run(args, None, &of(first)),
            (first, second) => diff::run(args, Some(&of(first)), &of(second)),
        },
        ConfigCommand::Migrate(args) => migrate::run(args),
    }
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
