//! containerd's way to call a shim: flags of one dash before the verb.
//!
//! `containerd-shim-kata-v2 -namespace NS -id ID -address SOCKET -publish-binary FILE [-bundle DIR] [-debug] start|delete`
//! in the bundle of the container; `-info` and `-v` stand alone. Source: containerd's runtime v2 README, "Shim Authoring".

use std::ffi::OsString;
use std::path::PathBuf;

use thiserror::Error;

/// What a shim is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Answer the address of the pod's owner, which is started if need be.
    Start,
    /// Clean up after an owner that died.
    Delete,
    /// Tell about the runtime.
    Info,
    /// Tell the version.
    Version,
}

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Invocation {
    pub(crate) verb: Verb,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// The container.
    pub(crate) id: String,
    /// containerd's main socket.
    pub(crate) address: String,
    /// The bundle, where it is not the working directory.
    pub(crate) bundle: Option<PathBuf>,
    pub(crate) debug: bool,
}

#[derive(Debug, PartialEq, Eq, Error)]
pub(crate) enum InvocationError {
    #[error("the argument {0:?} is not UTF-8")]
    Text(OsString),
    #[error(
        "unknown flag -{0}; containerd's are -namespace, -id, -address, -publish-binary, -bundle, -debug, -info and -v"
    )]
    Flag(String),
    #[error("flag -{0} needs a value")]
    Value(String),
    #[error("unknown verb {0:?}; containerd's are start and delete")]
    Verb(String),
    #[error("no verb; containerd's are start and delete")]
    NoVerb,
    #[error("-id {id:?} {reason}")]
    Id { id: String, reason: String },
    #[error("{verb} needs the flag -{flag}")]
    Missing { verb: &'static str, flag: &'static str },
}

impl Invocation {
    /// The call, if the arguments (without the program's name) are containerd's: it puts flags before the verb, our own
    /// command line the verb before the flags.
    pub(crate) fn parse(arguments: Vec<OsString>) -> Option<Result<Self, InvocationError>> {
        let first = arguments.first()?.to_str().unwrap_or_default();
        let ours = ["-h", "--help", "-V", "--version"].contains(&first);
        (first.starts_with('-') && !ours || first == "start").then(|| read(arguments))
    }
}

fn read(arguments: Vec<OsString>) -> Result<Invocation, InvocationError> {
    let mut call = Invocation {
        verb: Verb::Version,
        namespace: String::new(),
        id: String::new(),
        address: String::new(),
        bundle: None,
        debug: false,
    };
    let mut verb = None;
    let mut words = arguments.into_iter();
    while let Some(word) = words.next() {
        let word = word.into_string().map_err(InvocationError::Text)?;
        let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            verb = Some(word);
            // Nothing is defined to follow.
            break;
        };
        let (name, given) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let mut value =
            || match given.clone().map_or_else(|| words.next().map(OsString::into_string), |it| Some(Ok(it)))
            {
                Some(Ok(value)) => Ok(value),
                Some(Err(raw)) => Err(InvocationError::Text(raw)),
                None => Err(InvocationError::Value(name.to_owned())),
            };
        match name {
            "namespace" => call.namespace = value()?,
            "id" => call.id = value()?,
            "address" => call.address = value()?,
            "bundle" => call.bundle = Some(value()?).filter(|path| !path.is_empty()).map(PathBuf::from),
            // Events go over the socket in TTRPC_ADDRESS; the socket name -socket is ours to choose.
            "publish-binary" | "socket" => drop(value()?),
            "debug" => call.debug = given.as_deref() != Some("false"),
            "info" => return Ok(Invocation { verb: Verb::Info, ..call }),
            "v" | "version" => return Ok(call),
            other => return Err(InvocationError::Flag(other.to_owned())),
        }
    }
    let (verb, name) = match verb.as_deref() {
        Some("start") => (Verb::Start, "start"),
        Some("delete") => (Verb::Delete, "delete"),
        Some(other) => return Err(InvocationError::Verb(other.to_owned())),
        None => return Err(InvocationError::NoVerb),
    };
    call.verb = verb;
    for (flag, value) in [("id", &call.id), ("namespace", &call.namespace)] {
        if value.is_empty() {
            return Err(InvocationError::Missing { verb: name, flag });
        }
    }
    // It becomes a path.
    match crate::cli::pod_id(&call.id) {
        Ok(_) => Ok(call),
        Err(reason) => Err(InvocationError::Id { id: call.id, reason }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Option<Result<Invocation, InvocationError>> {
        Invocation::parse(line.split_whitespace().map(OsString::from).collect())
    }

    #[test]
    fn containerds_call_is_understood_in_full() {
        let line = "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id web \
                    -bundle /b -debug start";
        let call = parse(line).unwrap().unwrap();
        assert_eq!((call.verb, call.namespace.as_str(), call.id.as_str()), (Verb::Start, "k8s.io", "web"));
        assert_eq!((call.bundle, call.debug), (Some("/b".into()), true));
        assert_eq!(call.address, "/run/containerd/containerd.sock");
    }

    #[test]
    fn flags_take_two_dashes_and_an_equals_sign_as_go_programs_do() {
        let call = parse("--namespace=default -id=a --debug=false delete").unwrap().unwrap();
        assert_eq!((call.verb, call.namespace.as_str(), call.debug), (Verb::Delete, "default", false));
    }

    #[test]
    fn our_own_command_line_is_left_alone() {
        for line in ["", "pod --id a", "delete --id a", "host --json", "--help", "--version"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn version_and_info_need_no_verb() {
        assert_eq!(parse("-v").unwrap().unwrap().verb, Verb::Version);
        assert_eq!(parse("-info").unwrap().unwrap().verb, Verb::Info);
    }

    #[test]
    fn a_wrong_call_is_told_what_is_wrong() {
        let error = |line| parse(line).unwrap().unwrap_err();
        assert_eq!(error("-nonsense start"), InvocationError::Flag("nonsense".into()));
        assert_eq!(error("-id"), InvocationError::Value("id".into()));
        assert_eq!(error("-id a -namespace b stop"), InvocationError::Verb("stop".into()));
        assert_eq!(error("-id a -namespace b"), InvocationError::NoVerb);
        assert!(matches!(error("-id ../a -namespace b delete"), InvocationError::Id { .. }));
        assert_eq!(error("-id a start"), InvocationError::Missing { verb: "start", flag: "namespace" });
    }
}
