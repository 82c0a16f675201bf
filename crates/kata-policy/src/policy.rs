//! The rules, and what they remember.

use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use regorus::utils::limits::{ExecutionTimerConfig, LimitError, PolicyLengthConfig};
use regorus::{Engine, Value};
use serde::Deserialize;

use crate::request::Request;

/// The package that the rules are in.
const PACKAGE: &str = "data.agent_policy";
/// The rule that turns denials into warnings, for whoever tries a policy out.
const LENIENT: &str = "AllowRequestsFailingPolicy";
/// The rule that says why everything is denied.
const REASON: &str = "reason";
/// What rules remember, at first.
const STATE: &str = r#"{"pstate": {}}"#;
/// How long one request may be thought about. The host waits for its answer, and so does every other request.
const TIMER: ExecutionTimerConfig =
    ExecutionTimerConfig { limit: Duration::from_secs(2), check_interval: NonZeroU32::new(1000).unwrap() };

/// How large a policy may be. The engine's own bound of a line is less than a script that a container is given as an argument.
const LENGTH: PolicyLengthConfig = PolicyLengthConfig {
    max_col: NonZeroU32::new(1 << 18).unwrap(),
    max_file_bytes: NonZeroUsize::new(1 << 20).unwrap(),
    max_lines: NonZeroUsize::new(20_000).unwrap(),
};

/// A policy that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It does not parse.
    #[error("the policy {name:?} is not valid Rego: {reason}")]
    Syntax {
        /// Where it is from.
        name: String,
        /// What the parser says, with the line.
        reason: String,
    },
    /// It is of another package.
    #[error("the policy {name:?} is package {found:?}, and has to be \"agent_policy\"")]
    Package {
        /// Where it is from.
        name: String,
        /// Its package.
        found: String,
    },
}

/// Why a request is not served. It names the rule and where that went wrong, and not what the request holds: whoever reads the
/// answer may be who must not know.
#[derive(Debug, thiserror::Error)]
#[error("the policy denies {request}: {why}")]
pub struct Denied {
    request: String,
    why: Why,
}

#[derive(Debug)]
enum Why {
    /// No rule allows it.
    Rule(String),
    /// The policy has no rule of this name.
    NoRule(String),
    /// Everything is denied.
    Reason(String),
    /// The rule gave something that is no answer, or none within its time.
    Fault(String, String),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => write!(f, "rule {rule} does not allow it"),
            Self::NoRule(rule) => write!(f, "it has no rule {rule}"),
            Self::Reason(reason) => f.write_str(reason),
            Self::Fault(rule, fault) => write!(f, "rule {rule} gives no answer: {fault}"),
        }
    }
}

/// What a rule answers that does more than allow.
#[derive(Deserialize)]
struct Answer {
    allowed: bool,
    #[serde(default)]
    ops: Option<json_patch::Patch>,
}

/// Rules, and what they remember of the requests that they allowed.
pub struct Policy {
    name: String,
    engine: Engine,
    lenient: bool,
    reason: Option<String>,
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy").field("lenient", &self.lenient).finish_non_exhaustive()
    }
}

impl Policy {
    /// Reads a policy; `name` is what faults call it. Rego of version 1 is tried first, then that of version 0.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn parse(name: &str, text: &str) -> Result<Self, PolicyError> {
        let read = |v0| {
            let mut engine = Engine::new();
            engine.set_rego_v0(v0);
            engine.set_execution_timer_config(TIMER);
            engine.set_policy_length_config(LENGTH);
            let package = engine.add_policy(name.to_owned(), text.to_owned());
            package.map(|package| (engine, package)).map_err(|error| error.to_string())
        };
        // Of two refusals the first is of the language that new policies are written in.
        let read = read(false).or_else(|reason| read(true).map_err(|_| reason));
        let (mut engine, package) =
            read.map_err(|reason| PolicyError::Syntax { name: name.to_owned(), reason })?;
        if package != PACKAGE {
            let found = package.trim_start_matches("data.").to_owned();
            return Err(PolicyError::Package { name: name.to_owned(), found });
        }
        let syntax = |error: &dyn fmt::Display| PolicyError::Syntax {
            name: name.to_owned(),
            reason: error.to_string(),
        };
        engine.add_data_json(STATE).map_err(|error| syntax(&error))?;
        // Rules that most policies do not have: an error says no more than that.
        engine.set_input_json("{}").map_err(|error| syntax(&error))?;
        let lenient = matches!(rule(&mut engine, LENIENT), Ok(Value::Bool(true)));
        let reason = match rule(&mut engine, REASON) {
            Ok(Value::String(reason)) => Some(reason.to_string()),
            _ => None,
        };
        Ok(Self { name: name.to_owned(), engine, lenient, reason })
    }

    /// A policy that denies every request with a reason.
    pub fn denial(reason: &str) -> Self {
        Self { name: String::new(), engine: Engine::new(), lenient: false, reason: Some(reason.to_owned()) }
    }

    /// Whether denials are to be told and not carried out.
    pub fn is_lenient(&self) -> bool {
        self.lenient
    }

    /// Whether `request` is allowed. What its rule wants to remember is remembered then.
    ///
    /// # Errors
    /// [`Denied`], also where [`Self::is_lenient`].
    pub fn check(&mut self, request: &Request) -> Result<(), Denied> {
        let denied = |why| Denied { request: request.name.clone(), why };
        let path = format!("agent_policy.{}", request.name);
        let fault = |what: &str| denied(Why::Fault(path.clone(), what.to_owned()));
        if let Some(reason) = &self.reason {
            return Err(denied(Why::Reason(reason.clone())));
        }
        if !self.has_rule(&request.name) {
            return Err(denied(Why::NoRule(path)));
        }
        self.engine.set_input(Value::from(request.input.clone()));
        match rule(&mut self.engine, &request.name) {
            Ok(Value::Bool(true)) => Ok(()),
            Ok(Value::Bool(false)) => Err(denied(Why::Rule(path))),
            Ok(Value::Undefined) => Err(denied(Why::Rule(path))),
            Ok(answer) => {
                let text =
                    answer.to_json_str().map_err(|_| fault("what it says cannot be written as JSON"))?;
                // A list would do for the fields in their order, and is no answer.
                let object = text.starts_with('{').then(|| serde_json::from_str(&text).ok()).flatten();
                // What is wrong with it may quote the request.
                let Some(Answer { allowed, ops }) = object else {
                    return Err(fault("it is neither true or false nor an object with \"allowed\""));
                };
                match (allowed, ops) {
                    (false, _) => Err(denied(Why::Rule(path))),
                    (true, None) => Ok(()),
                    (true, Some(ops)) => self.remember(&ops).map_err(fault),
                }
            }
            Err(error) => Err(fault(&error.to_string())),
        }
    }

    /// Whether there is a rule of this name. Without one, the request of this name is denied.
    pub fn has_rule(&self, name: &str) -> bool {
        // Asked for a rule that is not there, the engine has an error and no undefined value.
        self.engine.has_declared_rule_rooted_at(&self.name, name).unwrap_or(false)
    }

    /// What another rule says of `request`: for whoever wants to know why, and wrote rules that tell. `None` where there is no such
    /// rule, or nothing that it says.
    pub fn remark(&mut self, rule_name: &str, request: &Request) -> Option<serde_json::Value> {
        if !self.has_rule(rule_name) {
            return None;
        }
        self.engine.set_input(Value::from(request.input.clone()));
        let text = rule(&mut self.engine, rule_name).ok()?.to_json_str().ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Applies a patch to the data that rules see. A fault may quote the patch, and that what the request holds: none is passed on.
    fn remember(&mut self, ops: &json_patch::Patch) -> Result<(), &'static str> {
        let read = self.engine.get_data().to_json_str().ok();
        let read = read.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
        let mut data = read.ok_or("what rules remember cannot be written as JSON")?;
        json_patch::patch(&mut data, ops).map_err(|_| "its \"ops\" do not fit what rules remember")?;
        let data = Value::from(data);
        self.engine.clear_data();
        self.engine.add_data(data).map_err(|_| "its \"ops\" leave nothing that rules can remember")
    }
}

/// What became of a rule that gives no value.
#[derive(Debug, thiserror::Error)]
enum RuleError {
    #[error("it takes more than {} s", TIMER.limit.as_secs())]
    Late,
    #[error("it fails at line {0}, column {1}")]
    At(u32, u32),
    #[error("it fails")]
    Somewhere,
}

impl RuleError {
    /// The engine quotes values that a rule has worked with: of what it says no more than the place is kept.
    fn of(limit: Option<&LimitError>, text: &str) -> Self {
        if let Some(LimitError::TimeLimitExceeded { .. }) = limit {
            return Self::Late;
        }
        // "\n--> FILE:LINE:COLUMN\n", before anything is quoted.
        let place = text.trim_start().lines().next().and_then(|line| {
            let mut parts = line.strip_prefix("--> ")?.rsplitn(3, ':');
            let (column, line) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
            Some(Self::At(line, column))
        });
        place.unwrap_or(Self::Somewhere)
    }
}

fn rule(engine: &mut Engine, name: &str) -> Result<Value, RuleError> {
    let value = engine.eval_rule(format!("{PACKAGE}.{name}"));
    value.map_err(|error| RuleError::of(error.downcast_ref(), &error.to_string()))
}

#[cfg(test)]
mod tests;
