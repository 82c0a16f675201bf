//! Taking secrets out of what leaves this host.
//!
//! Three nets, each for what slips through the others: names (a variable, a key, a flag that is called after a secret),
//! shapes (tokens, credentials in addresses, private keys), and values (what a container's variables hold is looked for
//! everywhere, as in a log that repeats one). Too much rather than too little: who needs a value can ask for it.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use regex::{Captures, Regex};
use serde_json::Value;

use super::bundles;
use crate::bundle;
use crate::pod::PodDir;

const REDACTED: &str = "[redacted]";
/// Shortest value of a variable that is looked for elsewhere: shorter ones are words that mean nothing.
const VALUE_MIN: usize = 6;
/// Variables whose values are no secret, and would take names of files out of every log.
const PLAIN: [&str; 10] =
    ["PATH", "HOME", "TERM", "HOSTNAME", "LANG", "LC_ALL", "PWD", "SHELL", "USER", "TZ"];
/// An annotation with the whole manifest in it, variables included.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Names that speak of secrets.
const NAMES: &str = "pass(?:word|wd|phrase)?|secret|token|credential|api[-_.]?key|access[-_.]?key|private[-_.]?key|\
    encryption[-_.]?key|auth(?:orization)?|bearer|cookie|session";

/// The patterns, compiled once; that they can be is tested.
static SHAPES: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    let named = format!(
        r#"(?i)((?:[\w.\-]*(?:{NAMES})[\w.\-]*)["']?\s*[=:]\s*)("(?:\\.|[^"\\])*"|'[^']*'|[^\s,;}}\]]+)"#
    );
    // In a text of a command: in a list of words it is the next one.
    let flag = format!(r#"(?i)((?:^|[\s"'])--?[\w\-]*(?:{NAMES})[\w\-]*)\s+[^\s"']+"#);
    let shapes: [(&str, &str); 9] = [
        (r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\z)", REDACTED),
        // scheme://user:password@host; a password may have any of the characters that end an address.
        (r#"([a-zA-Z][a-zA-Z0-9+.\-]*://)[^\s"'<>]+@"#, "${1}[redacted]@"),
        (r#"(?i)(\bauthorization["']?\s*[=:]\s*["']?)[^"'\r\n]+"#, "${1}[redacted]"),
        (r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=._~\-]{6,}", "${1} [redacted]"),
        // JSON web tokens, and the well-known prefixes of cloud and registry tokens.
        (r"\beyJ[A-Za-z0-9_\-]{6,}(?:\.[A-Za-z0-9_\-]*)*", REDACTED),
        (r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", REDACTED),
        (r"\b(?:gh[pousr]_|github_pat_|glpat-|dckr_pat_|xox[abprs]-)[A-Za-z0-9_\-]{8,}", REDACTED),
        (&flag, "${1} [redacted]"),
        (&named, "${1}[redacted]"),
    ];
    shapes.iter().filter_map(|(pattern, with)| Some((Regex::new(pattern).ok()?, *with))).collect()
});
static SECRET_NAME: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(&format!("(?i)(?:{NAMES})")).ok());
/// Number of patterns that there have to be.
#[cfg(test)]
const SHAPE_COUNT: usize = 9;

/// What is taken out.
#[derive(Default)]
pub struct Redaction {
    /// Values of variables, longest first.
    values: Vec<String>,
}

impl Redaction {
    /// Takes note of what the containers of a pod have in their variables.
    pub async fn learn(&mut self, pod: &PodDir) {
        let mut values: BTreeSet<String> = std::mem::take(&mut self.values).into_iter().collect();
        for (_, dir) in bundles(pod).await {
            let process = bundle::process_of(&dir).unwrap_or_default();
            for entry in process.env().iter().flatten() {
                values.extend(secret_value(entry));
            }
        }
        self.values = values.into_iter().collect();
        self.values.sort_by_key(|value| std::cmp::Reverse(value.len()));
    }

    /// A text without secrets.
    pub fn text(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for value in &self.values {
            if text.contains(value.as_str()) {
                text = text.replace(value.as_str(), REDACTED);
            }
        }
        for (shape, with) in SHAPES.iter() {
            text = shape
                .replace_all(&text, |found: &Captures<'_>| {
                    let mut new = String::new();
                    found.expand(with, &mut new);
                    new
                })
                .into_owned();
        }
        text
    }

    /// A document without secrets.
    pub fn json(&self, document: Value) -> Value {
        match document {
            Value::Object(fields) => {
                let field = |(name, value): (String, Value)| {
                    let value = match (name.as_str(), value) {
                        ("env" | "Env", Value::Array(entries)) => entries.iter().map(variable).collect(),
                        ("variables", value) => value,
                        ("args" | "command", Value::Array(words)) => self.words(words),
                        (LAST_APPLIED, _) => REDACTED.into(),
                        (name, value) if is_secret_name(name) && !value.is_object() && !value.is_null() => {
                            REDACTED.into()
                        }
                        (_, value) => self.json(value),
                    };
                    (name, value)
                };
                Value::Object(fields.into_iter().map(field).collect())
            }
            Value::Array(values) => values.into_iter().map(|value| self.json(value)).collect(),
            Value::String(text) => self.text(&text).into(),
            other => other,
        }
    }

    /// A command line, in which a secret may follow its flag.
    fn words(&self, words: Vec<Value>) -> Value {
        let mut follows = false;
        words
            .into_iter()
            .map(|word| {
                let Value::String(text) = word else { return word };
                let hidden = std::mem::replace(
                    &mut follows,
                    text.starts_with('-') && !text.contains('=') && is_secret_name(&text),
                );
                if hidden { REDACTED.into() } else { self.text(&text).into() }
            })
            .collect()
    }
}

fn is_secret_name(name: &str) -> bool {
    // Without its pattern every name would be one.
    SECRET_NAME.as_ref().is_none_or(|pattern| pattern.is_match(name))
}

/// `NAME=[redacted]`
fn variable(entry: &Value) -> Value {
    match entry.as_str() {
        Some(entry) => {
            let name = entry.split('=').next().unwrap_or_default();
            if PLAIN.contains(&name) { entry.into() } else { format!("{name}={REDACTED}").into() }
        }
        None => REDACTED.into(),
    }
}

/// The value to look for, if it may be a secret.
fn secret_value(entry: &str) -> Option<String> {
    let (name, value) = entry.split_once('=')?;
    (!PLAIN.contains(&name) && value.len() >= VALUE_MIN).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn redaction(values: &[&str]) -> Redaction {
        Redaction { values: values.iter().map(|value| (*value).to_owned()).collect() }
    }

    #[test]
    fn every_pattern_is_one() {
        assert_eq!(SHAPES.len(), SHAPE_COUNT);
        assert!(SECRET_NAME.is_some());
    }

    #[test]
    fn secrets_are_known_by_their_names() {
        for text in [
            "password=hunter22x",
            "DB_PASSWORD: hunter22x",
            "api-key = 'hunter22x'",
            r#"{"auth":"hunter22x"}"#,
            "registry_token=\"hunter22x\"",
            "Authorization: Basic hunter22x",
            "https://user:hunter22x@registry.example/v2/",
            "-----BEGIN RSA PRIVATE KEY-----\nhunter22x\n-----END RSA PRIVATE KEY-----",
            "sent Bearer hunter22x.abc",
            "Authorization: ApiKey hunter22x",
            "sh -c 'app --token hunter22x --level 3'",
            "postgres://user:pa/hunter22x@db",
            "postgres://user:p@hunter22x@db",
            r#"password: "a\"hunter22x""#,
        ] {
            let redacted = redaction(&[]).text(text);
            assert!(
                !redacted.contains("hunter22x") && redacted.contains(REDACTED),
                "{text} became {redacted}"
            );
        }
    }

    #[test]
    fn tokens_are_known_by_their_shape() {
        for text in
            ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln", "AKIAIOSFODNN7EXAMPLE", "ghp_0123456789abcdef"]
        {
            assert_eq!(redaction(&[]).text(&format!("got {text} here")), format!("got {REDACTED} here"));
        }
    }

    #[test]
    fn values_of_variables_are_found_wherever_they_are() {
        let redaction = redaction(&["planted-value"]);
        assert_eq!(redaction.text("the agent said planted-value!"), format!("the agent said {REDACTED}!"));
        let document = redaction
            .json(json!({ "a": ["x planted-value"], "env": ["PATH=/bin", "A=b", "S=planted-value"] }));
        let told = json!({ "a": [format!("x {REDACTED}")], "env": ["PATH=/bin", format!("A={REDACTED}"), format!("S={REDACTED}")] });
        assert_eq!(document, told);
    }

    #[test]
    fn command_lines_and_annotations_are_looked_through() {
        let document = redaction(&[]).json(json!({
            "args": ["app", "--token", "abc", "--level", "3", "--password=abc"],
            "annotations": { LAST_APPLIED: "{}", "example.org/pull-secret": "abc", "example.org/name": "web" },
        }));
        assert_eq!(
            document["args"],
            json!(["app", "--token", REDACTED, "--level", "3", format!("--password={REDACTED}")])
        );
        assert_eq!(document["annotations"][LAST_APPLIED], REDACTED);
        assert_eq!(document["annotations"]["example.org/pull-secret"], REDACTED);
        assert_eq!(document["annotations"]["example.org/name"], "web");
    }

    #[test]
    fn what_is_no_secret_stays() {
        for text in [
            "2026-11-25T15:02:29.8Z  INFO agent: container created container=\"w\" pid=83",
            "hypervisor.qemu.path = \"/usr/bin/qemu-system-x86_64\"",
            "model name\t: AMD EPYC",
        ] {
            assert_eq!(redaction(&[]).text(text), text);
        }
    }
}
