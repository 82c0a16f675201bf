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
use crate::shell::{self, ChoreError};
use crate::{Chores, say};

/// As `timeout` has it.
const TIME_IS_OVER: u8 = 124;
/// How long a machine may take to come up.
const BOOT: Duration = Duration::from_secs(120);
/// How often the machine is asked whether it lives.
const BEAT: Duration = Duration::from_secs(1);
/// How long it may say nothing.
const SILENCE: Duration = Duration::from_secs(60);
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
    match outcome? {
        Outcome::Exit(status) => Ok(status),
        Outcome::TimeIsOver => {
            say(&format!("killed after {} s", options.timeout));
            Ok(TIME_IS_OVER)
        }
        Outcome::Told(signal) => Ok(u8::try_from(128 + signal as i32).unwrap_or(u8::MAX)),
        Outcome::Lost(how) => Err(ChoreError::LabLost { how, console: machine.last_words() }),
    }
}

enum Outcome {
    Exit(u8),
    TimeIsOver,
    /// A signal that the command did not obey in time.
    Told(Signal),
    /// How the machine was lost.
    Lost(String),
}

fn talk(machine: &Machine, start: Start, deadline: Instant, signals: SigSet) -> Chores<Outcome> {
    let socket = |source| ChoreError::Socket { what: "the lab's port", source };
    let reading = machine.port.try_clone().map_err(socket)?;
    let writing: Writing = Arc::new(Mutex::new(machine.port.try_clone().map_err(socket)?));
    let (events, inbox) = channel();
    read_frames(reading, events.clone());
    read_signals(signals, events);
    if let Some(outcome) = wait_until_ready(&inbox, deadline)? {
        return Ok(outcome);
    }
    let _raw = start.terminal.and_then(|_| RawTerminal::enter());
    send(&writing, &Frame::Start(start))?;
    let (taken, takes) = channel();
    read_input(Arc::clone(&writing), takes);
    beat(Arc::clone(&writing));
    Listener { inbox: &inbox, writing: &writing, taken, told: None }.listen(deadline)
}

/// Nothing, once the machine is up.
fn wait_until_ready(inbox: &Receiver<Event>, deadline: Instant) -> Chores<Option<Outcome>> {
    let booted = Instant::now() + BOOT;
    loop {
        match next(inbox, deadline.min(booted)) {
            Some(Event::Frame(Frame::Ready)) => return Ok(None),
            Some(Event::Frame(Frame::Fault(reason))) => return Err(fault(&reason)),
            Some(Event::Signal(Signal::SIGWINCH) | Event::Frame(_)) => {}
            Some(Event::Signal(signal)) => return Ok(Some(Outcome::Told(signal))),
            Some(Event::End(error)) => return Ok(Some(ended(&error))),
            None if deadline < booted => return Ok(Some(Outcome::TimeIsOver)),
            None => return Ok(Some(Outcome::Lost(format!("did not come up within {} s", BOOT.as_secs())))),
        }
    }
}

/// What is made of frames and signals while the command runs.
struct Listener<'a> {
    inbox: &'a Receiver<Event>,
    writing: &'a Writing,
    taken: Sender<()>,
    /// What the command was told.
    told: Option<Signal>,
}

impl Listener<'_> {
    fn listen(mut self, mut deadline: Instant) -> Chores<Outcome> {
        loop {
            // From now on: while output was being written nobody listened.
            let silence = Instant::now() + SILENCE;
            match next(self.inbox, deadline.min(silence)) {
                Some(Event::Frame(Frame::Exit(status))) => return Ok(Outcome::Exit(status)),
                Some(Event::Frame(frame)) => self.take(frame)?,
                Some(Event::End(error)) => return Ok(ended(&error)),
                Some(Event::Signal(Signal::SIGWINCH)) => {
                    if let Some(size) = terminal_size() {
                        send(self.writing, &Frame::Resize(size))?;
                    }
                }
                // The second time nobody is asked any more.
                Some(Event::Signal(signal)) if self.told.is_some() => return Ok(Outcome::Told(signal)),
                Some(Event::Signal(signal)) => {
                    self.told = Some(signal);
                    deadline = deadline.min(Instant::now() + GRACE);
                    send(self.writing, &Frame::Signal(u8::try_from(signal as i32).unwrap_or_default()))?;
                }
                None if silence < deadline => {
                    return Ok(Outcome::Lost(format!("gave no sign of life for {} s", SILENCE.as_secs())));
                }
                None => return Ok(self.told.map_or(Outcome::TimeIsOver, Outcome::Told)),
            }
        }
    }

    fn take(&self, frame: Frame) -> Chores {
        match frame {
            Frame::Stdout(bytes) => put(&mut std::io::stdout(), &bytes),
            Frame::Stderr(bytes) => put(&mut std::io::stderr(), &bytes),
            Frame::Fault(reason) => Err(fault(&reason)),
            Frame::Taken => {
                // Nobody reads input any more if there is no more.
                let _ = self.taken.send(());
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

fn fault(reason: &str) -> ChoreError {
    ChoreError::Found(format!("the lab's init: {reason}"))
}

fn ended(error: &FrameError) -> Outcome {
    Outcome::Lost(format!("ended before the command did: {}", shell::chain(error)))
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

/// Sends our input, a piece at a time.
fn read_input(writing: Writing, taken: Receiver<()>) {
    std::thread::spawn(move || {
        let mut piece = vec![0; PIECE];
        loop {
            let frame = match std::io::stdin().read(&mut piece) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => Frame::StdinEnd,
                Ok(length) => Frame::Stdin(piece.get(..length).unwrap_or_default().to_vec()),
            };
            if send(&writing, &frame).is_err() || frame == Frame::StdinEnd || taken.recv().is_err() {
                return;
            }
        }
    });
}

/// Asks for signs of life. It gives some as well: an idle processor whose timer's interrupt was lost in a nested machine
/// sleeps until another interrupt comes, and this is one.
fn beat(writing: Writing) {
    std::thread::spawn(move || {
        while Frame::Beat.write(&mut *writing.lock().unwrap_or_else(PoisonError::into_inner)).is_ok() {
            std::thread::sleep(BEAT);
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
