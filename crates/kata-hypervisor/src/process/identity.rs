//! Who a process is: its number, and when it began, for numbers are used again.

use std::{fs, io};

/// When a process began: field 22 of `/proc/<pid>/stat`, in clock ticks from the host's boot.
///
/// # Errors
/// The kernel's: `NotFound` where there is no such process.
pub fn start_time(pid: u32) -> io::Result<u64> {
    stat(pid).map(|(_, began)| began)
}

/// Whether the process that began at `start_time` still runs. One that is dead and not waited for does not.
pub fn runs(pid: u32, start_time: u64) -> bool {
    stat(pid).is_ok_and(|(dead, began)| !dead && began == start_time)
}

/// Whether a process is dead, and when it began.
fn stat(pid: u32) -> io::Result<(bool, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse(&stat).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// The second field is the program's name in parentheses and may hold anything, so counting starts after it.
fn parse(stat: &str) -> Option<(bool, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let dead = matches!(fields.next()?, "Z" | "X");
    Some((dead, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_is_known_by_number_and_start_and_a_dead_one_does_not_run() {
        let me = std::process::id();
        let began = start_time(me).unwrap();
        assert!(runs(me, began) && !runs(me, began + 1));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let began = start_time(child.id()).unwrap();
        let child_lives = || runs(child.id(), began);
        while child_lives() {
            std::thread::yield_now();
        }
        assert_eq!(start_time(child.id()).unwrap(), began, "not waited for yet");
        child.wait().unwrap();
        assert!(start_time(child.id()).is_err());
    }

    #[test]
    fn name_of_a_program_is_not_mistaken_for_fields() {
        let fields = "1 1 1 0 -1 4 5 6 7 8 9 10 11 12 20 0 1 0 4711 5";
        assert_eq!(parse(&format!("7 (a) Z (b) S {fields}")), Some((false, 4711)));
        assert_eq!(parse(&format!("7 (x) Z {fields}")), Some((true, 4711)));
        assert_eq!(parse("7 (x) S 1"), None);
    }
}
