//! The last starts of this host's pods, kept for `kata-ctl analyze` beyond the pods' own lives.
//!
//! `<state_dir>/starts/<created_at_ms>-<id>.json` has the keys of `state.json` that tell of a start: `id`, `created_at_ms`,
//! `hypervisor`, `accelerator`, `choice`, `guest_kernel`, `agent_version`, `timeline` and `fault`. It is written once the pod's
//! first container runs, or the pod ended without. The 64 newest are kept.

use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use kata_sandbox::{Event, Inspection, Sandbox, Stage};
use serde::Serialize;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use crate::spans;

/// Starts that are kept.
const KEPT: usize = 64;

#[derive(Serialize)]
struct Start<'a> {
    version: u32,
    id: &'a str,
    created_at_ms: u64,
    hypervisor: &'a str,
    accelerator: &'a str,
    choice: &'a str,
    guest_kernel: &'a str,
    agent_version: &'a str,
    timeline: &'a [Stage],
    fault: Option<&'a str>,
}

/// Keeps the start of `pod` in `dir`, once it is over, and tells the tracer where there is one. `zero` is the timeline's. A
/// pod lives without that, too.
pub(crate) fn keep(pod: &Sandbox, dir: PathBuf, zero: Instant) {
    let (pod, events) = (pod.clone(), pod.events());
    tokio::spawn(async move {
        until_started(events).await;
        let pod = pod.inspect().await;
        if let Err(error) = write(&pod, &dir) {
            tracing::warn!(dir = %dir.display(), %error, "the pod's start is not kept");
        }
        if let Some(tracer) = spans::tracer() {
            tracer.start(&pod, zero);
        }
    });
}

async fn until_started(mut events: Receiver<Event>) {
    loop {
        match events.recv().await {
            Ok(Event::Started { process }) if process.exec.is_none() => return,
            Ok(Event::Stopped { .. }) | Err(RecvError::Closed) => return,
            Ok(_) | Err(RecvError::Lagged(_)) => {}
        }
    }
}

fn write(pod: &Inspection, dir: &Path) -> io::Result<()> {
    let start = Start {
        version: 1,
        id: &pod.id,
        created_at_ms: pod.created_at_ms,
        hypervisor: &pod.hypervisor,
        accelerator: &pod.accelerator,
        choice: &pod.choice,
        guest_kernel: &pod.guest_kernel,
        agent_version: &pod.agent_version,
        timeline: &pod.timeline,
        fault: pod.fault.as_deref(),
    };
    let mut text = serde_json::to_vec(&start)?;
    text.push(b'\n');
    DirBuilder::new().mode(0o700).recursive(true).create(dir)?;
    // As many digits as until the year 5138, so that names sort by age.
    let path = dir.join(format!("{:014}-{}.json", pod.created_at_ms, pod.id));
    let draft = path.with_extension("new");
    File::create(&draft)?.write_all(&text)?;
    std::fs::rename(&draft, &path)?;
    prune(dir)
}

/// Removes the oldest. Others may do the same at the same time.
fn prune(dir: &Path) -> io::Result<()> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir)?.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
    names.sort();
    for name in names.iter().rev().skip(KEPT) {
        match std::fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_starts_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("starts");
        for created_at_ms in 0..u64::try_from(KEPT).unwrap() + 3 {
            let pod = Inspection { id: "p".to_owned(), created_at_ms, ..Inspection::default() };
            write(&pod, &dir).unwrap();
        }
        let mut names: Vec<_> = std::fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!((names.len(), names[0].as_str()), (KEPT, "00000000000003-p.json"));
        let text = std::fs::read_to_string(dir.join(&names[0])).unwrap();
        assert!(text.contains("\"created_at_ms\":3,"), "{text}");
    }
}
