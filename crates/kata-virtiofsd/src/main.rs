//! Serves one directory to one virtual machine over vhost-user, from inside a sandbox.
//!
//! ```text
//!  kata-virtiofsd ──fork──▶ server, PID 1 of its own world
//!   (waits, has no             mount ns: the shared directory is /      slave: later binds arrive
//!    capability)               pid, net, ipc ns: empty
//!                              user ns: identity map, 8 capabilities that mean nothing outside
//!                              seccomp: the calls that serving files needs
//! ```
//!
//! The protocol and the file system are the `virtiofsd` crate's. What the sandbox costs the guest: it can make no
//! device node, set no `trusted.*` attribute and use no file handles, because those need privileges of the
//! host's user namespace. `chown`, set-id bits, whiteouts (0/0 devices), hard links and any uid work.

mod bounded;
mod sandbox;
mod serve;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

/// Command line of `kata-virtiofsd`.
#[derive(Debug, Parser)]
#[command(version, about = "Serve a directory to a virtual machine over vhost-user")]
struct Cli {
    /// Listening unix socket, inherited; one connection is served.
    #[arg(long, value_name = "FD")]
    listen_fd: i32,
    /// Directory to serve. Mounts that appear below it later are served too, if it is a shared mount.
    #[arg(long, value_name = "DIR")]
    shared_dir: PathBuf,
    /// How long the guest may trust what it has read.
    #[arg(long, value_enum, default_value_t = Cache::Auto)]
    cache: Cache,
    /// Worker threads; 0 serves in the event loop, which answers a single request soonest.
    #[arg(long, default_value_t = 0)]
    thread_pool_size: usize,
    /// Let the guest see and set extended attributes.
    #[arg(long)]
    xattr: bool,
    /// Let the guest keep writes back; only safe if nothing else writes the directory.
    #[arg(long)]
    writeback: bool,
    /// Files and directories that the guest may keep in mind without using them. Each takes a descriptor and 2 to 2.5 KiB
    /// of the host's memory.
    #[arg(long, value_name = "COUNT", default_value_t = 16_384)]
    known_files: usize,
    /// What to do when the sandbox cannot be made.
    #[arg(long, value_enum, default_value_t = SandboxMode::Namespaces)]
    sandbox: SandboxMode,
    /// error, warn, info, debug or trace.
    #[arg(long, default_value = "warn")]
    log_level: tracing::Level,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Cache {
    /// Ask the host each time.
    Never,
    /// Trust metadata, not data.
    Metadata,
    /// Trust for a second; data as long as size and time of change stay the same.
    Auto,
    /// Trust for a day: nothing but the guest may write the directory.
    Always,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SandboxMode {
    /// Own mount, pid, net, ipc and user namespaces. Refuse to serve without them.
    Namespaces,
    /// No sandbox: a guest that breaks the server has the server's rights on the host.
    None,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_max_level(cli.log_level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .init();
    match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode, serve::ServeError> {
    let listener = serve::adopt_listener(cli.listen_fd)?;
    // The last moment: /proc/sys and the right to raise limits are gone inside.
    let open_files = serve::raise_open_files()?;
    match cli.sandbox {
        SandboxMode::Namespaces => match sandbox::enter(&cli.shared_dir)? {
            sandbox::Side::Outside(code) => Ok(code),
            sandbox::Side::Inside(proc) => serve::serve(listener, cli, "/", Some(proc), open_files),
        },
        SandboxMode::None => {
            tracing::warn!("serving without a sandbox, as asked by --sandbox none");
            serve::serve(listener, cli, &cli.shared_dir.to_string_lossy(), None, open_files)
        }
    }
}

/// An error and its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
