//! How a command ends when it fails: one line that tells everything, and an exit code.

use std::error::Error;
use std::fmt::Write as _;

/// Exit code of `run` and `exec` when they fail themselves, so that it is told from the command's own codes.
pub const OURS: u8 = 125;
/// Exit code for a command that is there and cannot be executed.
pub const NOT_EXECUTABLE: u8 = 126;
/// Exit code for a command that is not there.
pub const NOT_FOUND: u8 = 127;

/// Exit code of a command that looks for something that is not there.
pub const NO_SUCH: u8 = 3;

/// An error on its way to the user.
#[derive(Debug)]
pub struct Failure {
    /// Exit code; `None` is the command's usual one.
    pub code: Option<u8>,
    /// What went wrong, with its causes. `None` where everything has been said.
    pub error: Option<Box<dyn Error + Send + Sync>>,
}

impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { code: None, error: Some(Box::new(error)) }
    }
}

impl Failure {
    /// A failure with a code of its own.
    pub fn with_code(code: u8, error: impl Error + Send + Sync + 'static) -> Self {
        Self { code: Some(code), error: Some(Box::new(error)) }
    }

    /// An end that needs no words: the user knows, or was told.
    pub fn silent(code: u8) -> Self {
        Self { code: Some(code), error: None }
    }

    /// A failure that is plain text.
    pub fn text(text: impl Into<String>) -> Self {
        Self { code: None, error: Some(text.into().into()) }
    }
}

/// An error and its causes on one line, joined with `: `.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        // Some errors of other crates repeat their cause in their own text.
        if !text.ends_with(&words) {
            // Writing to a String never fails.
            let _ = write!(text, ": {words}");
        }
        next = cause.source();
    }
    text
}
