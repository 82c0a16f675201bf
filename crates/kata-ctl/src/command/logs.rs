//! `logs`: a container's output as it is, or what the parts of a pod said, in the order of time.
//!
//! ```text
//!   container ─▶ stdout.log, stderr.log                             without --source
//!   owner ───────┐
//!   QEMU, vsock, file server ─┤
//!   guest console ────────────┼─▶ owner.log, each line with its time and where it is from     with --source
//!   agent ────────────────────┘
//! ```

mod lines;
mod watch;

use std::fs::File;
use std::io;
use std::path::Path;

use super::Outcome;
use crate::cli::{ConsoleArgs, LogsArgs, SourceName};
use crate::failure::Failure;
use crate::output;
use crate::pod::{PodDir, dump};
use lines::{Lines, Source};
use watch::Watch;

/// Prints what was asked for; with `follow`, what is added until the pod's owner ends.
pub fn run(args: &LogsArgs) -> Outcome {
    let pod = PodDir::existing(&args.name)?;
    if args.source.is_empty() {
        return container(&pod, args.follow);
    }
    let sources: Vec<Source> = args.source.iter().flat_map(|name| sources(*name)).copied().collect();
    told(&pod, &sources, args.follow, |line| {
        if args.json { output::line(line) } else { output::print(&line.as_text()) }
    })
}

/// `console`: the guest's console alone.
pub fn console(args: &ConsoleArgs) -> Outcome {
    let pod = PodDir::existing(&args.pod)?;
    told(&pod, &[Source::Console], args.follow, |line| {
        if args.json { output::line(line) } else { output::print(&format!("{}\n", line.message)) }
    })
}

fn sources(name: SourceName) -> &'static [Source] {
    match name {
        SourceName::Owner => &[Source::Owner],
        SourceName::Vmm => &[Source::Vmm],
        SourceName::Console => &[Source::Console],
        SourceName::Agent => &[Source::Agent],
        SourceName::Guest => &[Source::Console, Source::Agent],
        SourceName::All => &[Source::Owner, Source::Vmm, Source::Console, Source::Agent],
    }
}

/// The lines of `sources` in the owner's log, which is in the order of time.
fn told(
    pod: &PodDir,
    sources: &[Source],
    follow: bool,
    tell: impl Fn(&lines::Line) -> Result<(), Failure>,
) -> Outcome {
    let path = pod.owner_log();
    let file = open(&path)?
        .ok_or_else(|| Failure::text(format!("pod {} has no log at {}", pod.name, path.display())))?;
    let mut lines = Lines::new(file);
    let dump = |lines: &mut Lines, last: bool| -> Result<(), Failure> {
        for line in lines.read(last)? {
            if sources.contains(&line.source) {
                tell(&line)?;
            }
        }
        Ok(())
    };
    if follow && let Some(watch) = Watch::new(pod, &[&path])? {
        watch.each(|| dump(&mut lines, false))?;
    }
    dump(&mut lines, true)?;
    Ok(0)
}

/// Prints both logs of the container.
fn container(pod: &PodDir, follow: bool) -> Outcome {
    let paths = [pod.stdout_log(), pod.stderr_log()];
    let logs = Logs { stdout: open(&pod.stdout_log())?, stderr: open(&pod.stderr_log())? };
    if logs.stdout.is_none() && logs.stderr.is_none() {
        let text = match pod.namespace() {
            Some(_) => format!(
                "pod {} is containerd's, which has its output; --source all shows the pod's own logs",
                pod.name
            ),
            None => format!("pod {} keeps no output: it was not run with -d, so its client got it", pod.name),
        };
        return Err(Failure::text(text));
    }
    if follow && let Some(watch) = Watch::new(pod, &[&paths[0], &paths[1]])? {
        watch.each(|| Ok(logs.dump()?))?;
    }
    logs.dump()?;
    Ok(0)
}

struct Logs {
    stdout: Option<File>,
    stderr: Option<File>,
}

impl Logs {
    /// Prints what has been added since the last time.
    fn dump(&self) -> io::Result<()> {
        if let Some(file) = &self.stdout {
            dump(file, rustix::stdio::stdout())?;
        }
        if let Some(file) = &self.stderr {
            dump(file, rustix::stdio::stderr())?;
        }
        Ok(())
    }
}

fn open(path: &Path) -> Result<Option<File>, Failure> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::text(format!("cannot read {}: {error}", path.display()))),
    }
}
