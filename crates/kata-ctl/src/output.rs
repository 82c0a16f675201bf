//! Text to the standard output, for readers that may go away.

use std::io::{self, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Prints text as it is.
///
/// # Errors
/// An end in silence where nobody reads any more; else why it cannot be written.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // As `head` does it to any program.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::silent(0)),
        done => Ok(done?),
    }
}

/// Prints a document, indented.
///
/// # Errors
/// As [`print()`].
pub fn document(value: &impl Serialize) -> Result<(), Failure> {
    print(&format!("{:#}\n", serde_json::to_value(value)?))
}

/// Prints a document on one line, for streams of them.
///
/// # Errors
/// As [`print()`].
pub fn line(value: &impl Serialize) -> Result<(), Failure> {
    print(&(serde_json::to_string(value)? + "\n"))
}
