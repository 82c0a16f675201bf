//! What a policy answers to requests, and which it knows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kata_policy::{Policy, PolicyError, Request, shapes};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Outcome;
use crate::cli::{PolicyExplainArgs, PolicyTestArgs};
use crate::failure::FAILED;
use crate::{output, table};

/// The rule by which policies of `policy generate` tell what is wrong with a container.
const FAULTS: &str = "faults";
/// A rule that is about no request of the protocol.
const FORWARD: &str = "ForwardRequest";

/// Why a policy cannot be asked.
#[derive(Debug, thiserror::Error)]
enum AnswerError {
    #[error("cannot read {}", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the policy is of no use")]
    Policy(#[from] PolicyError),
    #[error("{} is no request: {{\"request\": \"NAME\", \"input\": {{…}}}}", .path.display())]
    Form {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{} asks for {name:?}, which is no request of the protocol{}", .path.display(), nearest(.name))]
    Unknown { path: PathBuf, name: String },
    #[error("{} has no files with requests: they end in .json", .0.display())]
    Empty(PathBuf),
}

fn nearest(name: &str) -> String {
    let names = names();
    let found = kata_config::keys::nearest(name, names.keys().map(String::as_str));
    found.map(|name| format!("; did you mean {name:?}?")).unwrap_or_default()
}

/// A request as files have it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    request: String,
    #[serde(default)]
    input: Value,
    /// What shall be answered.
    #[serde(default = "yes")]
    allowed: bool,
}

fn yes() -> bool {
    true
}

/// What was answered.
#[derive(Debug, Serialize)]
struct Answer {
    file: String,
    request: String,
    allowed: bool,
    expected: bool,
    /// Why it is denied.
    reason: Option<String>,
}

/// The requests of the protocol, and the methods that take them.
fn names() -> BTreeMap<String, Vec<String>> {
    let mut names: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (method, shape) in shapes() {
        let method = method.rsplit('/').next().unwrap_or(method);
        names.entry(shape.name().to_owned()).or_default().push(method.to_owned());
    }
    names.insert(FORWARD.to_owned(), vec!["(ways to the loopback)".to_owned()]);
    names
}

fn read(path: &Path) -> Result<String, AnswerError> {
    std::fs::read_to_string(path).map_err(|source| AnswerError::Read { path: path.to_owned(), source })
}

fn policy(path: &Path) -> Result<Policy, AnswerError> {
    Ok(Policy::parse(&path.display().to_string(), &read(path)?)?)
}

fn case(path: &Path) -> Result<Case, AnswerError> {
    let case: Case = serde_json::from_str(&read(path)?)
        .map_err(|source| AnswerError::Form { path: path.to_owned(), source })?;
    if names().contains_key(&case.request) {
        Ok(case)
    } else {
        Err(AnswerError::Unknown { path: path.to_owned(), name: case.request })
    }
}

/// The files themselves, and of directories those that end in `.json`, by name.
fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>, AnswerError> {
    let mut all = Vec::new();
    for path in paths {
        if !path.is_dir() {
            all.push(path.clone());
            continue;
        }
        let fault = |source| AnswerError::Read { path: path.clone(), source };
        let entries = std::fs::read_dir(path).map_err(fault)?;
        let entries: Result<Vec<_>, _> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
        let mut found = entries.map_err(fault)?;
        found.retain(|file| file.extension().is_some_and(|extension| extension == "json"));
        if found.is_empty() {
            return Err(AnswerError::Empty(path.clone()));
        }
        found.sort();
        all.extend(found);
    }
    Ok(all)
}

fn ask(policy: &mut Policy, path: &Path) -> Result<Answer, AnswerError> {
    let case = case(path)?;
    let request = Request { name: case.request, input: case.input };
    let denied = policy.check(&request).err();
    Ok(Answer {
        file: path.display().to_string(),
        request: request.name,
        allowed: denied.is_none(),
        expected: case.allowed,
        reason: denied.map(|denied| denied.to_string()),
    })
}

/// `policy test`
pub fn test(args: &PolicyTestArgs) -> Outcome {
    let mut policy = policy(&args.policy)?;
    let mut answers = Vec::new();
    for file in files(&args.requests)? {
        answers.push(ask(&mut policy, &file)?);
    }
    let good = answers.iter().all(|answer| answer.allowed == answer.expected);
    if args.json {
        output::document(&json!({ "lenient": policy.is_lenient(), "passed": good, "answers": answers }))?;
    } else {
        output::print(&as_table(&answers))?;
        if policy.is_lenient() {
            output::print(
                "the policy has AllowRequestsFailingPolicy: a guest serves what it denies all the same\n",
            )?;
        }
    }
    Ok(if good { 0 } else { FAILED })
}

fn as_table(answers: &[Answer]) -> String {
    let word = |answer: &Answer| match (answer.allowed, answer.allowed == answer.expected) {
        (true, true) => "allowed",
        (false, true) => "denied, as it shall be",
        (true, false) => "ALLOWED, and shall be denied",
        (false, false) => "DENIED",
    };
    let head = ["FILE", "REQUEST", "ANSWER", "WHY"].map(str::to_owned);
    let line = |answer: &Answer| {
        let reason = answer.reason.clone().unwrap_or_default();
        [answer.file.clone(), answer.request.clone(), word(answer).to_owned(), reason]
    };
    let lines: Vec<[String; 4]> = std::iter::once(head).chain(answers.iter().map(line)).collect();
    table::columns(&lines)
}

/// `policy explain`
pub fn explain(args: &PolicyExplainArgs) -> Outcome {
    let mut policy = policy(&args.policy)?;
    match &args.request {
        None => overview(&mut policy, args.json),
        Some(file) => verdict(&mut policy, file, args.json),
    }
}

/// What is known of a rule without a request.
fn served(policy: &mut Policy, name: &str) -> &'static str {
    if !policy.has_rule(name) {
        return "never: there is no rule";
    }
    // An empty request is one that says nothing which a rule could look for.
    match policy.check(&Request { name: name.to_owned(), input: json!({}) }) {
        Ok(()) => "yes, an empty one at least",
        Err(_) => "no, or only for what it asks",
    }
}

fn overview(policy: &mut Policy, as_json: bool) -> Outcome {
    let mut rows = Vec::new();
    for (name, methods) in names() {
        let served = served(policy, &name);
        rows.push((name, methods, served));
    }
    if as_json {
        let rows = rows
            .iter()
            .map(|(name, methods, served)| json!({ "request": name, "methods": methods, "served": served }));
        let rows: Vec<Value> = rows.collect();
        output::document(&json!({ "lenient": policy.is_lenient(), "requests": rows }))?;
        return Ok(0);
    }
    let head = ["REQUEST", "SERVED", "METHODS"].map(str::to_owned);
    let row = |(name, methods, served): &(String, Vec<String>, &str)| {
        [name.clone(), (*served).to_owned(), methods.join(", ")]
    };
    let lines: Vec<[String; 3]> = std::iter::once(head).chain(rows.iter().map(row)).collect();
    output::print(&table::columns(&lines))?;
    Ok(0)
}

fn verdict(policy: &mut Policy, file: &Path, as_json: bool) -> Outcome {
    let case = case(file)?;
    let request = Request { name: case.request, input: case.input };
    // Before the request: what it wants to be remembered would be seen already.
    let faults = policy.remark(FAULTS, &request);
    let denied = policy.check(&request).err();
    let faults = faults.filter(|_| denied.is_some() && request.name == "CreateContainerRequest");
    if as_json {
        let reason = denied.as_ref().map(ToString::to_string);
        output::document(&json!({
            "request": request.name, "allowed": denied.is_none(), "reason": reason, "faults": faults,
        }))?;
    } else {
        let text = match &denied {
            None => format!("the policy allows this {}: rule agent_policy.{0}\n", request.name),
            Some(denied) => format!("{denied}\n{}", told(faults.as_ref())),
        };
        output::print(&text)?;
    }
    Ok(if denied.is_none() { 0 } else { FAILED })
}

/// What is wrong for each container that it could have been.
fn told(faults: Option<&Value>) -> String {
    let text = |fault: &Value, key: &str| Some(fault.get(key)?.as_str()?.to_owned());
    let line =
        |fault: &Value| Some(format!("  not {:?}: {}\n", text(fault, "container")?, text(fault, "what")?));
    faults.and_then(Value::as_array).into_iter().flatten().filter_map(line).collect()
}
