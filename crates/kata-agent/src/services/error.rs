//! Why a service did not do what it was asked for.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use ttrpc::Code;

/// Characters of a service's own words that are passed on.
const WORDS_MAX: usize = 512;

/// A call that came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Nobody is there to be asked.
    #[error("this needs a service of the guest that {does}, and {socket:?} {reach}: {unit}")]
    Unreachable {
        /// What was asked for.
        does: &'static str,
        /// Where it would be.
        socket: PathBuf,
        /// What is there.
        reach: Reach,
        /// What the guest's init knows of it, and what to do.
        unit: String,
    },
    /// It says no.
    #[error("the guest's service {name} has refused ({}): {text}", format!("{code:?}"))]
    Refused {
        /// The service.
        name: &'static str,
        /// Its answer's code.
        code: Code,
        /// Its own words, shortened.
        text: String,
    },
    /// What it answers makes no sense, or it broke off.
    #[error("the guest's service {name} is broken: {what}; {unit}")]
    Broken {
        /// The service.
        name: &'static str,
        /// What was seen.
        what: String,
        /// What the guest's init knows of it.
        unit: String,
    },
    /// It takes too long.
    #[error(
        "the guest's service {name} has not answered within {limit:?}: its log in the guest may say what it waits for; \
         agent.image_pull_timeout and agent.guest_service_timeout on the guest's kernel command line give it longer"
    )]
    Late {
        /// The service.
        name: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
}

/// What is where a service should listen.
#[derive(Debug, thiserror::Error)]
pub enum Reach {
    /// Nothing.
    #[error("does not exist")]
    NoSocket,
    /// A link to nothing.
    #[error("is a link to a socket that does not exist")]
    Dangling,
    /// Something else.
    #[error("is no socket")]
    NotASocket,
    /// A socket that nobody listens on.
    #[error("is not listened on")]
    Deaf,
    /// A program that does other things.
    #[error("is that of a program that does not do this")]
    NotServed,
    /// The system says no.
    #[error("cannot be connected to ({0})")]
    Failed(io::Error),
}

impl ServiceError {
    /// Whether there is no such service at all, rather than one that fails.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        let nobody = |reach: &Reach| matches!(reach, Reach::NoSocket | Reach::NotServed);
        matches!(self, Self::Unreachable { reach, .. } if nobody(reach))
    }
}

/// An answer that is none, by the table of docs/guest-services.md.
#[derive(Debug, PartialEq)]
pub(super) enum Fault {
    /// The program does not serve this.
    Absent,
    /// It does, and says no.
    Refused { code: Code, text: String },
    /// It does not speak the protocol, or broke off.
    Broken(String),
}

impl Fault {
    pub(super) fn of(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => {
                let (code, text) = (status.code(), status.message());
                // The client's own word on a frame that it has not read.
                if code == Code::INVALID_ARGUMENT && text.contains("exceed maximum message size") {
                    return Self::Broken("its answer is longer than a frame may be".to_owned());
                }
                let unknown = match code {
                    Code::UNIMPLEMENTED => true,
                    Code::INVALID_ARGUMENT => text.contains("service does not exist"),
                    // What generated code answers for a method that a program has left out.
                    Code::NOT_FOUND => text.starts_with("/api.") && text.ends_with(" is not supported"),
                    _ => false,
                };
                if unknown { Self::Absent } else { Self::Refused { code, text: one_line(text) } }
            }
            ttrpc::Error::RemoteClosed | ttrpc::Error::LocalClosed | ttrpc::Error::Socket(_) => {
                Self::Broken("it closed the connection before it answered".to_owned())
            }
            // Words of the protocol's implementation: none of the service's, and so none of a secret.
            error => Self::Broken(format!("its answer cannot be read ({})", one_line(&error.to_string()))),
        }
    }
}

/// Words of somebody who is not trusted with the log: one line, not too long.
pub(super) fn one_line(text: &str) -> String {
    let words = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut line: String = words.take(WORDS_MAX).collect();
    if line.len() < text.trim().len() {
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: Code, text: &str) -> Fault {
        Fault::of(ttrpc::Error::RpcStatus(ttrpc::get_status(code, text)))
    }

    #[test]
    fn what_is_absent_is_told_from_what_is_refused_as_the_contract_says() {
        assert_eq!(
            status(Code::INVALID_ARGUMENT, "/api.ImagePullService service does not exist"),
            Fault::Absent
        );
        assert_eq!(status(Code::UNIMPLEMENTED, "method"), Fault::Absent);
        assert_eq!(
            status(Code::NOT_FOUND, "/api.ImagePullService/PullImage is not supported"),
            Fault::Absent
        );
        for (code, text) in [
            (Code::INVALID_ARGUMENT, "no reference"),
            (Code::NOT_FOUND, "no such image"),
            (Code::INTERNAL, "everything"),
        ] {
            assert_eq!(status(code, text), Fault::Refused { code, text: text.to_owned() });
        }
    }

    #[test]
    fn words_of_a_service_are_one_line_of_bounded_length() {
        let Fault::Refused { text, .. } =
            status(Code::INTERNAL, &format!("a\nb\u{1b}[2J{}", "x".repeat(9999)))
        else {
            panic!("another fault")
        };
        assert!(text.starts_with("a b [2J") && text.ends_with('…'), "{text}");
        assert_eq!(text.chars().count(), WORDS_MAX + 1);
    }
}
