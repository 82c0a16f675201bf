//! `config show`: values, and where each comes from.

use kata_config::{Origin, Reading, Sources, keys, value_at};
use serde_json::json;

use super::{ConfigVerbError, Outcome, as_json, origin_as_json};
use crate::cli::ConfigShowArgs;
use crate::output;
use crate::table;

/// One setting as it stands.
pub(super) struct Setting {
    pub(super) key: String,
    /// As TOML; `None` is unset.
    pub(super) value: Option<String>,
    /// In words, where there is no value.
    unset: String,
    /// `None` is the default.
    origin: Option<Origin>,
    pub(super) supported: bool,
}

impl Setting {
    /// The value, or what holds without one.
    pub(super) fn shown(&self) -> &str {
        self.value.as_deref().unwrap_or(&self.unset)
    }
}

/// Prints the settings.
pub(super) fn run(args: &ConfigShowArgs, sources: &Sources) -> Outcome {
    let reading = Reading::of(sources).map_err(ConfigVerbError::Faults)?;
    let mut settings = settings(&reading);
    settings.retain(|setting| if args.effective { setting.supported } else { setting.origin.is_some() });
    if args.json {
        let list: Vec<_> = settings.iter().map(as_object).collect();
        output::document(&json!({ "file": sources.base(), "settings": list }))?;
        return Ok(0);
    }
    if settings.is_empty() {
        output::print("Nothing is configured: the defaults apply (--effective shows them).\n")?;
    }
    let origin =
        |setting: &Setting| setting.origin.as_ref().map_or_else(|| "default".to_owned(), ToString::to_string);
    let text = match args.origin {
        false => {
            table::columns(&lines(&settings, |setting| [setting.key.clone(), setting.shown().to_owned()]))
        }
        // The longest last.
        true => table::columns(&lines(&settings, |setting| {
            [setting.key.clone(), origin(setting), setting.shown().to_owned()]
        })),
    };
    output::print(&text)?;
    Ok(0)
}

fn lines<const N: usize>(settings: &[Setting], line: impl Fn(&Setting) -> [String; N]) -> Vec<[String; N]> {
    settings.iter().map(line).collect()
}

/// Every setting that this version acts on, and what else was written, in the order of the reference.
pub(super) fn settings(reading: &Reading) -> Vec<Setting> {
    let mut settings = Vec::new();
    for key in keys::all().filter(|key| key.is_supported()) {
        let path = key.own_path();
        settings.push(Setting {
            value: value_at(&reading.config, &path),
            unset: format!("({})", key.default()),
            origin: reading.written.get(&path).map(|written| written.origin.clone()),
            supported: true,
            key: path,
        });
    }
    for (path, written) in &reading.written {
        if settings.iter().all(|setting| setting.key != *path) {
            settings.push(Setting {
                key: path.clone(),
                value: Some(written.value.clone()),
                unset: String::new(),
                origin: Some(written.origin.clone()),
                supported: false,
            });
        }
    }
    settings
}

fn as_object(setting: &Setting) -> serde_json::Value {
    json!({
        "key": setting.key,
        "value": as_json(setting.value.as_deref()),
        "origin": origin_as_json(setting.origin.as_ref()),
        "acted_on": setting.supported,
    })
}
