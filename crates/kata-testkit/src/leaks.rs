//! What a pod may have left on the host: processes, mounts, sockets, files.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A process of a pod.
pub struct Process {
    /// Its id on the host.
    pub pid: u32,
    /// Name of its program.
    pub name: String,
}

/// Processes that name `dir` in their arguments or run under one of `ids`. The caller's own are not among them.
pub fn processes(dir: &Path, ids: &Range<u32>) -> Vec<Process> {
    let needle = dir.to_string_lossy().into_owned();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(exe) = std::fs::read_link(entry.path().join("exe")) else { continue };
        let arguments = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        let mentions = |text: &[u8]| String::from_utf8_lossy(text).contains(&needle);
        let owned = entry.metadata().is_ok_and(|meta| ids.contains(&meta.uid()));
        let ours = owned || mentions(&arguments) || mentions(&environment);
        if ours && pid != std::process::id() {
            let name = exe.file_name().unwrap_or_default().to_string_lossy().replace(" (deleted)", "");
            found.push(Process { pid, name });
        }
    }
    found
}

/// Everything of a pod that is still there, a line each.
pub fn find(dir: &Path, run: &Path, state: &Path, ids: &Range<u32>) -> Vec<String> {
    let mut found: Vec<String> =
        processes(dir, ids).iter().map(|p| format!("process {} {}", p.pid, p.name)).collect();
    let mentioning = |file: &str, what: &str, field: usize| -> Vec<String> {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.split_whitespace().nth(field))
            .filter(|path| Path::new(path).starts_with(dir))
            .map(|path| format!("{what} {path}"))
            .collect()
    };
    found.extend(mentioning("/proc/self/mountinfo", "mount", 4));
    found.extend(mentioning("/proc/net/unix", "socket", 7));
    for root in [run, &state.join("pods")] {
        found.extend(
            std::fs::read_dir(root)
                .into_iter()
                .flatten()
                .flatten()
                .filter(|entry| entry.file_name() != ".uids" || has_entries(&entry.path()))
                .map(|entry| format!("file {}", entry.path().display())),
        );
    }
    found
}

fn has_entries(dir: &Path) -> bool {
    std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}

/// Ends and unmounts what [`find`] found, so that one failed test does not disturb the next.
pub fn clear(dir: &Path, ids: &Range<u32>) {
    for process in processes(dir, ids) {
        if let Some(pid) = i32::try_from(process.pid).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
    unmount(dir);
}

/// Unmounts everything below `dir`, the last mounted first.
pub fn unmount(dir: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for path in mounts.lines().rev().filter_map(|line| line.split_whitespace().nth(4)) {
        if Path::new(path).starts_with(dir) {
            let _ = rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH);
        }
    }
}
