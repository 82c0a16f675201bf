//! `config migrate`: a file of upstream's as one of ours, comments kept, and an account of what became of the rest.

use std::fmt::Write as _;
use std::path::Path;

use kata_config::{ConfigErrors, Reading, Remark};
use serde_json::json;
use thiserror::Error;
use toml_edit::{DocumentMut, Item, Table, Value};

use super::{ConfigVerbError, Outcome};
use crate::cli::ConfigMigrateArgs;
use crate::failure::Failure;
use crate::output;
use crate::table;

#[derive(Debug, Error)]
enum MigrateError {
    #[error("cannot read {path}")]
    Read { path: String, source: std::io::Error },
    #[error("cannot write {path}")]
    Write { path: String, source: std::io::Error },
    #[error("{path} cannot be taken apart")]
    Parse { path: String, source: toml_edit::TomlError },
    #[error("what came of {path} is not in order; mend the file by hand\n{faults}")]
    Result { path: String, faults: String },
}

/// A value as it is under another name.
type Convert = fn(&Value) -> Option<Value>;

/// Keys that have another name here, and how the value changes.
const MOVES: &[(&str, &str, Convert)] = &[
    ("agent.kata.dial_timeout", "agent.kata.reconnect_timeout_ms", milliseconds),
    ("runtime.create_container_timeout", "agent.kata.create_container_timeout", unchanged),
    ("hypervisor.qemu.seccompsandbox", "hypervisor.qemu.seccomp_sandbox", unchanged),
];

/// Upstream's virtio-fs daemon takes other arguments than ours, so neither it nor what is meant for it can stay.
const DAEMON: &str = "hypervisor.qemu.virtio_fs_daemon";
const DAEMON_ARGUMENTS: &str = "hypervisor.qemu.virtio_fs_extra_args";

/// What became of a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It made no difference.
    Dropped,
    /// It has another name.
    Moved,
    /// It asked for what this version does not do.
    Lost,
}

impl Fate {
    fn as_str(self) -> &'static str {
        match self {
            Self::Dropped => "dropped",
            Self::Moved => "moved",
            Self::Lost => "lost",
        }
    }
}

/// One line of the account.
#[derive(Debug)]
struct Account {
    fate: Fate,
    key: String,
    why: String,
}

/// Writes the file; 1 where something that was asked for is not in it.
pub(super) fn run(args: &ConfigMigrateArgs) -> Outcome {
    let name = args.file.display().to_string();
    let read = |source| MigrateError::Read { path: name.clone(), source };
    let text = std::fs::read_to_string(&args.file).map_err(read)?;
    let (result, accounts) = migrate(&args.file, &text)?;
    match &args.output {
        Some(path) => std::fs::write(path, &result)
            .map_err(|source| MigrateError::Write { path: path.display().to_string(), source })?,
        None => output::print(&result)?,
    }
    let lost = accounts.iter().filter(|account| account.fate == Fate::Lost).count();
    if args.json {
        let entry = |account: &Account| json!({ "fate": account.fate.as_str(), "key": account.key, "why": account.why });
        output::document(
            &json!({ "settings": accounts.iter().map(entry).collect::<Vec<_>>(), "lost": lost }),
        )?;
    } else {
        let line =
            |account: &Account| [account.fate.as_str().to_owned(), account.key.clone(), account.why.clone()];
        eprint!("{}", table::columns(&accounts.iter().map(line).collect::<Vec<_>>()));
    }
    match lost {
        0 => Ok(0),
        _ => Err(Failure::text(format!(
            "{lost} of the settings ask for what this version does not do: without them pods are not what {name} wants"
        ))),
    }
}

/// The new text, and what is not in it as it was. Losses come last, where they are seen.
fn migrate(file: &Path, text: &str) -> Result<(String, Vec<Account>), Failure> {
    let name = file.display().to_string();
    let reading = Reading::of_text(file, text).map_err(ConfigVerbError::Faults)?;
    let mut document: DocumentMut =
        text.parse().map_err(|source| MigrateError::Parse { path: name.clone(), source })?;
    let mut accounts = Vec::new();
    for note in &reading.notes {
        take(document.as_table_mut(), &note.key);
        let why = match &note.remark {
            Remark::Idle => "makes no difference in this version".to_owned(),
            other => other.to_string(),
        };
        accounts.push(Account { fate: Fate::Dropped, key: note.key.clone(), why });
    }
    for error in &reading.unmet {
        let value = take(document.as_table_mut(), &error.key);
        let moved = value.as_ref().and_then(|value| moved(document.as_table_mut(), &error.key, value));
        accounts.push(match moved {
            Some(to) => Account { fate: Fate::Moved, key: error.key.clone(), why: format!("now {to}") },
            None => Account { fate: Fate::Lost, key: error.key.clone(), why: error.fault.to_string() },
        });
    }
    accounts.extend(upstreams_daemon(document.as_table_mut(), &reading));
    accounts.sort_by_key(|account| account.fate == Fate::Lost);
    prune(document.as_table_mut());
    let result = document.to_string();
    check(file, &result).map_err(|faults| MigrateError::Result { path: name, faults })?;
    Ok((result, accounts))
}

/// The new file has to be read without a remark.
fn check(file: &Path, result: &str) -> Result<(), String> {
    let said = |errors: &ConfigErrors| errors.to_string();
    let reading = Reading::of_text(file, result).map_err(|errors| said(&errors))?;
    let mut text = String::new();
    for note in &reading.notes {
        // Writing to a String never fails.
        let _ = writeln!(text, "{note}");
    }
    for error in &reading.unmet {
        let _ = writeln!(text, "{error}");
    }
    if text.is_empty() { Ok(()) } else { Err(text.trim_end().to_owned()) }
}

fn upstreams_daemon(document: &mut Table, reading: &Reading) -> Vec<Account> {
    let qemu = &reading.config.hypervisor.qemu;
    let upstreams = qemu.virtio_fs_daemon.as_ref().is_some_and(|path| path.ends_with("virtiofsd"));
    let why = "upstream's daemon is started in another way; kata-virtiofsd is used";
    let mut accounts = Vec::new();
    for key in [DAEMON, DAEMON_ARGUMENTS].into_iter().filter(|_| upstreams) {
        if take(document, key).is_some() {
            accounts.push(Account { fate: Fate::Dropped, key: key.to_owned(), why: why.to_owned() });
        }
    }
    accounts
}

/// Takes what is at a dotted path out of the document, with the comments above it.
fn take(document: &mut Table, path: &str) -> Option<Item> {
    let (section, name) = path.rsplit_once('.').unwrap_or(("", path));
    let mut table: &mut dyn toml_edit::TableLike = document;
    for part in section.split('.').filter(|part| !part.is_empty()) {
        table = table.get_mut(part)?.as_table_like_mut()?;
    }
    table.remove(name)
}

/// Puts a value where it belongs here, unless that place is taken already; where that is.
fn moved(document: &mut Table, path: &str, value: &Item) -> Option<&'static str> {
    let (_, to, convert) = MOVES.iter().find(|(from, ..)| *from == path)?;
    let value = convert(value.as_value()?)?;
    let (section, name) = to.rsplit_once('.')?;
    let mut table = document;
    for part in section.split('.') {
        let implicit = || {
            let mut table = Table::new();
            table.set_implicit(true);
            Item::Table(table)
        };
        table = table.entry(part).or_insert_with(implicit).as_table_mut()?;
    }
    table.entry(name).or_insert(Item::Value(value));
    Some(to)
}

fn unchanged(value: &Value) -> Option<Value> {
    let mut value = value.clone();
    value.decor_mut().clear();
    Some(value)
}

fn milliseconds(seconds: &Value) -> Option<Value> {
    Some(Value::from(seconds.as_integer()?.checked_mul(1000)?))
}

/// Removes the tables that nothing is left in.
fn prune(table: &mut Table) {
    let names: Vec<String> = table.iter().map(|(name, _)| name.to_owned()).collect();
    for name in names {
        if let Some(Item::Table(inner)) = table.get_mut(&name) {
            prune(inner);
            if inner.is_empty() {
                table.remove(&name);
            }
        }
    }
}

#[cfg(test)]
mod tests;
