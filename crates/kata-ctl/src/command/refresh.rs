//! Tables that are drawn again and again.

use crate::cli::Refresh;
use crate::failure::Failure;
use crate::output;
use crate::pod::{Signals, terminal_size};

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

/// Prints a table; on a terminal, over the one before and no larger than it.
///
/// # Errors
/// Nobody reads.
pub fn draw(refresh: &Refresh, table: &str) -> Result<(), Failure> {
    let over = !refresh.once && rustix::termios::isatty(rustix::stdio::stdout());
    if !over {
        return output::print(table);
    }
    let (columns, rows) = terminal_size().unwrap_or((80, 24));
    let lines = table.lines().take(usize::from(rows).saturating_sub(1));
    let line = |line: &str| line.chars().take(columns.into()).collect::<String>();
    // Home, each line to its end, then clear the rest: without the flicker of clearing first.
    let text: String = lines.map(|text| format!("{}\x1b[K\n", line(text))).collect();
    output::print(&format!("\x1b[H{text}\x1b[J"))
}
