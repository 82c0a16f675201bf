//! Errors as clients see them: a ttrpc code, and the whole chain of causes as the message.

use std::error::Error;
use std::fmt::Write as _;

use kata_sandbox::{ErrorKind, SandboxError};
use ttrpc::Code;

/// An error and its causes, joined with `: `.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        // Writing to a string cannot fail.
        let _ = write!(text, ": {cause}");
        next = cause.source();
    }
    text
}

/// The answer to a request that the sandbox refused. The one place where such an error is logged.
pub(crate) fn from_sandbox(request: &'static str, error: &SandboxError) -> ttrpc::Error {
    let message = error.chain();
    tracing::warn!(request, "{message}");
    status(code(error.kind()), message)
}

/// The answer to a request that makes no sense.
pub(crate) fn invalid(message: impl ToString) -> ttrpc::Error {
    status(Code::INVALID_ARGUMENT, message)
}

/// The answer to a request about what is in a pod before anything is.
pub(crate) fn no_container() -> ttrpc::Error {
    status(Code::NOT_FOUND, "no container of this pod has been created yet")
}

/// The answer to a request about what is not there.
pub(crate) fn not_found(message: impl ToString) -> ttrpc::Error {
    status(Code::NOT_FOUND, message)
}

/// The answer to a request for what is there already.
pub(crate) fn already_exists(message: impl ToString) -> ttrpc::Error {
    status(Code::ALREADY_EXISTS, message)
}

/// The answer to a request that this host, as it is set up, cannot carry out.
pub(crate) fn precondition(request: &'static str, chain: String) -> ttrpc::Error {
    tracing::warn!(request, "{chain}");
    status(Code::FAILED_PRECONDITION, chain)
}

/// What whoever comes too late is told.
const LEAVING: &str = "the pod is being taken down, and its owner takes no more requests: wait until it is gone, then make a \
                       new pod (Kubernetes does so by itself)";

/// The answer to a request that came too late.
pub(crate) fn leaving() -> ttrpc::Error {
    status(Code::UNAVAILABLE, LEAVING)
}

/// The answer to a request that is not carried.
pub(crate) fn unimplemented(request: &str) -> ttrpc::Error {
    status(Code::UNIMPLEMENTED, format!("{request} is not supported"))
}

fn status(code: Code, message: impl ToString) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}

fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::NotFound => Code::NOT_FOUND,
        ErrorKind::PermissionDenied => Code::PERMISSION_DENIED,
        ErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
        ErrorKind::InvalidArgument => Code::INVALID_ARGUMENT,
        ErrorKind::FailedPrecondition => Code::FAILED_PRECONDITION,
        ErrorKind::Unimplemented => Code::UNIMPLEMENTED,
        ErrorKind::Unavailable => Code::UNAVAILABLE,
        ErrorKind::Internal => Code::INTERNAL,
    }
}

/// The answer to a request that failed here, for the reason that `chain` tells.
pub(crate) fn internal(request: &'static str, chain: String) -> ttrpc::Error {
    tracing::warn!(request, "{chain}");
    status(Code::INTERNAL, chain)
}
