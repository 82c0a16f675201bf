//! Signals to processes that the kernel protects from them.
//!
//! The init of a pid namespace gets no signal that it has no handler for. Where the default action would have ended any
//! other process, SIGKILL stands in and the exit code tells of the signal that was asked for.

use rustix::io::Errno;
use rustix::process::{Signal, kill_process};

use super::agent::Process;
use super::error::RpcError;

/// The signal of this number.
///
/// # Errors
/// [`RpcError::Invalid`] for a number that no signal has.
pub fn of_number(number: u32) -> Result<Signal, RpcError> {
    let invalid = || RpcError::Invalid(format!("signal {number} does not exist"));
    let raw = i32::try_from(number).map_err(|_| invalid())?;
    match Signal::from_named_raw(raw) {
        Some(signal) => Ok(signal),
        // SAFETY: these are the real-time signals that the C library does not use itself.
        None if (34..=64).contains(&raw) => Ok(unsafe { Signal::from_raw_unchecked(raw) }),
        None => Err(invalid()),
    }
}

/// Sends `signal` to `process`, or SIGKILL in its place.
///
/// # Errors
/// [`RpcError::State`] if the process is gone.
pub fn send(process: &Process, signal: Signal) -> Result<(), RpcError> {
    let pid = process.pid.as_raw_nonzero().get();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mut sent = signal;
    if is_fatal(signal) && Disposition::parse(&status).swallows(signal) {
        process.dies_of(signal.as_raw());
        sent = Signal::KILL;
    }
    match kill_process(process.pid, sent) {
        Ok(()) => Ok(()),
        Err(Errno::SRCH) => Err(RpcError::State("the process has ended".to_owned())),
        Err(error) => {
            Err(RpcError::system(format!("sending signal {} to pid {pid}", signal.as_raw()))(error))
        }
    }
}

/// Whether the default action ends the process.
fn is_fatal(signal: Signal) -> bool {
    let harmless = [
        Signal::CHILD,
        Signal::CONT,
        Signal::URG,
        Signal::WINCH,
        Signal::STOP,
        Signal::TSTP,
        Signal::TTIN,
        Signal::TTOU,
    ];
    !harmless.contains(&signal)
}

/// What a process does with signals, by the masks of `/proc/<pid>/status`: bit 0 is signal 1.
#[derive(Debug, Default, PartialEq, Eq)]
struct Disposition {
    namespace_init: bool,
    caught: u64,
    ignored: u64,
    blocked: u64,
}

impl Disposition {
    fn parse(status: &str) -> Self {
        let mut disposition = Self::default();
        for line in status.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            let mask = || u64::from_str_radix(value, 16).unwrap_or_default();
            match key {
                // One number per namespace, the innermost last.
                "NSpid" => {
                    let mut pids = value.split_whitespace();
                    disposition.namespace_init = pids.clone().count() > 1 && pids.next_back() == Some("1");
                }
                "SigCgt" => disposition.caught = mask(),
                "SigIgn" => disposition.ignored = mask(),
                "SigBlk" => disposition.blocked = mask(),
                _ => {}
            }
        }
        disposition
    }

    /// Whether the kernel would drop the signal though nobody wanted it ignored. A blocked one is kept for sigwait.
    fn swallows(&self, signal: Signal) -> bool {
        let bit =
            u32::try_from(signal.as_raw() - 1).ok().and_then(|shift| 1_u64.checked_shl(shift)).unwrap_or(0);
        self.namespace_init && (self.caught | self.ignored | self.blocked) & bit == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(nspid: &str, blocked: u64, ignored: u64, caught: u64) -> Disposition {
        let text = format!(
            "Name:\tsleep\nNSpid:\t{nspid}\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t{caught:016x}\n"
        );
        Disposition::parse(&text)
    }

    #[test]
    fn an_init_without_a_handler_swallows_the_signal() {
        assert!(status("412\t1", 0, 0, 0).swallows(Signal::TERM));
        assert!(status("412\t1", 0, 0, 1 << 1).swallows(Signal::TERM), "the handler is for another signal");
    }

    #[test]
    fn a_signal_that_is_caught_ignored_or_waited_for_is_sent_as_it_is() {
        let term = 1 << 14;
        for disposition in
            [status("412\t1", term, 0, 0), status("412\t1", 0, term, 0), status("412\t1", 0, 0, term)]
        {
            assert!(!disposition.swallows(Signal::TERM));
        }
    }

    #[test]
    fn other_processes_get_every_signal() {
        assert!(!status("412\t7", 0, 0, 0).swallows(Signal::TERM));
        assert!(!status("412", 0, 0, 0).swallows(Signal::TERM));
        assert!(!Disposition::parse("").swallows(Signal::TERM));
    }

    #[test]
    fn numbers_become_signals_and_only_real_ones() {
        assert_eq!(of_number(15).unwrap(), Signal::TERM);
        assert_eq!(of_number(64).unwrap().as_raw(), 64);
        for number in [0, 65, 33, u32::MAX] {
            assert!(of_number(number).is_err(), "{number}");
        }
        assert!(!is_fatal(Signal::WINCH) && is_fatal(Signal::HUP) && is_fatal(of_number(40).unwrap()));
    }
}
