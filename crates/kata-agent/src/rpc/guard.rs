//! Asks the policy before a request is served.
//!
//! ```text
//!   /run/measured-cfg/policy.rego ── final ─────────────┐
//!   /etc/kata-agent/policy.rego ──── until it is set ───┤
//!   SetPolicy, where nothing forbids it, once ──────────┴─▶ Guard ──▶ each method but those of Health
//! ```
//!
//! A file that is there and cannot be used denies everything: nobody is let in for a mistake in the rules. Ways around the
//! protocol are shut with it: the debug console, and ways to the loopback unless a rule `ForwardRequest` allows them.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use kata_api::agent::{CreateContainerRequest, Empty, ExecProcessRequest, SetPolicyRequest};
use kata_policy::{Policy, Request, Shape, shapes};
use protobuf::Message as _;
use serde_json::json;
use ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use ttrpc::proto::{Request as Call, Response};
use ttrpc::{Code, get_status};

use crate::stdio::Withheld;

/// What the machine's owner has bound to it.
const MEASURED: &str = "/run/measured-cfg/policy.rego";
/// What the image has.
const IMAGES: &str = "/etc/kata-agent/policy.rego";
/// The method that the guard serves itself.
const SET_POLICY: &str = "SetPolicy";
const AGENT_SERVICE: &str = "grpc.AgentService";

/// The policy, and whether it may still be another.
#[derive(Debug, Default)]
struct State {
    policy: Option<Policy>,
    is_final: bool,
}

/// Stands before all services.
#[derive(Debug, Default)]
pub struct Guard(Mutex<State>);

impl Guard {
    /// With the policy of the guest, if it has one.
    #[must_use]
    pub fn boot() -> Self {
        Self::with(Path::new(MEASURED), Path::new(IMAGES))
    }

    fn with(measured: &Path, images: &Path) -> Self {
        let state = match (read(measured), read(images)) {
            (Some(policy), _) => State { policy: Some(policy), is_final: true },
            (None, policy) => State { policy, is_final: false },
        };
        Self(Mutex::new(state))
    }

    /// Puts itself before every method that the policy is about.
    #[must_use]
    pub fn before(self: &Arc<Self>, services: HashMap<String, Service>) -> HashMap<String, Service> {
        let mut services = services;
        for (name, service) in &mut services {
            let methods = std::mem::take(&mut service.methods);
            service.methods =
                methods.into_iter().map(|(method, handler)| self.one(name, method, handler)).collect();
        }
        if let Some(service) = services.get_mut(AGENT_SERVICE) {
            service.methods.insert(SET_POLICY.to_owned(), Box::new(SetPolicy(self.clone())));
        }
        services
    }

    fn one(self: &Arc<Self>, service: &str, method: String, handler: Handler) -> (String, Handler) {
        match shapes().get(&format!("{service}/{method}")) {
            None => (method, handler),
            Some(shape) => {
                let guarded = Guarded { guard: self.clone(), shape: shape.clone(), handler };
                (method, Box::new(guarded))
            }
        }
    }

    /// Whether there are rules at all.
    pub fn is_active(&self) -> bool {
        self.state().policy.is_some()
    }

    /// Whether something beside the protocol is allowed by the rule of this name.
    ///
    /// # Errors
    /// PERMISSION_DENIED.
    pub fn allows(&self, name: &str) -> ttrpc::Result<()> {
        self.check(&Request { name: name.to_owned(), input: json!({}) })
    }

    fn check(&self, request: &Request) -> ttrpc::Result<()> {
        let mut state = self.state();
        let Some(policy) = &mut state.policy else { return Ok(()) };
        match policy.check(request) {
            Ok(()) => Ok(()),
            Err(denied) if policy.is_lenient() => {
                tracing::warn!(%denied, "the request is served all the same: the policy has AllowRequestsFailingPolicy");
                Ok(())
            }
            Err(denied) => {
                tracing::warn!(%denied, "a request is not served");
                refuse(Code::PERMISSION_DENIED, denied.to_string())
            }
        }
    }

    fn set(&self, text: &str) -> ttrpc::Result<()> {
        let mut state = self.state();
        if state.is_final {
            return refuse(
                Code::FAILED_PRECONDITION,
                "the guest has its policy, which is set once".to_owned(),
            );
        }
        match Policy::parse("SetPolicy", text) {
            Err(error) => refuse(Code::INVALID_ARGUMENT, error.to_string()),
            Ok(policy) => {
                *state = State { policy: Some(policy), is_final: true };
                tracing::info!("the host has set a policy");
                Ok(())
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A policy of the guest's; one that denies everything where the file is there and of no use.
fn read(path: &Path) -> Option<Policy> {
    let fault = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return None,
        Err(error) => format!("cannot read {}: {error}", path.display()),
        Ok(text) => match Policy::parse(&path.display().to_string(), &text) {
            Ok(policy) => return Some(policy),
            Err(error) => error.to_string(),
        },
    };
    tracing::error!(error = fault, "the policy cannot be used: every request is denied");
    Some(Policy::denial(&fault))
}

fn refuse<T>(code: Code, text: String) -> ttrpc::Result<T> {
    Err(ttrpc::Error::RpcStatus(get_status(code, text)))
}

type Handler = Box<dyn MethodHandler + Send + Sync>;

/// A method behind the guard.
struct Guarded {
    guard: Arc<Guard>,
    shape: Shape,
    handler: Handler,
}

impl Guarded {
    fn check(&self, payload: &[u8]) -> ttrpc::Result<Withheld> {
        let request = self.shape.read(payload);
        let request = request.or_else(|error| refuse(Code::INVALID_ARGUMENT, crate::chain(&error)))?;
        self.guard.check(&request)?;
        let opened = Opened::of(self.shape.name(), payload);
        Ok(opened.map(|opened| self.guard.withheld(&opened)).unwrap_or_default())
    }
}

#[async_trait]
impl MethodHandler for Guarded {
    async fn handler(&self, mut context: TtrpcContext, call: Call) -> ttrpc::Result<Response> {
        let withheld =
            if self.guard.is_active() { self.check(&call.payload) } else { Ok(Withheld::default()) };
        match withheld {
            Ok(withheld) => tell(withheld, &mut context),
            Err(error) => return told(error),
        }
        self.handler.handler(context, call).await
    }
}

/// A status is an answer: what else a handler fails with, the server tells in words of its own.
fn told(error: ttrpc::Error) -> ttrpc::Result<Response> {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            Ok(Response { status: protobuf::MessageField::some(status), ..Response::new() })
        }
        error => Err(error),
    }
}

/// A process whose streams come over connections: they are read and written without requests of their own.
struct Opened {
    container: String,
    exec: String,
    input: bool,
    output: bool,
}

impl Opened {
    fn of(name: &str, payload: &[u8]) -> Option<Self> {
        let of = |container, exec, input: u32, outputs: [u32; 2]| {
            let output = outputs.into_iter().any(|port| port != 0);
            Self { container, exec, input: input != 0, output }
        };
        match name {
            "CreateContainerRequest" => {
                let it = CreateContainerRequest::parse_from_bytes(payload).ok()?;
                Some(of(it.container_id, it.exec_id, it.stdin_port, [it.stdout_port, it.stderr_port]))
            }
            "ExecProcessRequest" => {
                let it = ExecProcessRequest::parse_from_bytes(payload).ok()?;
                Some(of(it.container_id, it.exec_id, it.stdin_port, [it.stdout_port, it.stderr_port]))
            }
            _ => None,
        }
    }

    fn request(&self, name: &str) -> Request {
        let input = json!({ "container_id": self.container, "exec_id": self.exec, "len": 0 });
        Request { name: name.to_owned(), input }
    }
}

impl Guard {
    /// Which of them the rules of the requests that would do the same keep from the host. The process itself is not denied for it.
    fn withheld(&self, opened: &Opened) -> Withheld {
        let denied = |opens: bool, name: &str| opens && self.check(&opened.request(name)).is_err();
        let withheld = Withheld {
            input: denied(opened.input, "WriteStreamRequest"),
            output: denied(opened.output, "ReadStreamRequest"),
        };
        let Opened { container, exec, .. } = opened;
        if withheld.output {
            tracing::warn!(
                container,
                exec,
                "the policy denies ReadStreamRequest: what the process writes is thrown away"
            );
        }
        if withheld.input {
            tracing::warn!(container, exec, "the policy denies WriteStreamRequest: the process has no input");
        }
        withheld
    }
}

/// Where the guard tells a handler what is withheld. What a caller writes there is replaced.
const WITHHELD: &str = "kata-guard-withheld";

/// What the guard has decided of the streams of the process that a request makes.
pub fn withheld(context: &TtrpcContext) -> Withheld {
    let words = context.metadata.get(WITHHELD).map(Vec::as_slice).unwrap_or_default();
    let has = |word: &str| words.iter().any(|it| it == word);
    Withheld { input: has("input"), output: has("output") }
}

fn tell(withheld: Withheld, context: &mut TtrpcContext) {
    let words = [("input", withheld.input), ("output", withheld.output)];
    let words = words.into_iter().filter(|(_, it)| *it).map(|(word, _)| word.to_owned()).collect();
    context.metadata.insert(WITHHELD.to_owned(), words);
}

/// The guard's own method.
struct SetPolicy(Arc<Guard>);

#[async_trait]
impl MethodHandler for SetPolicy {
    async fn handler(&self, _: TtrpcContext, call: Call) -> ttrpc::Result<Response> {
        self.set(&call.payload).or_else(told)
    }
}

impl SetPolicy {
    fn set(&self, payload: &[u8]) -> ttrpc::Result<Response> {
        let request = SetPolicyRequest::parse_from_bytes(payload);
        let request = request.or_else(|error| refuse(Code::INVALID_ARGUMENT, error.to_string()))?;
        // A policy that is there decides whether another may come.
        let input = json!({ "policy": request.policy });
        self.0.check(&Request { name: "SetPolicyRequest".to_owned(), input })?;
        self.0.set(&request.policy)?;
        let payload = Empty::new().write_to_bytes();
        let payload = payload.or_else(|error| refuse(Code::INTERNAL, error.to_string()))?;
        Ok(Response {
            status: protobuf::MessageField::some(get_status(Code::OK, "")),
            payload,
            ..Response::new()
        })
    }
}

#[cfg(test)]
mod tests;
