//! `config explain`: all that is known of one setting or annotation.

use kata_config::deprecation::{self, Deprecation, Surface};
use kata_config::keys::Key;
use kata_config::{annotations, keys};
use serde_json::{Value, json};

use super::{ConfigVerbError, Outcome, as_json};
use crate::cli::ConfigExplainArgs;
use crate::failure::{Failure, NO_SUCH};
use crate::output;
use crate::table;

/// What a name stands for.
enum Subject {
    Key(&'static Key),
    Annotation(&'static annotations::Other),
    Gone(&'static Deprecation),
}

/// Prints what is known. A name that stands for several keys explains each.
pub(super) fn run(args: &ConfigExplainArgs) -> Outcome {
    let subjects = subjects(&args.name);
    if subjects.is_empty() {
        let nearest = nearest(&args.name);
        return Err(Failure::with_code(
            NO_SUCH,
            ConfigVerbError::Unknown { name: args.name.clone(), nearest },
        ));
    }
    if args.json {
        let all: Vec<Value> = subjects.iter().map(|subject| as_object(&args.name, subject)).collect();
        output::document(&Value::Array(all))?;
    } else {
        let all: Vec<String> = subjects.iter().map(|subject| as_text(&args.name, subject)).collect();
        output::print(&all.join("\n"))?;
    }
    Ok(0)
}

/// By path, by annotation, or by the bare name of a key.
fn subjects(name: &str) -> Vec<Subject> {
    if let Some(key) = keys::lookup(name).or_else(|| annotations::key_of(name)) {
        return vec![Subject::Key(key)];
    }
    if let Some(other) = annotations::OTHERS.iter().find(|other| other.name == name) {
        return vec![Subject::Annotation(other)];
    }
    let gone = deprecation::find(Surface::ConfigKey, name)
        .or_else(|| deprecation::find(Surface::Annotation, name))
        .or_else(|| deprecation::find(Surface::ConfigKey, &format!("hypervisor.qemu.{name}")))
        .or_else(|| deprecation::find(Surface::ConfigKey, &format!("runtime.{name}")));
    if let Some(gone) = gone {
        return vec![Subject::Gone(gone)];
    }
    keys::all().filter(|key| key.name == name).map(Subject::Key).collect()
}

fn nearest(name: &str) -> Option<String> {
    let mut names: Vec<String> = keys::all().map(Key::own_path).collect();
    names.extend(keys::all().filter_map(Key::annotation_name));
    names.extend(keys::all().map(|key| key.name.to_owned()));
    keys::nearest(name, names.iter().map(String::as_str)).map(str::to_owned)
}

fn as_text(name: &str, subject: &Subject) -> String {
    let (title, doc, lines) = match subject {
        Subject::Key(key) => (key.path(), key.doc(), key_lines(key)),
        Subject::Annotation(other) => {
            let status =
                if other.refused { "not carried out: a pod that has it is refused" } else { "passed over" };
            (other.name.to_owned(), other.doc.to_owned(), vec![["status".to_owned(), status.to_owned()]])
        }
        Subject::Gone(gone) => (name.to_owned(), sentence(&gone.reason), gone_lines(gone)),
    };
    let lines: Vec<_> = lines.into_iter().map(|[label, text]| [format!("  {label}"), text]).collect();
    format!("{title}\n  {doc}\n\n{}", table::columns(&lines))
}

fn sentence(clause: &str) -> String {
    let mut chars = clause.chars();
    let first = chars.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}.", chars.as_str())
}

fn key_lines(key: &Key) -> Vec<[String; 2]> {
    let mut lines = Vec::new();
    let mut line = |label: &str, text: Option<String>| {
        lines.extend(text.map(|text| [label.to_owned(), text]));
    };
    line("type", Some(key.kind.name().to_owned()));
    line("unit", key.unit.map(str::to_owned));
    line("range", key.kind.range());
    line("planned words", Some(key.planned_words.join(", ")).filter(|words| !words.is_empty()));
    line("default", Some(key.default()));
    line("upstream's default", key.other_default().map(str::to_owned));
    line("known to", Some(key.source.as_str().to_owned()));
    line("sections", Some(sections(key)));
    line("stability", Some(key.stability.as_str().to_owned()));
    line("status", Some(status(key).to_owned()));
    line("annotation", key.annotation_name());
    let opt_in =
        |name: String| format!("hypervisor.qemu.enable_annotations = [{:?}]", annotations::listing(&name));
    line("lets pods set it", key.annotation_name().map(opt_in));
    lines
}

fn sections(key: &Key) -> String {
    match key.drivers() {
        [] => format!("[{}]", key.section),
        [driver] => format!("[{}]", key.section.replace('*', driver)),
        drivers => format!("[{}], * being one of {}", key.section, drivers.join(", ")),
    }
}

fn status(key: &Key) -> &'static str {
    match (key.is_supported(), key.section.contains('*')) {
        (true, true) => {
            "supported in [hypervisor.qemu] and in the section of the driver that is chosen; others are checked and not used"
        }
        (true, false) => "supported",
        (false, _) => {
            "planned: a value that asks for nothing is noted, any other keeps a pod from being made"
        }
    }
}

fn gone_lines(gone: &Deprecation) -> Vec<[String; 2]> {
    [
        ("status", format!("{} [{} {}]", gone.stage, gone.id, gone.title)),
        ("instead", gone.replacement.to_string()),
        ("last release", gone.last_release.to_string()),
        ("more", format!("kata-ctl deprecations show {}", gone.id)),
    ]
    .map(|(label, text)| [label.to_owned(), text])
    .to_vec()
}

fn as_object(name: &str, subject: &Subject) -> Value {
    match subject {
        Subject::Key(key) => json!({
            "key": key.path(),
            "doc": key.doc(),
            "type": key.kind.name(),
            "unit": key.unit,
            "range": key.kind.range(),
            "planned_words": key.planned_words,
            "default": as_json(Some(&key.default())),
            "upstream_default": as_json(key.other_default()),
            "known_to": key.source.as_str(),
            "drivers": key.drivers(),
            "stability": key.stability.as_str(),
            "status": key.status_word(),
            "annotation": key.annotation_name(),
            "deprecation": Value::Null,
        }),
        Subject::Annotation(other) => json!({
            "annotation": other.name,
            "doc": other.doc,
            "status": if other.refused { "planned" } else { "passed over" },
        }),
        Subject::Gone(gone) => json!({
            "key": name,
            "status": gone.stage.as_str(),
            "deprecation": gone.id,
            "doc": gone.reason,
            "replacement": gone.replacement,
            "last_release": gone.last_release,
        }),
    }
}
