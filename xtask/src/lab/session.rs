//! One command in the lab, from xtask's side: streams, signals, the time limit.
//!
//! ```text
//!  standard input ─┐                              ┌─▶ standard output, standard error
//!  signals ────────┼─▶ frames ─▶ port ─▶ frames ──┤
//!  terminal size ──┘                              └─▶ exit status
//! ```

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lab_init::{Frame, FrameError, PIECE, Size, Start};
use nix::sys::signal::{SigSet, Signal};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use super::Options;
use super::machine::Machine;
use crate::shell::ChoreError;
use crate::{Chores, say};

/// As `timeout` has it.
const TIME_IS_OVER: u8 = 124;
/// How long a machine may take to come up.
const BOOT: Duration = Duration::from_secs(120);
/// How long a command that was told to end may take.
const GRACE: Duration = Duration::from_secs(10);
const FORWARDED: [Signal; 5] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGWINCH];

enum Event {
    Frame(Frame),
    /// The channel is at its end.
    End(FrameError),
    Signal(Signal),
}

type Writing = Arc<Mutex<UnixStream>>;

/// Runs a command to its end; answers its status. Whatever happens, the machine is gone afterwards.
pub fn converse(mut machine: Machine, start: Start, options: &Options) -> Chores<u8> {
    let deadline = Instant::now() + options.patience();
    // Before the threads, which inherit it: only the one that waits for them gets these.
    let signals: SigSet = FORWARDED.into_iter().collect();
    let blocked = signals.thread_block();
    machine.read_console(options.console);
    let outcome = match blocked {
        Ok(()) => talk(&machine, start, deadline, signals),
        Err(errno) => Err(ChoreError::Socket { what: "signals", source: errno.into() }),
    };
    let _ = signals.thread_unblock();
    match outcome {
        Ok(Outcome::Exit(status)) => Ok(status),
        Ok(Outcome::TimeIsOver) => {
            say(&format!("killed after {} s", options.timeout));
            Ok(TIME_IS_OVER)
        }
        Ok(Outcome::Told(signal)) => Ok(u8::try_from(128 + signal as i32).unwrap_or(u8::MAX)),
        Ok(Outcome::Ended(error)) => {
            let (status, console) = machine.post_mortem();
            let status = status.map_or_else(String::new, |status| format!(" ({status})"));
            Err(ChoreError::LabEnded { status, console, source: error })
        }
        Err(error) => Err(error),
    }
}

enum Outcome {
    Exit(u8),
    TimeIsOver,
    /// A signal that the command did not obey in time.
    Told(Signal),
    Ended(FrameError),
}

fn talk(machine: &Machine, start: Start, deadline: Instant, signals: SigSet) -> Chores<Outcome> {
    let socket = |source| ChoreError::Socket { what: "the lab's port", source };
    let reading = machine.port.try_clone().map_err(socket)?;
    let writing: Writing = Arc::new(Mutex::new(machine.port.try_clone().map_err(socket)?));
    let (events, inbox) = channel();
    read_frames(reading, events.clone());
    read_signals(signals, events);
    let Some(outcome) = wait_until_ready(&inbox, deadline.min(Instant::now() + BOOT))? else {
        let _raw = start.terminal.and_then(|_| RawTerminal::enter());
        send(&writing, &Frame::Start(start))?;
        read_input(Arc::clone(&writing));
        return listen(&inbox, &writing, deadline);
    };
    Ok(outcome)
}

/// Nothing, once the machine is up.
fn wait_until_ready(inbox: &Receiver<Event>, deadline: Instant) -> Chores<Option<Outcome>> {
    loop {
        match next(inbox, deadline) {
            Some(Event::Frame(Frame::Ready)) => return Ok(None),
            Some(Event::Signal(Signal::SIGWINCH)) => {}
            Some(Event::Signal(signal)) => return Ok(Some(Outcome::Told(signal))),
            Some(Event::Frame(Frame::Fault(reason))) => return Err(fault(&reason)),
            Some(Event::Frame(_)) => {}
            Some(Event::End(error)) => return Ok(Some(Outcome::Ended(error))),
            None => {
                return Err(ChoreError::Found("the lab's machine does not come up; see --console".to_owned()));
            }
        }
    }
}

fn listen(inbox: &Receiver<Event>, writing: &Writing, mut deadline: Instant) -> Chores<Outcome> {
    let mut told = None;
    loop {
        match next(inbox, deadline) {
            Some(Event::Frame(Frame::Stdout(bytes))) => put(&mut std::io::stdout(), &bytes)?,
            Some(Event::Frame(Frame::Stderr(bytes))) => put(&mut std::io::stderr(), &bytes)?,
            Some(Event::Frame(Frame::Exit(status))) => return Ok(Outcome::Exit(status)),
            Some(Event::Frame(Frame::Fault(reason))) => return Err(fault(&reason)),
            Some(Event::Frame(_)) => {}
            Some(Event::End(error)) => return Ok(Outcome::Ended(error)),
            Some(Event::Signal(Signal::SIGWINCH)) => {
                if let Some(size) = terminal_size() {
                    send(writing, &Frame::Resize(size))?;
                }
            }
            // The second time nobody is asked any more.
            Some(Event::Signal(signal)) if told.is_some() => return Ok(Outcome::Told(signal)),
            Some(Event::Signal(signal)) => {
                told = Some(signal);
                deadline = deadline.min(Instant::now() + GRACE);
                send(writing, &Frame::Signal(u8::try_from(signal as i32).unwrap_or_default()))?;
            }
            None => return Ok(told.map_or(Outcome::TimeIsOver, Outcome::Told)),
        }
    }
}

fn fault(reason: &str) -> ChoreError {
    ChoreError::Found(format!("the lab's init: {reason}"))
}

/// Nothing when the time is over.
fn next(inbox: &Receiver<Event>, deadline: Instant) -> Option<Event> {
    inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
}

fn put(stream: &mut impl Write, bytes: &[u8]) -> Chores {
    let written = stream.write_all(bytes).and_then(|()| stream.flush());
    written.map_err(|source| ChoreError::Socket { what: "standard output", source })
}

fn send(writing: &Writing, frame: &Frame) -> Chores {
    let sent = frame.write(&mut *writing.lock().unwrap_or_else(PoisonError::into_inner));
    // A machine that ends right now is told by the reading side, with its last words.
    match sent {
        Ok(()) | Err(FrameError::Channel(_)) => Ok(()),
        Err(error) => Err(ChoreError::Found(error.to_string())),
    }
}

fn read_frames(mut port: UnixStream, events: Sender<Event>) {
    std::thread::spawn(move || {
        loop {
            let (event, last) = match Frame::read(&mut port) {
                Ok(frame) => (Event::Frame(frame), false),
                Err(error) => (Event::End(error), true),
            };
            if events.send(event).is_err() || last {
                return;
            }
        }
    });
}

fn read_signals(signals: SigSet, events: Sender<Event>) {
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    });
}

fn read_input(writing: Writing) {
    std::thread::spawn(move || {
        let mut piece = vec![0; PIECE];
        loop {
            let frame = match std::io::stdin().read(&mut piece) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => Frame::StdinEnd,
                Ok(length) => Frame::Stdin(piece.get(..length).unwrap_or_default().to_vec()),
            };
            if send(&writing, &frame).is_err() || frame == Frame::StdinEnd {
                return;
            }
        }
    });
}

/// Size of the terminal that standard input is; nothing if it is none.
pub fn terminal_size() -> Option<Size> {
    let stdin = rustix::stdio::stdin();
    let size = isatty(stdin).then(|| tcgetwinsize(stdin).ok())??;
    Some(Size { rows: size.ws_row, columns: size.ws_col })
}

/// Our terminal, passing every key on; as before when dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Option<Self> {
        let before = tcgetattr(rustix::stdio::stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}
