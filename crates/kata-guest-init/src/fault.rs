//! The end of a boot that cannot go on: said on the console with its causes, and then the machine ends.

use std::error::Error;

use rustix::fs::{Mode, OFlags, open};
use rustix::system::{RebootCommand, reboot};

const NAME: &str = "kata-guest-init";

/// The error and its causes, joined with ": ".
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// How loud a line of the kernel's log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Shown even on a quiet console.
    Critical = 2,
    /// Kept for who looks.
    Info = 6,
}

/// Writes one line to the kernel's log, which is on the console; to standard error where there is none.
pub fn say(level: Level, text: &str) {
    let line = line(level, text);
    let kmsg = open("/dev/kmsg", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    if kmsg.and_then(|kmsg| rustix::io::write(&kmsg, line.as_bytes())).is_err() {
        let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
    }
}

/// A line of the kernel's log has at most about 1000 bytes, and what others wrote must not make a second one of it.
fn line(level: Level, text: &str) -> String {
    let text = text.chars().map(|character| if character.is_control() { '\u{fffd}' } else { character });
    let mut line = format!("<{}>{NAME}: {}", level as u8, text.collect::<String>());
    line.truncate(line.floor_char_boundary(900));
    line.push('\n');
    line
}

/// Says why, and ends the machine. A restart is its end on every machine type, where a power-off needs ACPI.
pub fn end(error: &dyn Error) -> ! {
    say(Level::Critical, &format!("fatal: {}", chain(error)));
    say(Level::Critical, "the guest is not started; the machine ends");
    end_machine()
}

/// Ends the machine at once.
pub(crate) fn end_machine() -> ! {
    rustix::fs::sync();
    let _ = reboot(RebootCommand::Restart);
    // Not reached as root. The end of PID 1 is a kernel panic, which ends the machine as well.
    std::process::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_others_stays_one_short_line() {
        let text = line(Level::Critical, &format!("serial \"a\n<0>kernel: fine\"{}", "ä".repeat(2000)));
        assert!(text.starts_with("<2>kata-guest-init: serial \"a\u{fffd}<0>kernel"), "{text}");
        assert_eq!((text.matches('\n').count(), text.len() <= 901), (1, true));
    }
}
