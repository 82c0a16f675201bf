//! `kill`: a signal to a container's first process; or the end of what dead owners have left.

use std::path::Path;
use std::time::Duration;

use kata_config::paths;
use serde::Serialize;

use super::Outcome;
use crate::cli::KillArgs;
use crate::failure::{Failure, chain};
use crate::output;
use crate::pod::{Client, PodDir, PodState, choose, delete};

/// Does one or the other.
pub async fn run(args: &KillArgs) -> Outcome {
    let Some(name) = &args.name else { return reap(args).await };
    let pod = PodDir::alive(name)?;
    let client = Client::connect(&pod).await?;
    let process = match &args.container {
        Some(wanted) => client.init_of(&choose(&client, &client.inspect().await?, Some(wanted)).await?),
        None => client.init(),
    };
    process.kill(args.signal, false).await?;
    Ok(0)
}

/// A pod whose owner is dead.
#[derive(Debug, Serialize)]
struct Orphan {
    pod: String,
    /// Processes, mounts, files and directories that its leak record names.
    recorded: usize,
    /// Why it is still there; `null` once it is not.
    error: Option<String>,
    reaped: bool,
}

/// A process that looks like a pod's, of a pod that there is no directory of.
#[derive(Debug, Serialize)]
struct Stray {
    pid: u32,
    pod: String,
    command: String,
}

/// Works off the leak record of every pod whose owner is dead.
async fn reap(args: &KillArgs) -> Outcome {
    let mut orphans = Vec::new();
    for pod in PodDir::all()? {
        match is_orphan(&pod).await {
            Ok(true) => orphans.push(reaped(&pod, args.dry_run).await),
            Ok(false) => {}
            // One that cannot be judged is left alone, and keeps no other.
            Err(failure) => {
                let error = failure.error.map(|error| chain(&*error));
                orphans.push(Orphan { pod: pod.name.clone(), recorded: 0, reaped: false, error });
            }
        }
    }
    let strays = strays();
    let failed = !strays.is_empty() || orphans.iter().any(|orphan| orphan.error.is_some());
    if args.json {
        output::document(&serde_json::json!({ "orphans": orphans, "strays": strays }))?;
    } else {
        output::print(&as_text(&orphans, &strays, args.dry_run))?;
    }
    Ok(u8::from(failed))
}

/// A pod that is over has no owner, and is no orphan: it waits for `rm`.
async fn is_orphan(pod: &PodDir) -> Result<bool, Failure> {
    Ok(match PodState::load(&pod.run_dir)? {
        Some(state) => !state.is_stopped() && !state.owner_lives(),
        // One that is about to write its state answers; and one that is about to answer was made just now.
        None => !is_young(&pod.run_dir) && Client::connect(pod).await.is_err(),
    })
}

/// Whether a pod's directory is younger than any owner takes to listen. One whose age nobody knows counts as such.
fn is_young(run_dir: &Path) -> bool {
    let age =
        std::fs::metadata(run_dir).and_then(|dir| dir.modified()).ok().and_then(|made| made.elapsed().ok());
    age.is_none_or(|age| age < YOUTH)
}

async fn reaped(pod: &PodDir, dry_run: bool) -> Orphan {
    let recorded = std::fs::read_to_string(pod.leak_record()).map_or(0, |text| text.lines().count());
    let result = if dry_run { Ok(()) } else { delete(&pod.name).await };
    let error = result.err().map(|error| chain(&error));
    Orphan { pod: pod.name.clone(), recorded, reaped: !dry_run && error.is_none(), error }
}

/// See [`is_young`].
const YOUTH: Duration = Duration::from_secs(60);

/// Programs that serve a pod.
const PROGRAMS: [&str; 4] = ["kata-vmm", "kata-virtiofsd", "containerd-shim-kata-v2", "qemu-system-"];

/// Processes that name the directory of a pod that is gone. Without a record nobody can say that they are a pod's for
/// sure: they are told of, not killed.
fn strays() -> Vec<Stray> {
    let run_dir = paths::run_dir();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words: Vec<String> =
            line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let program = words.first()?.rsplit('/').next()?.to_owned();
        if !PROGRAMS.iter().any(|name| program.starts_with(name)) {
            return None;
        }
        let pod = words.iter().find_map(|word| pod_in(word, &run_dir.to_string_lossy()))?;
        let gone = PodDir::of(&pod).is_ok_and(|pod| !pod.run_dir.exists());
        gone.then_some(Stray { pid, pod, command: program })
    })
    .collect()
}

/// The pod whose directory a word of a command line names.
fn pod_in(word: &str, run_dir: &str) -> Option<String> {
    let (_, rest) = word.split_once(run_dir)?;
    let name: String = rest.strip_prefix('/')?.chars().take_while(|c| !"/,:=".contains(*c)).collect();
    (!name.is_empty()).then_some(name)
}

fn as_text(orphans: &[Orphan], strays: &[Stray], dry_run: bool) -> String {
    let mut text = String::new();
    for orphan in orphans {
        let what = match (&orphan.error, dry_run) {
            (Some(error), _) => format!("not reaped: {error}"),
            (None, true) => format!("would be reaped ({} entries in its leak record)", orphan.recorded),
            (None, false) => format!("reaped ({} entries in its leak record)", orphan.recorded),
        };
        text.push_str(&format!("{}: {what}\n", orphan.pod));
    }
    for stray in strays {
        text.push_str(&format!(
            "process {} ({}) names pod {}, of which nothing is left: look at it, and end it with kill {}\n",
            stray.pid, stray.command, stray.pod, stray.pid
        ));
    }
    if text.is_empty() { "no orphans\n".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_the_directory_it_names() {
        let run = "/run/kata";
        assert_eq!(pod_in("socket,id=v,path=/run/kata/web/vsock.vhost,x=1", run).as_deref(), Some("web"));
        assert_eq!(pod_in("/run/kata/web", run).as_deref(), Some("web"));
        assert_eq!(pod_in("/run/katarina/web", run), None);
        assert_eq!(pod_in("/run/kata/", run), None);
    }
}
