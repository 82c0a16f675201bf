//! PID 1 of the lab's machine: makes a Debian of what xtask shares, runs one command in it, says how it ended.
//!
//! ```text
//!  kernel ──▶ /init ── world: root + tmpfs = overlay, source tree, /proc, /sys, cgroup2, modules
//!               │
//!               ├── session: the port, the command, its streams, its end         (the machine is then killed)
//!               └── with systemd: exec /sbin/init, which starts `/run/lab/init serve` as a service
//! ```
//!
//! Nothing is undone at the end: nothing outlives the machine.

mod session;
mod world;

use std::process::ExitCode;

use lab_init::{Frame, FrameError};

/// Why no command can be run.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error("the machine's world cannot be made")]
    World(#[from] world::WorldError),
    #[error("the session with xtask failed")]
    Session(#[from] session::SessionError),
    #[error("xtask does not listen")]
    Channel(#[from] FrameError),
}

fn main() -> ExitCode {
    let service = std::env::args().nth(1).is_some_and(|word| word == "serve");
    let result = if service { serve() } else { boot() };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

fn boot() -> Result<(), InitError> {
    world::enter()?;
    if world::wants_systemd() { Ok(world::become_systemd()?) } else { serve() }
}

/// Comes back only with an error: after the exit status the machine waits to be killed.
fn serve() -> Result<(), InitError> {
    world::load_modules()?;
    let mut port = session::Port::open()?;
    port.say(&Frame::Ready)?;
    let status = session::run(&mut port)?;
    port.say(&Frame::Exit(status))?;
    loop {
        std::thread::park();
    }
}

/// To xtask if it can be reached, and on the console, which xtask shows when the machine ends without an exit status.
/// The end of PID 1 is the end of the machine.
fn report(error: &InitError) {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |cause| cause.source());
    let text = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
    eprintln!("lab-init: {text}");
    if let Ok(mut port) = session::Port::open() {
        let _ = port.say(&Frame::Fault(text));
    }
}
