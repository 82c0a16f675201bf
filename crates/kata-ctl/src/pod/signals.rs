//! Signals: those that this process gets, and their names.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// `SIGINT`, by the kernel's number for it.
pub const INT: u32 = 2;
/// `SIGKILL`.
pub const KILL: u32 = 9;
/// `SIGPIPE`: nobody reads the output any more.
pub const PIPE: u32 = 13;
/// `SIGWINCH`: the terminal has another size.
pub const WINCH: u32 = 28;

/// What is caught: HUP, INT, QUIT, USR1, USR2, ALRM, TERM and WINCH. The rest keeps its meaning for this process.
const CAUGHT: [i32; 8] = [1, 2, 3, 10, 12, 14, 15, 28];
/// Those of them that mean "end".
const ENDING: [u32; 4] = [1, 2, 3, 15];

/// Names by number, from 1 (signal(7), x86 and ARM).
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
/// Numbers of the first and the last real-time signal.
const REAL_TIME: (u32, u32) = (34, 64);

/// Text that is no signal.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a signal: expected a name such as TERM or SIGTERM, or a number from 1 to 64")]
pub struct SignalError(String);

/// The number of a signal: `TERM`, `SIGTERM`, `sigterm`, `15`, `RTMIN+1`.
///
/// # Errors
/// There is no such signal.
pub fn signal_number(text: &str) -> Result<u32, SignalError> {
    let fault = || SignalError(text.to_owned());
    if let Ok(number) = text.parse::<u32>() {
        return if (1..=REAL_TIME.1).contains(&number) { Ok(number) } else { Err(fault()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        let offset: u32 = if offset.is_empty() { 0 } else { offset.parse().map_err(|_| fault())? };
        return Some(REAL_TIME.0 + offset).filter(|number| *number <= REAL_TIME.1).ok_or_else(fault);
    }
    let index = NAMES.iter().position(|known| *known == name).ok_or_else(fault)?;
    u32::try_from(index + 1).map_err(|_| fault())
}

/// The signals that come to this process, in order, from the moment this exists.
pub struct Signals(mpsc::UnboundedReceiver<u32>);

impl Signals {
    /// Catches them.
    ///
    /// # Errors
    /// The system refuses.
    pub fn catch() -> io::Result<Self> {
        let (send, receive) = mpsc::unbounded_channel();
        for number in CAUGHT {
            let mut caught = signal(SignalKind::from_raw(number))?;
            let send = send.clone();
            tokio::spawn(async move {
                while caught.recv().await.is_some() && send.send(number.unsigned_abs()).is_ok() {}
            });
        }
        Ok(Self(receive))
    }

    /// The next one.
    pub async fn next(&mut self) -> u32 {
        match self.0.recv().await {
            Some(number) => number,
            // The senders live as long as the runtime.
            None => std::future::pending().await,
        }
    }

    /// The next one that means "end"; others mean nothing yet.
    pub async fn ending(&mut self) -> u32 {
        loop {
            let number = self.next().await;
            if ENDING.contains(&number) {
                return number;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("TERM", 15),
            ("SIGTERM", 15),
            ("sigkill", 9),
            ("9", 9),
            ("WINCH", WINCH),
            ("INT", INT),
            ("SYS", 31),
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("64", 64),
            ("USR1", 10),
            ("CHLD", 17),
        ] {
            assert_eq!(signal_number(text), Ok(number), "{text}");
        }
    }

    #[test]
    fn what_is_no_signal_is_refused() {
        for text in ["", "0", "65", "-9", "SIG", "TERMINATE", "RTMIN+31", "RTMIN+x"] {
            assert_eq!(signal_number(text), Err(SignalError(text.to_owned())), "{text}");
        }
    }
}
