//! `env`: what this host, its programs and its configuration are, for a report or a comparison.

use kata_config::{Config, Sources, paths};
use serde_json::{Value, json};

use super::{Outcome, absolute, check, version};
use crate::cli::EnvArgs;
use crate::failure::chain;
use crate::{output, table};

/// Variables that change where things are or what is told.
const VARIABLES: [&str; 5] = ["KATA_CONF_FILE", "KATA_RUN_DIR", "KATA_STATE_DIR", "KATA_LOG", "KATA_TIMING"];

/// Prints it.
pub fn run(args: &EnvArgs) -> Outcome {
    let document = describe(args.config.as_deref());
    if args.json {
        output::document(&document)?;
    } else {
        output::print(&as_text(&document))?;
    }
    Ok(0)
}

/// Everything, as a document.
pub fn describe(config: Option<&std::path::Path>) -> Value {
    let sources = Sources { file: config.map(absolute), ..Sources::default() };
    let loaded = Config::load(&sources);
    let fault = loaded.as_ref().err().map(ToString::to_string);
    let config = loaded.unwrap_or_default();
    let owner = check::ask_owner(check::HOST, sources.file.as_deref(), &[]);
    let owner_error = owner.as_ref().err().and_then(|failure| Some(chain(&**failure.error.as_ref()?)));
    let owner = owner.unwrap_or_default();
    let part = |pointer: &str| owner.pointer(pointer).cloned().unwrap_or_default();
    let uname = rustix::system::uname();
    let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    json!({
        "host": {
            "os": os_release("PRETTY_NAME"),
            "kernel": text(uname.release()),
            "kernel_build": text(uname.version()),
            "architecture": text(uname.machine()),
            "cpu": cpu(),
            "cpus": part("/host/cpus"),
            "memory_mib": part("/host/memory_mib"),
            "kvm": part("/host/kvm"),
        },
        "vmm": {
            "driver": part("/choice/driver"),
            "accelerator": part("/choice/accelerator").as_str().map(str::to_lowercase),
            "reason": part("/choice/reason"),
            "qemu": part("/host/qemu/path"),
        },
        "artefacts": part("/artefacts"),
        "config": { "file": sources.base(), "drop_ins": drop_ins(&sources), "error": fault },
        "directories": { "run": paths::run_dir(), "state": paths::state_dir() },
        "variables": VARIABLES.into_iter().filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?.into())))
            .collect::<serde_json::Map<_, _>>(),
        "versions": version::parts(&config),
        "owner_error": owner_error,
    })
}

/// `config.d/*.toml` beside the base file.
pub fn drop_ins(sources: &Sources) -> Vec<std::path::PathBuf> {
    let dir = sources.base().and_then(|file| Some(file.canonicalize().ok()?.parent()?.join("config.d")));
    let entries = dir.and_then(|dir| std::fs::read_dir(dir).ok()).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries.map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    files
}

fn os_release(key: &str) -> Option<String> {
    let text = std::fs::read_to_string("/etc/os-release").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
    Some(value.trim_matches('"').to_owned())
}

fn cpu() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// A section for each object, a line for each of its values.
fn as_text(document: &Value) -> String {
    let mut lines: Vec<[String; 2]> = Vec::new();
    for section in ["host", "vmm", "config", "directories", "variables"] {
        for (name, value) in document.get(section).and_then(Value::as_object).into_iter().flatten() {
            if !value.is_null() {
                lines.push([format!("{section}.{name}"), plain(value)]);
            }
        }
    }
    for part in document.get("versions").and_then(Value::as_array).into_iter().flatten() {
        let of = |name: &str| part.get(name).map(plain).unwrap_or_default();
        lines.push([format!("version.{}", of("name").replace(' ', "_")), of("version")]);
    }
    if let Some(error) = document.get("owner_error").and_then(Value::as_str) {
        lines.push(["error".to_owned(), error.to_owned()]);
    }
    table::columns(&lines)
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "unknown".to_owned(),
        Value::Array(values) if values.is_empty() => "none".to_owned(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(", "),
        Value::Object(fields) => fields.values().map(plain).collect::<Vec<_>>().join(" "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_a_line_for_each_value() {
        let document = json!({
            "host": { "kernel": "6.1", "kvm": { "state": "absent" }, "cpu": null },
            "config": { "drop_ins": [] },
            "versions": [{ "name": "guest kernel", "version": null }],
        });
        let text = as_text(&document);
        assert!(text.contains("host.kernel           6.1\n"), "{text}");
        assert!(text.contains("host.kvm              absent\n") && !text.contains("host.cpu"), "{text}");
        assert!(
            text.contains("version.guest_kernel  unknown\n") && text.contains("config.drop_ins       none\n")
        );
    }
}
