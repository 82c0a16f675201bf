//! `config migrate`: a file of upstream's as one of ours, comments kept, and an account of what became of the rest.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

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

/// Upstream's virtio-fs daemon takes other arguments than ours: what is meant for it cannot stay either.
const DAEMON: &str = "hypervisor.qemu.virtio_fs_daemon";
const DAEMON_ARGUMENTS: &str = "hypervisor.qemu.virtio_fs_extra_args";
/// Where upstream and distributions install the guest that upstream boots, which knows neither our root nor our agent.
const UPSTREAMS_GUEST: [&str; 2] = ["/opt/kata/share/kata-containers", "/usr/share/kata-containers"];
/// Upstream's default, which is too short for an emulated guest.
const UPSTREAMS_PATIENCE: u64 = 3000;

/// What became of a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It made no difference.
    Dropped,
    /// It has another name.
    Moved,
    /// It is in the file, and is upstream's default where this version's is stricter.
    Kept,
    /// It asked for what this version does not do.
    Lost,
}

impl Fate {
    fn as_str(self) -> &'static str {
        match self {
            Self::Dropped => "dropped",
            Self::Moved => "moved",
            Self::Kept => "kept",
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
        let (fate, why) = match moved {
            Some((to, true)) => (Fate::Moved, format!("now {to}")),
            Some((to, false)) => (Fate::Dropped, format!("{to} is set already, and counts")),
            None => (Fate::Lost, error.fault.to_string()),
        };
        accounts.push(Account { fate, key: error.key.clone(), why });
    }
    for (key, why) in upstreams_own(&reading) {
        if take(document.as_table_mut(), key).is_some() {
            accounts.push(Account { fate: Fate::Dropped, key: key.to_owned(), why: why.to_owned() });
        }
    }
    accounts.extend(weaker(&reading));
    accounts.sort_by_key(|account| match account.fate {
        Fate::Dropped | Fate::Moved => 0,
        Fate::Kept => 1,
        Fate::Lost => 2,
    });
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

/// Settings that name parts of upstream's, with what holds without them.
fn upstreams_own(reading: &Reading) -> Vec<(&'static str, &'static str)> {
    const GUEST: &str = "upstream's guest; this version's own is booted";
    let qemu = &reading.config.hypervisor.qemu;
    let theirs = |path: &Option<PathBuf>| {
        path.as_ref().is_some_and(|path| UPSTREAMS_GUEST.iter().any(|dir| path.starts_with(dir)))
    };
    let daemon = reading.notes.iter().any(|note| note.key == DAEMON);
    let mut own = vec![
        (theirs(&qemu.kernel), "hypervisor.qemu.kernel", GUEST),
        (theirs(&qemu.image), "hypervisor.qemu.image", GUEST),
        (theirs(&qemu.initrd), "hypervisor.qemu.initrd", GUEST),
        (daemon, DAEMON_ARGUMENTS, "meant for upstream's virtio-fs daemon"),
    ];
    let absent = qemu.path.as_ref().is_some_and(|path| path.starts_with("/opt/kata") && !path.exists());
    own.push((absent, "hypervisor.qemu.path", "not on this host; QEMU is taken from PATH"));
    let hasty = reading.config.agent.kata.reconnect_timeout_ms == UPSTREAMS_PATIENCE;
    own.push((hasty, "agent.kata.reconnect_timeout_ms", "upstream's default; here it is 60000"));
    own.into_iter().filter(|(drop, ..)| *drop).map(|(_, key, why)| (key, why)).collect()
}

/// Settings that stay, and that are less strict than what this version does without them.
fn weaker(reading: &Reading) -> Vec<Account> {
    let config = &reading.config;
    let kept = |key: &str, why: &str| Account { fate: Fate::Kept, key: key.to_owned(), why: why.to_owned() };
    let mut accounts = Vec::new();
    if reading.written.contains_key("hypervisor.qemu.seccomp_sandbox")
        && config.hypervisor.qemu.seccomp_sandbox.is_empty()
    {
        accounts.push(kept(
            "hypervisor.qemu.seccomp_sandbox",
            "QEMU runs without its filter; without this line it has one",
        ));
    }
    if config.runtime.disable_guest_seccomp {
        let why = "seccomp profiles are not applied; without this line they are";
        accounts.push(kept("runtime.disable_guest_seccomp", why));
    }
    if !config.hypervisor.qemu.enable_annotations.is_empty() {
        let why = "pods may change these settings; without this line they change none";
        accounts.push(kept("hypervisor.qemu.enable_annotations", why));
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

/// Puts a value where it belongs here, unless that place is taken already; where that is, and whether it is there now.
fn moved(document: &mut Table, path: &str, value: &Item) -> Option<(&'static str, bool)> {
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
    let free = !table.contains_key(name);
    table.entry(name).or_insert(Item::Value(value));
    Some((to, free))
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
