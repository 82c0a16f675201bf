//! Tables that are drawn again and again.

use crate::cli::Refresh;
use crate::failure::Failure;
use crate::output;
use crate::pod::Signals;

use super::{Outcome, exit_code};

/// Calls `look` once, or at each interval until the user ends it.
pub async fn each(refresh: &Refresh, mut look: impl AsyncFnMut() -> Result<(), Failure>) -> Outcome {
    let mut signals = Signals::catch()?;
    loop {
        tokio::select! {
            looked = look() => looked?,
            signal = signals.ending() => return Ok(exit_code(128 + signal)),
        }
        if refresh.once {
            return Ok(0);
        }
        tokio::select! {
            () = tokio::time::sleep(refresh.interval) => {}
            // To be ended is how it ends.
            _ = signals.ending() => return Ok(0),
        }
    }
}

/// Prints a table; on a terminal, over the one before.
///
/// # Errors
/// Nobody reads.
pub fn draw(refresh: &Refresh, table: &str) -> Result<(), Failure> {
    let over = !refresh.once && rustix::termios::isatty(rustix::stdio::stdout());
    // Home, then clear to the end: without the flicker of clearing first.
    let before = if over { "\x1b[H" } else { "" };
    let rest = if over { "\x1b[J" } else { "" };
    let text = if over { table.replace('\n', "\x1b[K\n") } else { table.to_owned() };
    output::print(&format!("{before}{text}{rest}"))
}
