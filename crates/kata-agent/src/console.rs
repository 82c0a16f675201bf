//! The debug console: a shell on a terminal for each connection, where the administrator enabled it and the image has
//! a shell.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::process::{Signal, kill_process_group, setsid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use tokio::io::Interest;

use crate::reaper::Reaper;
use crate::stream;

const SHELLS: [&str; 2] = ["/bin/bash", "/bin/sh"];

/// The image's shell, if it has one.
#[must_use]
pub fn shell() -> Option<&'static str> {
    SHELLS.into_iter().find(|shell| Path::new(shell).exists())
}

/// Serves one connection, until the shell ends or the other side goes away.
///
/// # Errors
/// A terminal or a shell that cannot be had.
pub async fn serve(reaper: &Reaper, shell: &str, peer: OwnedFd) -> io::Result<()> {
    let (master, slave) = open_terminal()?;
    let mut command = Command::new(shell);
    command
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("TERM", "linux")
        .env("HOME", "/")
        .current_dir("/");
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    // SAFETY: both calls are async-signal-safe and touch no memory of the parent's.
    unsafe { command.pre_exec(own_terminal) };
    let (pid, exit) = reaper.spawn(&mut command)?;
    drop(command);
    let output = stream::watch(master.try_clone()?, Interest::READABLE)?;
    let input = stream::watch(master, Interest::WRITABLE)?;
    let peer_in = stream::watch(peer.try_clone()?, Interest::READABLE)?;
    let mut copying = tokio::spawn(stream::output(output, peer));
    tokio::select! {
        // What the shell wrote last is on its way until the terminal is at its end.
        done = &mut copying => done??,
        _ = stream::input(&peer_in, &input) => {
            // Nobody is there any more: whoever held the terminal is hung up on.
            let _ = kill_process_group(pid, Signal::HUP);
            drop(input);
        }
    }
    exit.wait().await;
    Ok(())
}

/// A new pseudo terminal of the guest's own: master, slave.
pub(crate) fn open_terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    Ok((master, slave))
}

fn own_terminal() -> io::Result<()> {
    setsid()?;
    Ok(rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn a_shell_has_a_terminal_of_its_own_and_its_last_words_arrive() {
        let reaper = Reaper::new();
        tokio::spawn(reaper.clone().run());
        let (near, mut far) = UnixStream::pair().unwrap();
        let client = tokio::task::spawn_blocking(move || {
            far.write_all(b"tty; exit\n").unwrap();
            let mut text = String::new();
            far.read_to_string(&mut text).unwrap();
            text
        });
        serve(&reaper, shell().unwrap(), near.into()).await.unwrap();
        let text = client.await.unwrap();
        assert!(text.contains("/dev/pts/"), "{text:?}");
    }

    #[tokio::test]
    async fn a_client_that_leaves_ends_its_shell() {
        let reaper = Reaper::new();
        tokio::spawn(reaper.clone().run());
        let (near, far) = UnixStream::pair().unwrap();
        drop(far);
        let served = serve(&reaper, "/bin/sh", near.into());
        let _ = tokio::time::timeout(std::time::Duration::from_secs(20), served)
            .await
            .expect("the shell lives on");
    }
}
