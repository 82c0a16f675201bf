//! `start`: answers the address of the pod's owner, which is started for the pod's first container, or for a sandbox: its
//! bundle has no specification.
//!
//! All generations of containerd put their flags before the verb, and differ in what they write to standard input:
//!
//! | containerd | standard input | is answered with |
//! |---|---|---|
//! | up to 2.2 | nothing, or the runtime's options: an `Any`, which `Task.Create` carries again | the bare address |
//! | from 2.3 on | `containerd.runtime.bootstrap.v1.BootstrapParams`, with those options among its extensions | `BootstrapResult` |
//! | releases on the way there | the same message as JSON | JSON |
//!
//! An `Any` can be read as the message: what names this very container and namespace is the message. Whatever else is written,
//! to either stream, would be taken for a part of the address.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde::Deserialize;
use serde_json::json;
use thiserror::Error;

use super::bundle::{self, Bundle, BundleError, Netns};
use super::invocation::Invocation;
use super::launch::{config_path, is_options};
use crate::delete::{self, DeleteError};
use crate::ground::{Ground, GroundError};

/// Most that is read of standard input.
const INPUT_LIMIT: u64 = 1 << 20;
/// The task API that is answered to a containerd that asks in the new way.
const TASK_VERSION: i32 = containerd_shim_protos::TASK_API_VERSION;

#[derive(Debug, Error)]
pub(crate) enum BootstrapError {
    #[error("cannot read the parameters on standard input")]
    Input(#[source] io::Error),
    #[error("the parameters on standard input are not containerd's BootstrapParams")]
    Params(#[source] serde_json::Error),
    #[error("the answer cannot be written as containerd's BootstrapResult")]
    Answer(#[source] protobuf::Error),
    #[error("the runtime's options on standard input cannot be carried out: {0}")]
    Options(String),
    #[error("the working directory is no bundle")]
    WorkingDirectory(#[source] io::Error),
    #[error(transparent)]
    Bundle(BundleError),
    #[error(transparent)]
    Ground(GroundError),
    #[error("cannot remove what a dead owner left of a pod of the same name")]
    Stale(#[source] DeleteError),
    #[error(
        "the container belongs to pod {pod}, whose owner does not answer at {socket}; the pod has to be made anew \
         (Kubernetes does so by itself)"
    )]
    NoPod { pod: String, socket: PathBuf, source: io::Error },
    #[error("cannot start the pod's owner")]
    Spawn(#[source] io::Error),
    #[error("the pod's owner does not serve: {0}")]
    Owner(String),
    #[error("cannot write {path}")]
    Address { path: PathBuf, source: io::Error },
}

/// How containerd has written its parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Form {
    #[default]
    Json,
    Message,
}

/// What containerd says on standard input, where it is more than options.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Params {
    #[serde(skip)]
    form: Form,
    // stays: ProtoJSON has both spellings
    #[serde(alias = "containerdTtrpcAddress")]
    containerd_ttrpc_address: String,
    // stays: ProtoJSON has both spellings
    #[serde(alias = "containerdGrpcAddress")]
    containerd_grpc_address: String,
    /// A number, or the name of one.
    // stays: ProtoJSON has both spellings
    #[serde(alias = "logLevel")]
    log_level: serde_json::Value,
}

impl Params {
    /// Whether more than the usual is to be logged: INFO is 0, and what tells more is negative.
    fn debug(&self) -> bool {
        match &self.log_level {
            serde_json::Value::String(name) => name.ends_with("_DEBUG") || name.ends_with("_TRACE"),
            other => other.as_i64().is_some_and(|level| level < 0),
        }
    }
}

/// Prints the address of the pod's owner.
pub(crate) fn run(call: &Invocation) -> Result<(), BootstrapError> {
    let Input { params, options } = input(io::stdin().lock(), call)?;
    let dir = match &call.bundle {
        Some(dir) => dir.clone(),
        None => std::env::current_dir().map_err(BootstrapError::WorkingDirectory)?,
    };
    let address = address(call, params.as_ref(), options.as_ref(), &dir)?;
    // containerd 1.x finds the owner by this file after a restart of its own.
    let file = dir.join("address");
    std::fs::write(&file, &address).map_err(|source| BootstrapError::Address { path: file, source })?;
    // A containerd that is not there any more needs no answer.
    let _ = io::stdout().write_all(&answer(params.map(|params| params.form), address)?);
    Ok(())
}

/// The address as whoever asks understands it.
fn answer(form: Option<Form>, address: String) -> Result<Vec<u8>, BootstrapError> {
    match form {
        None => Ok(address.into_bytes()),
        Some(Form::Json) => {
            let answer = json!({ "version": TASK_VERSION, "address": address, "protocol": "ttrpc" });
            Ok(answer.to_string().into_bytes())
        }
        Some(Form::Message) => {
            let protocol = "ttrpc".to_owned();
            let answer = BootstrapResult { version: TASK_VERSION, address, protocol, ..Default::default() };
            answer.write_to_bytes().map_err(BootstrapError::Answer)
        }
    }
}

/// What is on standard input.
#[derive(Debug, Default)]
struct Input {
    params: Option<Params>,
    options: Option<Any>,
}

fn input(input: impl Read, call: &Invocation) -> Result<Input, BootstrapError> {
    let mut text = Vec::new();
    input.take(INPUT_LIMIT).read_to_end(&mut text).map_err(BootstrapError::Input)?;
    let message = BootstrapParams::parse_from_bytes(&text).ok();
    if let Some(message) = message.filter(|it| it.instance_id == call.id && it.namespace == call.namespace) {
        return Ok(of_message(message));
    }
    // The first byte of an Any is the tag of its first field, which is no brace.
    if text.first() == Some(&b'{') {
        let params = serde_json::from_slice(&text).map_err(BootstrapError::Params)?;
        return Ok(Input { params: Some(params), options: None });
    }
    // Who makes a pod by its first container says it again then.
    Ok(Input { params: None, options: Any::parse_from_bytes(&text).ok() })
}

fn of_message(message: BootstrapParams) -> Input {
    let mut extensions = message.extensions.into_iter().filter_map(|extension| extension.value.into_option());
    let options = extensions.find(is_options);
    let params = Params {
        form: Form::Message,
        containerd_ttrpc_address: message.containerd_ttrpc_address,
        containerd_grpc_address: message.containerd_grpc_address,
        log_level: message.log_level.value().into(),
    };
    Input { params: Some(params), options }
}

fn address(
    call: &Invocation,
    params: Option<&Params>,
    options: Option<&Any>,
    dir: &Path,
) -> Result<String, BootstrapError> {
    let ground = match bundle::of_sandbox(dir).map_err(BootstrapError::Bundle)? {
        true => start(call, params, dir, &sandbox_words(options)?)?,
        false => {
            let bundle = Bundle::read(dir).map_err(BootstrapError::Bundle)?;
            match bundle.pod().map_err(BootstrapError::Bundle)? {
                Some(pod) => owner_of(pod)?,
                None => start(call, params, dir, &netns_words(&bundle)?)?,
            }
        }
    };
    Ok(format!("unix://{}", ground.socket().display()))
}

/// What the owner of a pod that the sandbox API makes is told: the options are not said again.
fn sandbox_words(options: Option<&Any>) -> Result<Vec<OsString>, BootstrapError> {
    let config = config_path(options).map_err(|error| BootstrapError::Options(error.to_string()))?;
    let config = config.into_iter().flat_map(|path| ["--config".into(), path.into_os_string()]);
    Ok(std::iter::once("--sandboxer".into()).chain(config).collect())
}

/// What the owner of a pod is told of its network.
fn netns_words(bundle: &Bundle) -> Result<Vec<OsString>, BootstrapError> {
    Ok(match bundle.netns().map_err(BootstrapError::Bundle)? {
        Netns::At(path) => vec!["--netns".into(), path.into_os_string()],
        Netns::New => Vec::new(),
    })
}

/// The ground of a pod that is there.
fn owner_of(pod: &str) -> Result<Ground, BootstrapError> {
    let ground = Ground::of(pod);
    match UnixStream::connect(ground.socket()) {
        Ok(_) => Ok(ground),
        Err(source) => Err(BootstrapError::NoPod { pod: pod.to_owned(), socket: ground.socket(), source }),
    }
}

/// Starts the owner of a new pod, which serves when this returns.
fn start(
    call: &Invocation,
    params: Option<&Params>,
    dir: &Path,
    words: &[OsString],
) -> Result<Ground, BootstrapError> {
    let ground = Ground::of(&call.id);
    if ground.is_of(&call.namespace) {
        // containerd makes no pod while it knows of one of that name: what is left is of an owner that died unseen, or leaves.
        delete::make_room(&ground).map_err(BootstrapError::Stale)?;
    }
    let listener = ground.claim(&call.id).map_err(BootstrapError::Ground)?;
    ground.belong_to(&call.namespace).map_err(BootstrapError::Ground)?;
    let debug = call.debug || params.is_some_and(Params::debug);
    let mut owner = Command::new("/proc/self/exe");
    owner
        .arg0("containerd-shim-kata-v2")
        .args(["serve", "--id", &call.id, "--namespace", &call.namespace, "--events", &events(call, params)])
        .arg("--bundle")
        .arg(dir)
        .args(words);
    if debug {
        owner.arg("--debug");
    }
    let served = spawn(owner, listener);
    if served.is_err()
        && let Err(error) = ground.clear()
    {
        // Not to stderr, which is the answer; the next start finds it again.
        tracing::debug!(%error, "the directory of a pod that did not start stays");
    }
    served.map(|()| ground)
}

/// The owner gets the socket as its standard input, and says on its standard error what keeps it from serving; it closes
/// that when it serves.
fn spawn(mut owner: Command, listener: UnixListener) -> Result<(), BootstrapError> {
    let (mut words, end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map(|(read, write)| (File::from(read), write))
        .map_err(|error| BootstrapError::Spawn(error.into()))?;
    owner.current_dir("/").stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(end);
    // SAFETY: setsid is a bare system call: async-signal-safe, without memory of this process.
    unsafe { owner.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from)) };
    let mut child = owner.spawn().map_err(BootstrapError::Spawn)?;
    // Our copy of the pipe's end goes with it.
    drop(owner);
    let mut text = String::new();
    words.read_to_string(&mut text).map_err(BootstrapError::Spawn)?;
    match (text.trim(), child.try_wait()) {
        ("", Ok(None)) => Ok(()),
        ("", status) => Err(BootstrapError::Owner(ended(status.ok().flatten()))),
        (text, _) => Err(BootstrapError::Owner(text.to_owned())),
    }
}

fn ended(status: Option<ExitStatus>) -> String {
    status.map_or_else(|| "it ended without a word".to_owned(), |status| format!("it ended with {status}"))
}

/// The socket that takes events.
fn events(call: &Invocation, params: Option<&Params>) -> String {
    let told =
        params.map(|params| params.containerd_ttrpc_address.clone()).filter(|address| !address.is_empty());
    let told = told.or_else(|| std::env::var("TTRPC_ADDRESS").ok().filter(|address| !address.is_empty()));
    told.unwrap_or_else(|| {
        let main = params
            .map(|params| params.containerd_grpc_address.as_str())
            .filter(|address| !address.is_empty());
        format!("{}.ttrpc", main.unwrap_or(&call.address))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_no_parameters_and_json_in_either_spelling_is() {
        let params = |text| input(text, &call()).map(|input| input.params);
        assert!(params(&b""[..]).unwrap().is_none());
        let options = input(&b"\x0a\x19runtimeoptions.v1.Options"[..], &call()).unwrap();
        assert!(options.params.is_none());
        assert_eq!(options.options.unwrap().type_url, "runtimeoptions.v1.Options");
        for text in [
            r#"{"instanceId":"a","containerdTtrpcAddress":"/c.ttrpc","logLevel":"LOG_LEVEL_DEBUG"}"#,
            r#"{"instance_id":"a","containerd_ttrpc_address":"/c.ttrpc","log_level":-4}"#,
        ] {
            let params = params(text.as_bytes()).unwrap().unwrap();
            assert_eq!(params.containerd_ttrpc_address, "/c.ttrpc");
            assert!(params.debug());
        }
        assert!(!params(&b"{}"[..]).unwrap().unwrap().debug());
        assert!(matches!(params(&b"{"[..]), Err(BootstrapError::Params(_))));
    }

    fn call() -> Invocation {
        let line =
            "-namespace k8s.io -id web -address /c.sock start".split(' ').map(OsString::from).collect();
        Invocation::parse(line).unwrap().unwrap()
    }

    #[test]
    fn the_message_of_new_containerds_brings_the_options_and_is_answered_in_kind() {
        use containerd_shim_protos::bootstrap_api::Extension;
        use kata_api::runtime_options::Options;
        let extension = |type_url: &str, value: Vec<u8>| Extension {
            value: Some(Any { type_url: type_url.to_owned(), value, ..Any::default() }).into(),
            ..Extension::default()
        };
        let options = Options { config_path: "/etc/kata.toml".to_owned(), ..Options::default() };
        let message = BootstrapParams {
            instance_id: "web".to_owned(),
            namespace: "k8s.io".to_owned(),
            containerd_ttrpc_address: "/c.ttrpc".to_owned(),
            log_level: protobuf::EnumOrUnknown::from_i32(-4),
            extensions: vec![
                extension("example.v1.Other", Vec::new()),
                extension("runtimeoptions.v1.Options", options.write_to_bytes().unwrap()),
            ],
            ..BootstrapParams::default()
        };
        let text = message.write_to_bytes().unwrap();
        let found = input(&text[..], &call()).unwrap();
        let params = found.params.unwrap();
        assert_eq!((params.form, params.containerd_ttrpc_address.as_str()), (Form::Message, "/c.ttrpc"));
        assert!(params.debug());
        let words = sandbox_words(found.options.as_ref()).unwrap();
        assert_eq!(words, ["--sandboxer", "--config", "/etc/kata.toml"]);
        // The same bytes about another container are something else.
        let other = Invocation { id: "other".to_owned(), ..call() };
        assert!(input(&text[..], &other).unwrap().params.is_none());

        let told = answer(Some(Form::Message), "unix:///s".to_owned()).unwrap();
        let told = BootstrapResult::parse_from_bytes(&told).unwrap();
        assert_eq!((told.version, told.address.as_str(), told.protocol.as_str()), (3, "unix:///s", "ttrpc"));
        assert_eq!(answer(None, "unix:///s".to_owned()).unwrap(), b"unix:///s");
    }

    #[test]
    fn a_containers_bundle_without_its_specification_starts_no_owner() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("io.containerd.runtime.v2.task/k8s.io/web");
        std::fs::create_dir_all(&bundle).unwrap();
        let error = address(&call(), None, None, &bundle).unwrap_err();
        assert!(
            matches!(&error, BootstrapError::Bundle(BundleError::Lost { path }) if path.starts_with(&bundle))
        );
        assert!(error.to_string().contains("config.json"), "{error}");
    }

    #[test]
    fn a_dead_owners_words_are_the_reason() {
        let listener = || UnixListener::bind(tempfile::tempdir().unwrap().path().join("s")).unwrap();
        let script = |text: &str| {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", text]);
            command
        };
        let error = spawn(script("echo no such thing >&2; exit 1"), listener()).unwrap_err();
        assert_eq!(error.to_string(), "the pod's owner does not serve: no such thing");
        assert!(spawn(script("exec 2>&-; exec sleep 1"), listener()).is_ok());
    }

    #[test]
    fn a_container_of_a_pod_without_owner_is_told_so() {
        let error = owner_of("no-such-pod-of-a-test").unwrap_err();
        assert!(matches!(error, BootstrapError::NoPod { .. }), "{error}");
    }
}
