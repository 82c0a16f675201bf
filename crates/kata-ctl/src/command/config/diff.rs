//! `config diff`: where two configurations differ in effect.

use std::collections::BTreeMap;

use kata_config::{Reading, Sources};
use serde_json::{Value, json};

use super::{ConfigVerbError, Outcome, as_json, show};
use crate::cli::ConfigDiffArgs;
use crate::failure::Failure;
use crate::output;
use crate::table;

/// One side: its name, and its settings by key, each as TOML and as it is shown.
struct Side {
    name: String,
    settings: BTreeMap<String, (Option<String>, String)>,
}

/// Prints where `right` differs from `left`, or from the defaults.
pub(super) fn run(args: &ConfigDiffArgs, left: Option<&Sources>, right: &Sources) -> Outcome {
    let (left, right) = (left.map_or_else(defaults, side)?, side(right)?);
    let mut keys: Vec<&String> = left.settings.keys().chain(right.settings.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let value = |side: &Side, key: &String| side.settings.get(key).and_then(|(value, _)| value.clone());
    keys.retain(|key| value(&left, key) != value(&right, key));
    if args.json {
        let entry = |key: &&String| {
            let (left, right) = (value(&left, key), value(&right, key));
            json!({ "key": key, "left": as_json(left.as_deref()), "right": as_json(right.as_deref()) })
        };
        let differences: Vec<Value> = keys.iter().map(entry).collect();
        output::document(&json!({ "left": left.name, "right": right.name, "differences": differences }))?;
        return Ok(0);
    }
    if keys.is_empty() {
        output::print(&format!("{} and {} have the same effect.\n", left.name, right.name))?;
        return Ok(0);
    }
    let shown = |side: &Side, key: &String| {
        side.settings.get(key).map_or_else(|| "-".to_owned(), |(_, shown)| shown.clone())
    };
    let mut lines = vec![["KEY".to_owned(), left.name.clone(), right.name.clone()]];
    lines.extend(keys.iter().map(|key| [(*key).clone(), shown(&left, key), shown(&right, key)]));
    output::print(&table::columns(&lines))?;
    Ok(0)
}

fn defaults() -> Result<Side, Failure> {
    let reading = Reading::of_text("defaults".as_ref(), "").map_err(ConfigVerbError::Faults)?;
    Ok(Side { name: "defaults".to_owned(), settings: settings(&reading) })
}

fn side(sources: &Sources) -> Result<Side, Failure> {
    let reading = Reading::of(sources).map_err(ConfigVerbError::Faults)?;
    let name = sources.base().map_or_else(|| "no file".to_owned(), |file| file.display().to_string());
    Ok(Side { name, settings: settings(&reading) })
}

/// What makes a difference: the settings that are acted on, and those that a pod is refused for.
fn settings(reading: &Reading) -> BTreeMap<String, (Option<String>, String)> {
    let refused = |key: &str| reading.unmet.iter().any(|error| error.key == key);
    let all = show::settings(reading).into_iter();
    let effective = all.filter(|setting| setting.supported || refused(&setting.key));
    effective
        .map(|setting| (setting.key.clone(), (setting.value.clone(), setting.shown().to_owned())))
        .collect()
}
