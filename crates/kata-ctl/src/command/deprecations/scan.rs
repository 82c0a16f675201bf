//! Finds uses in what is no configuration file: values of a chart, Kubernetes manifests, command lines.

use kata_config::deprecation::{Fit, Registered, Surface};
use serde_json::{Map, Value};

use super::check::Use;

/// Uses in values of the Helm chart, by dotted path.
pub fn values(place: &str, documents: &[Value]) -> Vec<Use> {
    let mut uses = Vec::new();
    for document in documents {
        value(place, "", document, &mut uses);
    }
    uses
}

fn value(place: &str, path: &str, at: &Value, uses: &mut Vec<Use>) {
    if !path.is_empty()
        && let Some(found) = look_up(Surface::HelmValue, path, plain(at).as_deref(), place)
    {
        // What is below belongs to it.
        return uses.push(found);
    }
    for (key, inner) in at.as_object().into_iter().flatten() {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        value(place, &path, inner, uses);
    }
}

/// Uses in Kubernetes objects: annotations and runtime classes wherever they are, commands of containers, sources of
/// kustomizations.
pub fn manifests(place: &str, documents: &[Value]) -> Vec<Use> {
    let mut uses = Vec::new();
    for document in documents {
        let kind = text(document, "kind");
        let name = document.get("metadata").map(|metadata| text(metadata, "name")).unwrap_or_default();
        let place = match (kind, name) {
            ("", _) => place.to_owned(),
            (kind, "") => format!("{place}, {kind}"),
            (kind, name) => format!("{place}, {kind} {name}"),
        };
        if kind == "RuntimeClass" {
            let names = [name, text(document, "handler")];
            uses.extend(names.iter().find_map(|name| look_up(Surface::RuntimeClass, name, None, &place)));
        }
        object(&place, document, &mut uses);
    }
    uses
}

fn object(place: &str, at: &Value, uses: &mut Vec<Use>) {
    match at {
        Value::Array(items) => items.iter().for_each(|item| object(place, item, uses)),
        Value::Object(fields) => {
            for (key, inner) in fields {
                match (key.as_str(), inner) {
                    ("annotations", Value::Object(annotations)) => annotate(place, annotations, uses),
                    ("runtimeClassName", Value::String(name)) => {
                        uses.extend(look_up(Surface::RuntimeClass, name, None, place));
                    }
                    ("resources" | "bases" | "components", Value::Array(sources)) => {
                        let sources = sources.iter().filter_map(Value::as_str);
                        uses.extend(sources.filter_map(|source| artifact(source, place)));
                    }
                    _ => object(place, inner, uses),
                }
            }
            let words: Vec<&str> = ["command", "args"]
                .iter()
                .filter_map(|key| fields.get(*key)?.as_array())
                .flat_map(|words| words.iter().filter_map(Value::as_str))
                .collect();
            uses.extend(look_up(Surface::Cli, &words.join(" "), None, place));
        }
        _ => {}
    }
}

fn annotate(place: &str, annotations: &Map<String, Value>, uses: &mut Vec<Use>) {
    let found = annotations
        .iter()
        .filter_map(|(key, value)| look_up(Surface::Annotation, key, plain(value).as_deref(), place));
    uses.extend(found);
}

/// Uses in a command: the program and its flags, files, `--set key=value`, `--annotation key=value`, `--runtime type`.
pub fn command_line(words: &[String]) -> Vec<Use> {
    const PLACE: &str = "the command line";
    let mut uses = Vec::new();
    let line = words.join(" ");
    uses.extend(look_up(Surface::Cli, &line, None, PLACE));
    for word in words {
        uses.extend(artifact(word, PLACE));
        if let Some(name) = word.strip_prefix("io.containerd.").and_then(|rest| rest.strip_suffix(".v2")) {
            uses.extend(look_up(Surface::RuntimeClass, name, None, PLACE));
        }
        // The flag may be part of the word, as in --set=key=value.
        let assignment =
            if word.starts_with("--") { word.split_once('=').map_or("", |(_, rest)| rest) } else { word };
        if let Some((key, value)) = assignment.split_once('=') {
            let value = value.trim_matches('"');
            for surface in [Surface::ConfigKey, Surface::Annotation] {
                uses.extend(look_up(surface, key, Some(value), PLACE));
            }
        }
    }
    uses
}

/// A path, or a link with a query behind it and perhaps a slash at its end.
fn artifact(source: &str, place: &str) -> Option<Use> {
    let path = source.split(['?', '#']).next().unwrap_or(source).trim_end_matches('/');
    let mut found = look_up(Surface::Artifact, path, None, place)?;
    found.what = source.to_owned();
    Some(found)
}

fn look_up(surface: Surface, name: &str, value: Option<&str>, place: &str) -> Option<Use> {
    let (deprecation, fit) = Registered::PROGRAM.find_value(surface, name, value)?;
    let what = match value {
        Some(value)
            if deprecation.selectors.iter().any(|one| !one.values.is_empty() && one.names(surface, name)) =>
        {
            format!("{name} = {value}")
        }
        _ => name.to_owned(),
    };
    Some(Use { deprecation, surface, place: place.to_owned(), what, asks: fit == Fit::Yes })
}

/// A value as the registry writes it.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        Value::Array(items) if items.is_empty() => Some("[]".to_owned()),
        _ => None,
    }
}

fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object.get(key).and_then(Value::as_str).unwrap_or_default()
}
