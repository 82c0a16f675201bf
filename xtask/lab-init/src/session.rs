//! One command: started, fed, listened to, and waited for.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use lab_init::{Frame, FrameError, PIECE, Size, Start};
use rustix::fs::{Mode, OFlags, inotify};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group};
use rustix::pty::OpenptFlags;
use rustix::termios::{Winsize, tcsetwinsize};
use thiserror::Error;

/// What the file of a virtio-serial port is called, before the numbers of device and port. There is one.
const PORT_NAME: &str = "vport";
/// A command that cannot be started, as a shell says it.
const NOT_FOUND: u8 = 127;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a command was not run to its end.
#[derive(Debug, Error)]
pub enum SessionError {
    #[error("the virtio-serial port")]
    Port(#[source] io::Error),
    #[error("talking to xtask")]
    Frame(#[from] FrameError),
    #[error("xtask did not begin with a command")]
    NoCommand,
    #[error("a terminal for the command")]
    Terminal(#[source] io::Error),
    #[error("waiting for the command")]
    Wait(#[source] Errno),
}

/// What the threads that send share.
type Writing = Arc<Mutex<File>>;

/// The channel to xtask.
pub struct Port {
    reading: File,
    writing: Writing,
}

impl Port {
    /// Opens it as soon as the kernel has found it.
    pub fn open() -> Result<Self, SessionError> {
        let path = find_port().map_err(SessionError::Port)?;
        let reading = File::options().read(true).write(true).open(path).map_err(SessionError::Port)?;
        let writing = reading.try_clone().map_err(SessionError::Port)?;
        Ok(Self { reading, writing: Arc::new(Mutex::new(writing)) })
    }

    /// Says one thing; waits until xtask listens.
    pub fn say(&mut self, frame: &Frame) -> Result<(), FrameError> {
        say(&self.writing, frame)
    }
}

fn say(writing: &Mutex<File>, frame: &Frame) -> Result<(), FrameError> {
    frame.write(&mut *writing.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The kernel still looks for the device while init runs; that its file appears is the event.
fn find_port() -> io::Result<PathBuf> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watch, "/dev", inotify::WatchFlags::CREATE)?;
    let mut watch = File::from(watch);
    loop {
        for entry in std::fs::read_dir("/dev")?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(PORT_NAME) {
                return Ok(entry.path());
            }
        }
        let _ = watch.read(&mut [0; 4096])?;
    }
}

/// Runs what xtask asks for; answers its exit status when all of its output is on the way.
pub fn run(port: &mut Port) -> Result<u8, SessionError> {
    let Frame::Start(start) = Frame::read(&mut port.reading)? else { return Err(SessionError::NoCommand) };
    let running = match start_command(&start, &port.writing)? {
        Ok(running) => running,
        Err(error) => {
            let text = format!("lab: {}: {error}\n", start.command.first().map_or("", String::as_str));
            say(&port.writing, &Frame::Stderr(text.into_bytes()))?;
            return Ok(NOT_FOUND);
        }
    };
    let (reading, group) = (port.reading.try_clone().map_err(SessionError::Port)?, running.pid);
    let writing = Arc::clone(&port.writing);
    std::thread::spawn(move || obey(reading, &writing, group, running.stdin, running.terminal.as_ref()));
    let status = wait_for(running.pid)?;
    // Whoever is left holds the streams open, and is to end with the command like everything here. The group of
    // number 1 stands for everybody but PID 1 and the caller.
    let _ = kill_process_group(Pid::INIT, Signal::KILL);
    for pump in running.pumps {
        let _ = pump.join();
    }
    Ok(status)
}

struct Running {
    pid: Pid,
    stdin: Option<File>,
    terminal: Option<OwnedFd>,
    pumps: Vec<JoinHandle<()>>,
}

/// The inner error is the command's fault.
fn start_command(start: &Start, writing: &Writing) -> Result<io::Result<Running>, SessionError> {
    let mut words = start.command.iter();
    let mut command = Command::new(words.next().ok_or(SessionError::NoCommand)?);
    command.args(words).env_clear().env("PATH", PATH).env("HOME", "/root").env("USER", "root");
    command.envs(start.environment.iter().filter_map(|variable| variable.split_once('=')));
    let directory = Path::new(&start.directory);
    command.current_dir(if directory.is_dir() { directory } else { Path::new("/") });
    match start.terminal {
        Some(size) => on_terminal(command, size, writing).map_err(SessionError::Terminal),
        None => Ok(on_pipes(command, writing)),
    }
}

fn on_pipes(mut command: Command, writing: &Writing) -> io::Result<Running> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let mut pumps = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        pumps.push(pump(OwnedFd::from(stdout).into(), writing, Frame::Stdout));
    }
    if let Some(stderr) = child.stderr.take() {
        pumps.push(pump(OwnedFd::from(stderr).into(), writing, Frame::Stderr));
    }
    let stdin = child.stdin.take().map(|stdin| OwnedFd::from(stdin).into());
    Ok(Running { pid: Pid::from_child(&child), stdin, terminal: None, pumps })
}

fn on_terminal(mut command: Command, size: Size, writing: &Writing) -> io::Result<io::Result<Running>> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let name = rustix::pty::ptsname(&master, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(name.as_c_str(), flags, Mode::empty())?;
    resize(&master, size)?;
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    // SAFETY: the function makes two system calls and touches no memory of the parent's.
    unsafe { command.pre_exec(own_terminal) };
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Ok(Err(error)),
    };
    // It holds the terminal's other end, whose last close ends the output.
    drop(command);
    let pumps = vec![pump(master.try_clone()?.into(), writing, Frame::Stdout)];
    let stdin = Some(master.try_clone()?.into());
    Ok(Ok(Running { pid: Pid::from_child(&child), stdin, terminal: Some(master), pumps }))
}

/// Before exec: a session of its own, with standard input as its terminal.
fn own_terminal() -> io::Result<()> {
    rustix::process::setsid()?;
    Ok(rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?)
}

fn resize(terminal: impl AsFd, size: Size) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(terminal, size)?)
}

/// Sends a stream on, to its end. A terminal without a user reads as an I/O error, which is its end too.
fn pump(mut stream: File, writing: &Writing, frame: fn(Vec<u8>) -> Frame) -> JoinHandle<()> {
    let writing = Arc::clone(writing);
    std::thread::spawn(move || {
        let mut piece = vec![0; PIECE];
        loop {
            match stream.read(&mut piece) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
                Ok(length) => {
                    let bytes = piece.get(..length).unwrap_or_default().to_vec();
                    if say(&writing, &frame(bytes)).is_err() {
                        return;
                    }
                }
            }
        }
    })
}

/// Does what xtask says, until it says no more.
fn obey(mut reading: File, writing: &Writing, group: Pid, stdin: Option<File>, terminal: Option<&OwnedFd>) {
    let mut input = Some(feed(stdin, Arc::clone(writing)));
    while let Ok(frame) = Frame::read(&mut reading) {
        match frame {
            Frame::Stdin(bytes) => {
                if let Some(input) = &input {
                    let _ = input.send(bytes);
                }
            }
            Frame::StdinEnd => input = None,
            Frame::Signal(number) => {
                if let Some(signal) = Signal::from_named_raw(number.into()) {
                    let _ = kill_process_group(group, signal);
                }
            }
            Frame::Resize(size) => {
                if let Some(terminal) = terminal {
                    let _ = resize(terminal, size);
                }
            }
            Frame::Beat => {
                let _ = say(writing, &Frame::Beat);
            }
            _ => return,
        }
    }
}

/// Writes what is sent to the command, and ends its input with the sender. A command that has ended takes no more,
/// which is no error.
fn feed(mut stdin: Option<File>, writing: Writing) -> Sender<Vec<u8>> {
    let (sender, pieces) = channel::<Vec<u8>>();
    std::thread::spawn(move || {
        for piece in pieces {
            if stdin.as_mut().is_some_and(|stdin| stdin.write_all(&piece).is_err()) {
                stdin = None;
            }
            let _ = say(&writing, &Frame::Taken);
        }
    });
    sender
}

/// Waits for the command; whoever else ends meanwhile became PID 1's child by the death of its parent.
fn wait_for(command: Pid) -> Result<u8, SessionError> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == command => {
                let code = status.exit_status().or_else(|| status.terminating_signal().map(|n| 128 + n));
                return Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX));
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(SessionError::Wait(errno)),
        }
    }
}
