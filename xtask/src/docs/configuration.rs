//! What users read of the table of keys: a reference page, a man page, a schema and a file to start from.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use kata_config::annotations::{self, OTHERS};
use kata_config::deprecation::{self, Surface};
use kata_config::keys::{self, Key, Kind};
use roff::{Roff, bold, roman};
use serde_json::{Map, Value, json};

use super::Generated;
use crate::Chores;
use crate::shell::ChoreError;

const PAGE: &str = "docs/configuration-reference.md";
const MAN: &str = "docs/man/kata-configuration.5";
const SCHEMA: &str = "docs/configuration.schema.json";
const EXAMPLE: &str = "docs/configuration.toml";

/// All of them.
pub fn generate() -> Chores<Generated> {
    Ok(vec![(PAGE, page()), (MAN, man()), (SCHEMA, schema()?), (EXAMPLE, example())])
}

/// The sections, in the order of the table, with their keys.
fn sections() -> Vec<(&'static str, Vec<&'static Key>)> {
    let mut sections: Vec<(&str, Vec<&Key>)> = Vec::new();
    for key in keys::all() {
        match sections.iter_mut().find(|(section, _)| *section == key.section) {
            Some((_, keys)) => keys.push(key),
            None => sections.push((key.section, vec![key])),
        }
    }
    sections
}

/// Type, unit and range in a cell.
fn shape(key: &Key) -> String {
    let mut shape = vec![key.kind.name().to_owned()];
    if let Kind::Word(words) = key.kind {
        shape = words.iter().map(|word| format!("`{word:?}`")).collect();
    } else {
        shape.extend(key.kind.range().filter(|_| key.kind != Kind::Path));
    }
    shape.extend(key.unit.map(str::to_owned));
    shape.join(", ")
}

/// A default that is TOML in code, any other as it is.
fn code(default: &str) -> String {
    let toml = format!("v = {default}").parse::<toml::Table>().is_ok();
    if toml { format!("`{default}`") } else { default.to_owned() }
}

fn meaning(key: &Key) -> String {
    let mut text = key.doc();
    let mut add = |words: String| {
        text.push(' ');
        text.push_str(&words);
    };
    if !key.planned_words.is_empty() {
        let words: Vec<String> = key.planned_words.iter().map(|word| format!("`{word:?}`")).collect();
        add(format!("Planned: {}.", words.join(", ")));
    }
    if let Some(other) = key.other_default() {
        add(format!("Upstream's default: {}.", code(other)));
    }
    if key.stability != keys::Stability::Stable {
        add(format!("{}.", key.stability.as_str()));
    }
    if key.section.contains('*') && key.drivers().len() < keys::DRIVERS.len() {
        add(format!("Only {}.", key.drivers().join(", ")));
    }
    if let Some(name) = key.annotation_name() {
        add(format!("Annotation `{}`.", annotations::listing(&name)));
    }
    text.replace('|', "\\|")
}

const INTRODUCTION: &str = "\
# Reference of the configuration

Every key of this project and of Kata Containers 4.1. `kata-ctl config explain KEY` tells the same of one;
[Configuration](configuration.md) tells how files are found and laid over one another.

*Supported* keys are acted on. A *planned* key is upstream's and not acted on yet: a value that asks for nothing (its default, or
what this version does anyway) is noted, any other is understood and keeps a pod from being made. A *removed* key is refused with
its id, unless its value asks for nothing. In sections of drivers that this version does not have, values are checked and not used.

An annotation is given by what opens it in `hypervisor.qemu.enable_annotations`; see [Annotations](#annotations).
";

fn page() -> String {
    let mut text = format!(
        "<!-- Written by cargo xtask docs of the table of keys in crates/kata-config. -->\n{INTRODUCTION}"
    );
    for (section, keys) in sections() {
        // Writing to a string cannot fail, here and below.
        let _ = write!(text, "\n## `[{section}]`\n");
        let (supported, planned): (Vec<&Key>, Vec<&Key>) = keys.iter().partition(|key| key.is_supported());
        let own = if section.contains('*') { "Supported in `[hypervisor.qemu]`" } else { "Supported" };
        for (title, default, keys) in
            [(own, "default", supported), ("Planned", "upstream's default", planned)]
        {
            if keys.is_empty() {
                continue;
            }
            let _ = write!(
                text,
                "\n### {title} {{#{}-{}}}\n\n",
                title.split(' ').next().unwrap_or_default().to_lowercase(),
                anchor(section)
            );
            let _ = write!(text, "| key | type | {default} | known to | |\n|---|---|---|---|---|\n");
            for key in keys {
                let (name, source) = (key.name, key.source.as_str());
                let _ = writeln!(
                    text,
                    "| `{name}` | {} | {} | {source} | {} |",
                    shape(key),
                    code(&key.default()),
                    meaning(key)
                );
            }
        }
    }
    text.push_str(&removed());
    text.push_str(&annotations_part());
    text
}

fn anchor(section: &str) -> String {
    section.replace(".*", "").replace('.', "-")
}

fn removed() -> String {
    let mut text = String::from(
        "\n## Removed\n\n[Deprecated and removed features](deprecations.md) has the reasons.\n\n| key | id | instead |\n|---|---|---|\n",
    );
    for (name, item, values) in gone(Surface::ConfigKey) {
        let _ = writeln!(
            text,
            "| `{name}`{values} | [{}](deprecations.md#{}) | {} |",
            item.id,
            item.id.to_lowercase(),
            item.replacement
        );
    }
    text
}

/// What is gone of a surface: name, entry, and the values that are meant where not all are.
fn gone(surface: Surface) -> Vec<(String, &'static deprecation::Deprecation, String)> {
    let mut rows = Vec::new();
    for item in deprecation::all() {
        for selector in item.selectors.iter().filter(|selector| selector.surface == surface) {
            let values = match selector.values.join("`, `") {
                values if values.is_empty() => String::new(),
                values => format!(" = `{values}`"),
            };
            rows.extend(selector.names.iter().map(|name| (name.to_string(), item, values.clone())));
        }
    }
    rows.sort_by(|left, right| left.0.cmp(&right.0));
    rows
}

fn annotations_part() -> String {
    let mut text = String::from(
        "\n## Annotations\n\nNo annotation is open by default. `hypervisor.qemu.enable_annotations` opens them, by patterns that match the whole \
         of what is in the second column; upstream's five are\n\n```toml\n[hypervisor.qemu]\nenable_annotations = [\"enable_iommu\", \"kernel_params\", \
         \"kernel_verity_params\", \"default_vcpus\", \"default_memory\"]\n```\n\nAn annotation that names a program or passes it arguments has to be listed by its very \
         name. A path has to match a pattern of its list, and to lie below that pattern's directory behind no symbolic link.\n\n\
         | annotation | opened by | sets | type | further condition |\n|---|---|---|---|---|\n",
    );
    for key in keys::all() {
        let Some(name) = key.annotation_name() else { continue };
        let (listing, path) = (annotations::listing(&name), key.path());
        let _ = writeln!(
            text,
            "| `{name}` | `{listing}` | `{path}` | {} | {} |",
            key.kind,
            key.condition().unwrap_or_default()
        );
    }
    text.push_str(
        "\nAnnotations of upstream's that set no key:\n\n| annotation | status | |\n|---|---|---|\n",
    );
    for other in OTHERS {
        let status = if other.refused { "planned: refused" } else { "passed over" };
        let _ = writeln!(text, "| `{}` | {status} | {} |", other.name, other.doc);
    }
    for (name, item, values) in gone(Surface::Annotation) {
        let link = format!("[{}](deprecations.md#{})", item.id, item.id.to_lowercase());
        let _ = writeln!(text, "| `{name}`{values} | removed, {link} | Instead, {}. |", item.replacement);
    }
    text
}

fn man() -> String {
    let mut roff = Roff::new();
    roff.control("TH", ["KATA-CONFIGURATION", "5", "", concat!("Kata ", env!("CARGO_PKG_VERSION")), "Kata"]);
    roff.control("SH", ["NAME"])
        .text([roman("kata-configuration - the configuration of pods in virtual machines")]);
    roff.control("SH", ["DESCRIPTION"]).text([
        roman("A TOML file says what differs from the defaults. The first of "),
        bold("--config"),
        roman(" or "),
        bold("KATA_CONF_FILE"),
        roman(", and "),
        bold("configuration.toml"),
        roman(" in the directories below, is read, then "),
        bold("config.d/*.toml"),
        roman(" beside it by name, then the command line's "),
        bold("--set"),
        roman(", then those of the pod's annotations that "),
        bold("hypervisor.qemu.enable_annotations"),
        roman(" opens. The later layer wins."),
    ]);
    for (section, keys) in sections() {
        roff.control("SH", [format!("[{section}]").as_str()]);
        for key in keys {
            roff.control("TP", []).text([
                bold(key.name),
                roman(format!(
                    " ({}; {}; default {})",
                    plain(&shape(key)),
                    key.status_word(),
                    plain(&key.default())
                )),
            ]);
            roff.text([roman(plain(&meaning(key)))]);
        }
    }
    roff.control("SH", ["FILES"]);
    for dir in kata_config::search() {
        roff.control("PP", []).text([bold(format!("{dir}/configuration.toml"))]);
    }
    roff.control("SH", ["SEE ALSO"]).text([
        bold("kata-ctl"),
        roman("(1), "),
        bold("kata-deprecations"),
        roman("(7)"),
    ]);
    roff.render()
}

fn plain(markdown: &str) -> String {
    markdown.replace('`', "").replace("\\|", "|")
}

/// JSON Schema of a file, for editors: every key that may be written, planned ones too.
fn schema() -> Chores<String> {
    let mut root = node("The configuration of pods in virtual machines.");
    for key in keys::all() {
        let paths = match key.drivers() {
            [] => vec![key.path()],
            drivers => drivers.iter().map(|driver| key.path().replace('*', driver)).collect(),
        };
        for path in paths {
            insert(&mut root, &path, property(key));
        }
    }
    let mut schema = Map::new();
    schema.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
    schema.insert("title".to_owned(), json!("Kata configuration"));
    schema.extend(root);
    let text = serde_json::to_string_pretty(&schema)
        .map_err(|source| ChoreError::Json { what: "the schema of the configuration", source })?;
    Ok(text + "\n")
}

fn node(description: &str) -> Map<String, Value> {
    let text = json!({ "type": "object", "description": description, "additionalProperties": false, "properties": {} });
    match text {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

fn insert(table: &mut Map<String, Value>, path: &str, property: Value) {
    let Some(Value::Object(properties)) = table.get_mut("properties") else { return };
    match path.split_once('.') {
        None => drop(properties.insert(path.to_owned(), property)),
        Some((name, rest)) => {
            let inner = properties.entry(name).or_insert_with(|| Value::Object(node("A section.")));
            if let Value::Object(inner) = inner {
                insert(inner, rest, property);
            }
        }
    }
}

fn property(key: &Key) -> Value {
    let mut property = match key.kind {
        Kind::Boolean => json!({ "type": "boolean" }),
        Kind::Integer { least, most: u64::MAX } => json!({ "type": "integer", "minimum": least }),
        Kind::Integer { least, most } => json!({ "type": "integer", "minimum": least, "maximum": most }),
        Kind::Number { least, most } if least.is_finite() => {
            json!({ "type": "number", "minimum": least, "maximum": most })
        }
        Kind::Number { most, .. } => json!({ "type": "number", "maximum": most }),
        Kind::Text => json!({ "type": "string" }),
        Kind::Path => json!({ "type": "string", "pattern": "^(/.*)?$" }),
        Kind::Word(words) => json!({ "enum": ([words, key.planned_words].concat()) }),
        Kind::List => json!({ "type": "array", "items": { "type": "string" } }),
        Kind::Tables => json!({ "type": "array", "items": { "type": "object" } }),
    };
    let planned = if key.is_supported() { "" } else { " Not acted on by this version." };
    property["description"] = json!(format!("{}{planned}", plain(&key.doc())));
    let default = format!("v = {}", key.default()).parse::<toml::Table>().ok();
    let default = default.and_then(|table| serde_json::to_value(table.get("v")?).ok());
    if let Some(default) = default {
        property["default"] = default;
    }
    property
}

/// A file with every supported key at its default, commented out.
fn example() -> String {
    let mut text = String::from(
        "# Every setting that this version acts on, at its default. Only what differs need be written.\n\
         # Written by cargo xtask docs; docs/configuration-reference.md says more.\n",
    );
    let mut by_section: BTreeMap<usize, (&str, Vec<&Key>)> = BTreeMap::new();
    for (index, (section, keys)) in sections().into_iter().enumerate() {
        let supported: Vec<&Key> = keys.into_iter().filter(|key| key.is_supported()).collect();
        if !supported.is_empty() {
            by_section.insert(index, (section, supported));
        }
    }
    for (section, keys) in by_section.values() {
        let _ = write!(text, "\n[{}]\n", section.replace('*', "qemu"));
        for key in keys {
            example_key(&mut text, key);
        }
    }
    text
}

fn example_key(text: &mut String, key: &Key) {
    text.push('\n');
    for line in wrapped(&plain(&key.doc()), 100) {
        let _ = writeln!(text, "# {line}");
    }
    let default = key.default();
    let is_value = format!("v = {default}").parse::<toml::Table>().is_ok();
    let mut facts: Vec<String> = key.unit.iter().map(|unit| format!("Unit: {unit}.")).collect();
    facts.extend(key.kind.range().filter(|_| key.kind != Kind::Path).map(|range| format!("Range: {range}.")));
    facts.extend((!is_value).then(|| format!("Default: {}.", plain(&default))));
    if !facts.is_empty() {
        let _ = writeln!(text, "# {}", facts.join(" "));
    }
    let _ = writeln!(text, "#{} = {}", key.name, if is_value { &default } else { "\"\"" });
}

fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests;
