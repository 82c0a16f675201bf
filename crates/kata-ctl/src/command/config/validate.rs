//! `config validate`: everything that is wrong, and everything to know.

use kata_config::{ConfigError, Note, Reading, Remark, Sources};
use serde_json::{Value, json};

use super::{Outcome, origin_as_json};
use crate::cli::ConfigValidateArgs;
use crate::output;

/// What was found.
#[derive(Default)]
struct Findings {
    /// What cannot be understood.
    errors: Vec<ConfigError>,
    /// What no pod can be made with.
    refused: Vec<ConfigError>,
    notes: Vec<Note>,
}

/// Prints what was found; 1 where no pod could be made.
pub(super) fn run(args: &ConfigValidateArgs, sources: &Sources) -> Outcome {
    let base = sources.base();
    let findings = match Reading::of(sources) {
        Ok(reading) => Findings { refused: reading.unmet, notes: reading.notes, ..Findings::default() },
        Err(errors) => {
            let (refused, errors) = errors.0.into_iter().partition(|error| error.fault.is_unmet());
            Findings { errors, refused, ..Findings::default() }
        }
    };
    let usable = findings.errors.is_empty() && findings.refused.is_empty();
    if args.json {
        output::document(&json!({
            "file": base,
            "usable": usable,
            "errors": findings.errors.iter().map(as_object).collect::<Vec<_>>(),
            "refused": findings.refused.iter().map(as_object).collect::<Vec<_>>(),
            "notes": findings.notes.iter().map(note_as_object).collect::<Vec<_>>(),
        }))?;
    } else {
        output::print(&as_text(&findings, args.notes))?;
        let what = base.map_or_else(|| "no file, the defaults".to_owned(), |file| file.display().to_string());
        output::print(&format!("{what}: {}\n", verdict(&findings)))?;
    }
    Ok(if usable { 0 } else { 1 })
}

fn as_text(findings: &Findings, all_notes: bool) -> String {
    let mut text = String::new();
    for (label, errors) in [("error:   ", &findings.errors), ("refused: ", &findings.refused)] {
        for error in errors {
            text.push_str(&format!("{label}{error}\n"));
        }
    }
    let mut idle = 0;
    for note in &findings.notes {
        match note.remark {
            Remark::Idle | Remark::Removed(_) if !all_notes => idle += 1,
            _ => text.push_str(&format!("note:    {note}\n")),
        }
    }
    match idle {
        0 => {}
        1 => text.push_str("note:    1 setting is not acted on and asks for nothing; --notes names it\n"),
        _ => text.push_str(&format!(
            "note:    {idle} settings are not acted on and ask for nothing; --notes names them\n"
        )),
    }
    text
}

fn verdict(findings: &Findings) -> String {
    match (findings.errors.len(), findings.refused.len()) {
        (0, 0) => "good".to_owned(),
        (0, refused) => format!("well-formed, but no pod can be made: {refused} refused"),
        (errors, 0) => format!("not good: {}", counted(errors, "error")),
        (errors, refused) => format!("not good: {}, {refused} refused", counted(errors, "error")),
    }
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn as_object(error: &ConfigError) -> Value {
    json!({
        "key": Some(&error.key).filter(|key| !key.is_empty()),
        "message": error.fault.to_string(),
        "origin": origin_as_json(Some(&error.origin)),
    })
}

fn note_as_object(note: &Note) -> Value {
    json!({ "key": note.key, "message": note.remark.to_string(), "origin": origin_as_json(Some(&note.origin)) })
}
