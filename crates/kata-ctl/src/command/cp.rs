//! `cp`: files between the host and a container, as a tar stream through `tar` in the container.
//!
//! ```text
//!   POD:PATH ─▶ host    exec tar -c ─▶ FIFO ─▶ archive ─▶ a directory of our own beside DST ─▶ rename
//!   host ─▶ POD:PATH    archive ─▶ FIFO ─▶ exec tar -x
//! ```
//!
//! A container is not trusted. What it sends is unpacked where nobody else writes, below a directory handle that no path
//! and no link leads out of, and takes its name at the end.

mod archive;

use std::ffi::OsStr;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::exec::begin;
use super::{Outcome, exit_code};
use crate::bundle;
use crate::cli::CpArgs;
use crate::failure::{Failure, NOT_FOUND};
use crate::pod::{
    self, CallError, Client, FifoReader, FifoWriter, PodDir, Signals, Streams, Wanted, random_name,
};

/// How long an interrupted copy may take to clean up.
const CLEANUP: Duration = Duration::from_secs(3);
/// What a killed command ends with.
const KILLED: u32 = 137;
/// Most of tar's complaints that are kept.
const WORDS_LIMIT: u64 = 16 << 10;

/// One end of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Host(PathBuf),
    Pod { name: String, path: String },
}

impl Place {
    /// As in `scp`: a colon before the first slash parts pod and path.
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some((name, path)) if !name.is_empty() && !name.contains('/') => {
                Self::Pod { name: name.to_owned(), path: path.to_owned() }
            }
            _ => Self::Host(text.into()),
        }
    }
}

/// Copies.
pub async fn run(args: &CpArgs) -> Outcome {
    let mut signals = Signals::catch()?;
    match (Place::parse(&args.from), Place::parse(&args.to)) {
        (Place::Pod { name, path }, Place::Host(to)) => {
            let container = Container::open(&name, args.container.as_deref()).await?;
            out_of(&container, &path, &to, &mut signals).await
        }
        (Place::Host(from), Place::Pod { name, path }) => {
            let container = Container::open(&name, args.container.as_deref()).await?;
            into(&container, &from, &path, &mut signals).await
        }
        (Place::Host(_), Place::Host(_)) => Err(usage("neither is POD:PATH: use cp for files of the host")),
        (Place::Pod { .. }, Place::Pod { .. }) => Err(usage("both are POD:PATH: copy to the host first")),
    }
}

fn usage(text: &str) -> Failure {
    Failure { code: Some(2), ..Failure::text(text) }
}

async fn out_of(container: &Container, path: &str, to: &Path, signals: &mut Signals) -> Outcome {
    let (dir, name) = split(path)?;
    let wanted = if to.is_dir() { to.join(name) } else { to.to_owned() };
    if wanted.file_name().is_none() {
        return Err(Failure::text(format!("{}: not a name to copy to", wanted.display())));
    }
    let command = ["tar", "-c", "-f", "-", "-C", dir, "--", name];
    let name = name.to_owned();
    let copied =
        container.run(&command, signals, false, move |_, output| archive::unpack(output, &name, &wanted));
    copied.await
}

async fn into(container: &Container, from: &Path, path: &str, signals: &mut Signals) -> Outcome {
    std::fs::symlink_metadata(from)
        .map_err(|error| Failure::text(format!("cannot read {}: {error}", from.display())))?;
    let is_dir = path.ends_with('/') || path.is_empty() || container.is_dir(path, signals).await?;
    let (dir, name) = match is_dir {
        true => {
            let real = std::path::absolute(from)?;
            let name = real.file_name().and_then(OsStr::to_str).map(str::to_owned);
            (if path.is_empty() { "." } else { path }, name.unwrap_or_else(|| "root".to_owned()))
        }
        false => {
            let (dir, name) = split(path)?;
            (dir, name.to_owned())
        }
    };
    let from = from.to_owned();
    let command = ["tar", "-x", "-f", "-", "-C", dir];
    container.run(&command, signals, true, move |input, _| archive::pack(&from, &name, input)).await
}

/// Directory and name of a path in a container.
fn split(path: &str) -> Result<(&str, &str), Failure> {
    let trimmed = path.trim_end_matches('/');
    let (dir, name) = match trimmed.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((dir, name)) => (dir, name),
        None => (".", trimmed),
    };
    match name {
        "" | "." | ".." => {
            Err(Failure::text(format!("{path:?} has no name of its own: name what is to be copied")))
        }
        name => Ok((dir, name)),
    }
}

/// A container that commands are run in.
struct Container {
    pod: PodDir,
    client: Client,
    id: String,
    bundle: PathBuf,
}

impl Container {
    async fn open(name: &str, wanted: Option<&str>) -> Result<Self, Failure> {
        let pod = PodDir::alive(name)?;
        let client = Client::connect(&pod).await?;
        let id = pod::choose(&client, &client.inspect().await?, wanted).await?;
        let bundle = client.bundle(&id).await?;
        Ok(Self { pod, client, id, bundle })
    }

    async fn is_dir(&self, path: &str, signals: &mut Signals) -> Result<bool, Failure> {
        let tested = self.exec(&["test", "-d", path], signals, false, |_, _| Ok(())).await;
        // Without such a command it counts as a name to be made; tar tells if it is not.
        Ok(tested.is_ok_and(|ended| ended.code == 0))
    }

    /// Runs tar beside `work`, which has the stream.
    async fn run(
        &self,
        command: &[&str],
        signals: &mut Signals,
        input: bool,
        work: impl FnOnce(Option<FifoWriter>, Option<FifoReader>) -> Result<(), archive::ArchiveError>
        + Send
        + 'static,
    ) -> Outcome {
        let ended = match self.exec(command, signals, input, work).await {
            Err(failure) if failure.code == Some(NOT_FOUND) => {
                let text = format!(
                    "container {} has no tar, which cp needs; share a directory (kata-ctl run -v)",
                    self.id
                );
                return Err(Failure::text(text));
            }
            ended => ended?,
        };
        // What tar says explains what the stream lacked.
        match (ended.code, ended.work, ended.words.trim()) {
            (0, Ok(()), "") => Ok(0),
            (0, Ok(()), words) => {
                eprintln!("{words}");
                Ok(0)
            }
            (0, Err(error), _) => Err(error.into()),
            (KILLED, Err(error), "") => Err(error.into()),
            (_, _, words) if !words.is_empty() => {
                Err(Failure::text(format!("in container {}: {words}", self.id)))
            }
            (code, _, _) => Err(Failure::text(format!("tar in container {} ended with {code}", self.id))),
        }
    }

    async fn exec(
        &self,
        command: &[&str],
        signals: &mut Signals,
        input: bool,
        work: impl FnOnce(Option<FifoWriter>, Option<FifoReader>) -> Result<(), archive::ArchiveError>
        + Send
        + 'static,
    ) -> Result<Ended, Failure> {
        let mut process = bundle::process_of(&self.bundle)?;
        process.set_args(Some(command.iter().map(|word| (*word).to_owned()).collect()));
        process.set_terminal(Some(false)).set_console_size(None);
        let id = random_name()?;
        let wanted = Wanted { stdin: input, stderr: true };
        let mut streams = Streams::make(&self.pod.io(), &format!("{id}-"), wanted)?;
        let exec = begin(&self.client, &self.id, &id, &process, &streams).await;
        let exec = exec.map_err(CallError::into_start_failure)?;
        let (stdin, stdout, stderr) = streams.ends();
        // What writes ends its stream by ending; what reads is ended by tar.
        let work = tokio::task::spawn_blocking(move || work(stdin, stdout));
        let words = tokio::task::spawn_blocking(move || words(stderr));
        tokio::pin!(work);
        let waited = exec.wait();
        tokio::pin!(waited);
        let mut done = None;
        let code = loop {
            tokio::select! {
                code = &mut waited => break code?,
                finished = &mut work, if done.is_none() => {
                    // A stream that is not to be read on has a writer that would wait for ever.
                    if !input && !matches!(finished, Ok(Ok(()))) {
                        let _ = exec.kill(9, false).await;
                    }
                    done = Some(finished);
                    if input && let Err(error) = exec.close_stdin().await {
                        tracing::debug!("the input was not closed: {error}");
                    }
                }
                signal = signals.ending() => {
                    let _ = exec.kill(9, false).await;
                    // With tar the stream ends, and what was begun here is removed.
                    streams.end_unopened();
                    let _ = tokio::time::timeout(CLEANUP, &mut work).await;
                    return Err(Failure::silent(exit_code(128 + signal)));
                }
            }
        };
        streams.end_unopened();
        let joined = match done {
            Some(done) => done,
            // Nobody reads the rest, and what writes it would wait for that for ever: it ends with this process.
            None if input => Ok(Ok(())),
            None => work.await,
        };
        let words = words.await.map_err(io::Error::other)?;
        if let Err(error) = exec.delete().await {
            tracing::debug!("the exec was not deleted: {error}");
        }
        Ok(Ended { code, work: joined.map_err(io::Error::other)?, words })
    }
}

/// How a command in a container, and the work beside it, ended.
struct Ended {
    code: u32,
    work: Result<(), archive::ArchiveError>,
    /// What it wrote to its error output.
    words: String,
}

fn words(stderr: Option<FifoReader>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut stderr) = stderr {
        // What could be read counts, and the rest is read away, so as not to hold the process up.
        let _ = stderr.by_ref().take(WORDS_LIMIT).read_to_end(&mut bytes);
        let _ = io::copy(&mut stderr, &mut io::sink());
    }
    String::from_utf8_lossy(&bytes).chars().filter(|c| !c.is_control() || *c == '\n').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_before_the_first_slash_parts_pod_and_path() {
        let pod = |name: &str, path: &str| Place::Pod { name: name.to_owned(), path: path.to_owned() };
        assert_eq!(Place::parse("web:/etc/hosts"), pod("web", "/etc/hosts"));
        assert_eq!(Place::parse("web:"), pod("web", ""));
        for host in ["/etc/hosts", "./a:b", "file", ":x"] {
            assert_eq!(Place::parse(host), Place::Host(host.into()), "{host}");
        }
    }

    #[test]
    fn paths_are_parted_into_directory_and_name() {
        for (path, parts) in [
            ("/etc/hosts", ("/etc", "hosts")),
            ("/etc/", ("/", "etc")),
            ("a/b/", ("a", "b")),
            ("a", (".", "a")),
        ] {
            assert_eq!(split(path).unwrap(), parts, "{path}");
        }
        for path in ["/", "", ".", "/a/..", "a/."] {
            assert!(split(path).is_err(), "{path}");
        }
    }
}
