//! What the monitor's log tells: no more than its reader has room for.
//!
//! A guest can provoke some messages as often as it likes, and the owner keeps a bounded piece of the log. So after a burst lines
//! come at a steady rate, and how many were left out is told with the next.

use std::io::{self, Write};
use std::time::{Duration, Instant};

/// Lines that may come at once.
const BURST: u32 = 200;
/// How long until there is room for another.
const PER_LINE: Duration = Duration::from_secs(1);

/// Passes on whole lines, one at each write, as far as there is room.
#[derive(Debug)]
pub struct Bounded<W> {
    to: W,
    room: u32,
    /// When the room was right.
    at: Instant,
    left_out: u64,
}

impl<W: Write> Bounded<W> {
    /// With room for a burst.
    pub fn new(to: W) -> Bounded<W> {
        Bounded { to, room: BURST, at: Instant::now(), left_out: 0 }
    }

    fn pass(&mut self, line: &[u8], now: Instant) -> io::Result<()> {
        let passed = now.saturating_duration_since(self.at).as_secs() / PER_LINE.as_secs();
        let come = u32::try_from(passed).unwrap_or(u32::MAX);
        self.room = self.room.saturating_add(come).min(BURST);
        self.at = self.at.checked_add(PER_LINE * come).map_or(now, |at| at.min(now));
        if self.room == 0 {
            self.left_out = self.left_out.saturating_add(1);
            return Ok(());
        }
        self.room -= 1;
        if self.left_out > 0 {
            writeln!(self.to, "{} messages before the next were too many, and are left out", self.left_out)?;
            self.left_out = 0;
        }
        self.to.write_all(line)
    }
}

impl<W: Write> Write for Bounded<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.pass(line, Instant::now()).map(|()| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endless_messages_are_a_burst_and_then_a_trickle_that_says_what_is_missing() {
        let begin = Instant::now();
        let mut log = Bounded { to: Vec::new(), room: BURST, at: begin, left_out: 0 };
        for number in 0..1000 {
            log.pass(format!("{number}\n").as_bytes(), begin).unwrap();
        }
        assert_eq!(log.to.split(|byte| *byte == b'\n').count(), 201);
        assert!(log.to.ends_with(b"\n199\n"));
        log.to.clear();
        log.pass(b"later\n", begin + Duration::from_millis(2500)).unwrap();
        log.pass(b"and\n", begin + Duration::from_millis(2500)).unwrap();
        log.pass(b"too soon\n", begin + Duration::from_millis(2900)).unwrap();
        log.pass(b"in time\n", begin + Duration::from_millis(3000)).unwrap();
        assert_eq!(
            String::from_utf8(std::mem::take(&mut log.to)).unwrap(),
            "800 messages before the next were too many, and are left out\nlater\nand\n\
             1 messages before the next were too many, and are left out\nin time\n"
        );
        for number in 0..1000 {
            log.pass(format!("{number}\n").as_bytes(), begin + Duration::from_secs(100_000)).unwrap();
        }
        assert!(log.to.ends_with(b"\n199\n"), "quiet times are no larger burst");
    }
}
