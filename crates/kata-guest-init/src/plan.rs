//! What a manifest means in this guest: every variable has its value, and every value is one that it may have.

use std::collections::{BTreeMap, BTreeSet};

use crate::manifest::{Declared, Manifest, Variant};
use crate::variables::{Table, VariableError, Variables, When};

const TEXT_MAX: usize = 4096;
const WORDS_MAX: usize = 256;
const NAME_MAX: usize = 64;
/// A unix socket's path has 108 bytes, with the NUL.
const SOCKET_MAX: usize = 107;
const TIMEOUT_DEFAULT: u32 = 30;
const TIMEOUT_MAX: u32 = 3600;

/// A manifest that means nothing that may be started.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A variable without a value.
    #[error("process {id:?}, {key}")]
    Variable {
        /// The process.
        id: String,
        /// The key.
        key: &'static str,
        #[source]
        /// The variable.
        source: VariableError,
    },
    /// A value that the key cannot have.
    #[error("process {id:?}, {key}: {value:?} is not {expected}")]
    Value {
        /// The process.
        id: String,
        /// The key.
        key: &'static str,
        /// The value, cut off where it is long.
        value: String,
        /// What it takes.
        expected: &'static str,
    },
    /// Two processes of one name.
    #[error("process {0:?} is there twice")]
    Twice(String),
    /// A process without a program.
    #[error("process {id:?} has neither path nor a variant {variant:?} with one")]
    NoProgram {
        /// The process.
        id: String,
        /// The variant that was selected.
        variant: String,
    },
    /// Services without a socket to find them at.
    #[error("process {0:?} has guest_services and no wait_socket")]
    NoSocket(String),
}

/// A program to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// What it is called: letters, digits, `-` and `_`.
    pub id: String,
    /// Its turn, from 1.
    pub level: u32,
    /// Its file, below the extension: no `..`, not absolute.
    pub program: String,
    /// Its arguments in order.
    pub arguments: Vec<Arguments>,
    /// Its environment, over what systemd gives.
    pub environment: BTreeMap<String, String>,
    /// Where it listens, below `/run`.
    pub socket: Option<String>,
    /// Seconds until it has to listen.
    pub timeout: u32,
    /// Names under `/run/guest-services` that lead to its socket.
    pub guest_services: Vec<String>,
    /// The network namespace that it runs in.
    pub network_namespace: Option<String>,
}

/// Some arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    /// The file that has to exist for them, if one has.
    pub condition: Option<String>,
    /// The words.
    pub words: Vec<String>,
}

/// The processes that `manifest` has started.
///
/// # Errors
/// [`PlanError`]: then nothing of the extension may be started.
pub fn plan(manifest: &Manifest, variables: &Variables, table: &Table) -> Result<Vec<Process>, PlanError> {
    let mut ids = BTreeSet::new();
    let mut processes = Vec::new();
    for declared in &manifest.process {
        let known = Resolve { id: &declared.id, variables };
        known.expect("id", declared.id.clone(), is_name, "1 to 64 letters, digits, - and _")?;
        if !ids.insert(&declared.id) {
            return Err(PlanError::Twice(declared.id.clone()));
        }
        // Declared for others to look at.
        if declared.level > 0 {
            processes.push(process(declared, &known, table)?);
        }
    }
    Ok(processes)
}

fn process(declared: &Declared, known: &Resolve<'_>, table: &Table) -> Result<Process, PlanError> {
    let Declared { id, level, .. } = declared;
    let (name, variant) = variant(declared, known)?;
    let path = variant.and_then(|variant| variant.path.as_ref()).or(declared.path.as_ref());
    let path = path.ok_or_else(|| PlanError::NoProgram { id: id.clone(), variant: name })?;
    let program = known.text("path", path, is_below, "a path below the extension")?;
    let mut environment = BTreeMap::new();
    for (name, text) in declared.env.iter().chain(variant.iter().flat_map(|variant| &variant.env)) {
        known.expect("env", name.clone(), is_variable, "a name for a variable of the environment")?;
        environment.insert(name.clone(), known.text("env", text, |_| true, "")?);
    }
    let socket = declared.wait_socket.as_ref();
    let socket = socket
        .map(|text| known.text("wait_socket", text, is_socket, "a path below /run of at most 107 bytes"))
        .transpose()?;
    let timeout = declared.timeout_secs.as_ref().map(|text| known.timeout(text)).transpose()?;
    let namespace = declared.network_namespace.as_ref();
    let network_namespace = namespace
        .map(|text| known.text("network_namespace", text, is_network_namespace, "a path below /run/netns"))
        .transpose()?;
    Ok(Process {
        id: id.clone(),
        level: *level,
        program,
        arguments: arguments(declared, variant, known)?,
        environment,
        guest_services: guest_services(declared, socket.as_deref(), known, table)?,
        socket,
        timeout: timeout.unwrap_or(TIMEOUT_DEFAULT),
        network_namespace,
    })
}

fn variant<'a>(
    declared: &'a Declared,
    known: &Resolve<'_>,
) -> Result<(String, Option<&'a Variant>), PlanError> {
    let select = declared.select.as_deref().unwrap_or_default();
    let mut name = known.text("select", select, |_| true, "")?;
    if name.is_empty() {
        "default".clone_into(&mut name);
    }
    let variant = declared.variants.get(&name);
    if variant.is_none() && !declared.variants.is_empty() {
        return Err(PlanError::NoProgram { id: declared.id.clone(), variant: name });
    }
    Ok((name, variant))
}

fn arguments(
    declared: &Declared,
    variant: Option<&Variant>,
    known: &Resolve<'_>,
) -> Result<Vec<Arguments>, PlanError> {
    let always = |words| Arguments { condition: None, words };
    let mut all = vec![always(known.words("args", &declared.args)?)];
    for optional in &declared.optional_args {
        let words = known.words("optional_args", &optional.args)?;
        let when = known.variables.when(&optional.when);
        match when.map_err(|source| known.variable("optional_args", source))? {
            When::Known(true) => all.push(always(words)),
            When::Known(false) => {}
            When::FileExists(file) => all.push(Arguments { condition: Some(file), words }),
        }
    }
    if let Some(variant) = variant {
        all.push(always(known.words("args", &variant.args)?));
    }
    if let Some(config) = &declared.config {
        let path =
            known.text("config", config, |text| text.is_empty() || is_absolute(text), "an absolute path")?;
        if !path.is_empty() {
            all.push(Arguments { words: vec!["-c".to_owned(), path.clone()], condition: Some(path) });
        }
    }
    all.retain(|arguments| !arguments.words.is_empty());
    Ok(all)
}

fn guest_services(
    declared: &Declared,
    socket: Option<&str>,
    known: &Resolve<'_>,
    table: &Table,
) -> Result<Vec<String>, PlanError> {
    let Some(socket) = socket else {
        let none = declared.guest_services.is_empty();
        return if none { Ok(Vec::new()) } else { Err(PlanError::NoSocket(declared.id.clone())) };
    };
    let all: BTreeSet<&String> = declared.guest_services.iter().chain(table.guest_services(socket)).collect();
    let check = |name: &String| known.expect("guest_services", name.clone(), is_name, "a service's name");
    all.into_iter().map(check).collect()
}

/// Gives the texts of one process their values.
struct Resolve<'a> {
    id: &'a str,
    variables: &'a Variables,
}

impl Resolve<'_> {
    fn variable(&self, key: &'static str, source: VariableError) -> PlanError {
        PlanError::Variable { id: self.id.to_owned(), key, source }
    }

    /// `value` if it is what is expected, and nothing that would end a line of a unit.
    fn expect(
        &self,
        key: &'static str,
        value: String,
        is: impl Fn(&str) -> bool,
        expected: &'static str,
    ) -> Result<String, PlanError> {
        let plain = value.len() <= TEXT_MAX && !value.contains(char::is_control);
        if plain && is(&value) {
            return Ok(value);
        }
        let expected =
            if plain { expected } else { "a text of at most 4096 bytes without control characters" };
        let value = value.chars().take(80).collect();
        Err(PlanError::Value { id: self.id.chars().take(80).collect(), key, value, expected })
    }

    fn text(
        &self,
        key: &'static str,
        template: &str,
        is: impl Fn(&str) -> bool,
        expected: &'static str,
    ) -> Result<String, PlanError> {
        let value = self.variables.substitute(template).map_err(|source| self.variable(key, source))?;
        self.expect(key, value, is, expected)
    }

    fn words(&self, key: &'static str, templates: &[String]) -> Result<Vec<String>, PlanError> {
        if templates.len() > WORDS_MAX {
            return self
                .expect(key, templates.len().to_string(), |_| false, "a list of at most 256")
                .map(|_| vec![]);
        }
        templates.iter().map(|template| self.text(key, template, |_| true, "")).collect()
    }

    fn timeout(&self, template: &str) -> Result<u32, PlanError> {
        let seconds = |text: &str| text.parse().ok().filter(|seconds| (1..=TIMEOUT_MAX).contains(seconds));
        let key = "timeout_secs";
        let text = self.text(key, template, |text| seconds(text).is_some(), "a number from 1 to 3600")?;
        Ok(seconds(&text).unwrap_or(TIMEOUT_DEFAULT))
    }
}

fn is_name(text: &str) -> bool {
    let rest = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    rest && text.len() <= NAME_MAX && text.starts_with(|first: char| first.is_ascii_alphanumeric())
}

fn is_variable(text: &str) -> bool {
    let rest = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    rest && text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
}

fn is_below(text: &str) -> bool {
    text.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

fn is_absolute(text: &str) -> bool {
    text.strip_prefix('/').is_some_and(is_below)
}

fn is_socket(text: &str) -> bool {
    text.len() <= SOCKET_MAX && text.strip_prefix("/run/").is_some_and(is_below)
}

fn is_network_namespace(text: &str) -> bool {
    text.strip_prefix("/run/netns/").is_some_and(is_name)
}

#[cfg(test)]
pub(crate) mod tests;
