//! What the monitor's log tells: no more than its reader has room for.
//!
//! A guest can provoke some messages as often as it likes, and the owner keeps a bounded piece of the log. So after a burst lines
//! come at a steady rate, and how many were left out is told with the next.

use std::io::{self, Write};
use std::num::NonZeroU64;
use std::time::Instant;

use crate::virtio::limit::Bucket;

/// Lines that may come at once.
const BURST: u32 = 200;
/// How many more there is room for each second.
const PER_SECOND: NonZeroU64 = NonZeroU64::MIN;

/// Passes on whole lines, one at each write, as far as there is room.
#[derive(Debug)]
pub struct Bounded<W> {
    to: W,
    room: Bucket,
    left_out: u64,
}

impl<W: Write> Bounded<W> {
    /// With room for a burst.
    pub fn new(to: W) -> Bounded<W> {
        Bounded { to, room: Bucket::of(BURST, PER_SECOND, Instant::now()), left_out: 0 }
    }

    fn pass(&mut self, line: &[u8], now: Instant) -> io::Result<()> {
        if self.room.wait(now).is_some() {
            self.left_out = self.left_out.saturating_add(1);
            return Ok(());
        }
        self.room.spend(1);
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
    use std::time::Duration;

    use super::*;

    #[test]
    fn endless_messages_are_a_burst_and_then_a_trickle_that_says_what_is_missing() {
        let begin = Instant::now();
        let room = Bucket::of(BURST, PER_SECOND, begin);
        let mut log = Bounded { to: Vec::new(), room, left_out: 0 };
        for number in 0..1000 {
            log.pass(format!("{number}\n").as_bytes(), begin).unwrap();
        }
        assert_eq!(log.to.split(|byte| *byte == b'\n').count(), 201);
        assert!(log.to.ends_with(b"\n199\n"));
        log.to.clear();
        let after = |milliseconds| begin + Duration::from_millis(milliseconds);
        for (line, at) in [("later\n", 2000), ("and\n", 2000), ("too soon\n", 2000), ("in time\n", 3000)] {
            log.pass(line.as_bytes(), after(at)).unwrap();
        }
        assert_eq!(
            String::from_utf8(std::mem::take(&mut log.to)).unwrap(),
            "800 messages before the next were too many, and are left out\nlater\nand\n\
             1 messages before the next were too many, and are left out\nin time\n"
        );
        for number in 0..1000 {
            log.pass(format!("{number}\n").as_bytes(), after(100_000_000)).unwrap();
        }
        assert!(log.to.ends_with(b"\n199\n"), "quiet times are no larger burst");
    }
}
