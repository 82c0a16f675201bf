//! The user's terminal in raw mode, and back again whatever happens.

use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// What the terminal was like before. Static, so that a panic finds it too.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Whether the standard input is a terminal.
pub fn is_terminal() -> bool {
    rustix::termios::isatty(rustix::stdio::stdin())
}

/// Columns and rows of the terminal at the standard input, if there is one and it knows them.
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(rustix::stdio::stdin()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// The terminal in raw mode, for as long as the value lives: every key is passed on as it is.
pub struct RawTerminal(());

impl RawTerminal {
    /// Puts the terminal at the standard input into raw mode.
    ///
    /// # Errors
    /// There is none, or it does not obey.
    pub fn enter() -> io::Result<Self> {
        let before = tcgetattr(rustix::stdio::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let entered = Self(());
        let hook = std::panic::take_hook();
        // Release builds abort on a panic without dropping anything.
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            hook(panic);
        }));
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw)?;
        Ok(entered)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was, if it was changed.
pub fn restore() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = before {
        // Keys that are still to be read stay: they are for the shell.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &before);
    }
}
