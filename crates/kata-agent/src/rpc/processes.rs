//! `GetDiagnosticData`: the processes of the guest, for those who look into a pod.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::Path;

use kata_api::agent::GetDiagnosticDataRequest;
use kata_api::{GuestProcess, PROCESSES};
use rustix::param::{clock_ticks_per_second, page_size};

use super::agent::Agent;
use super::error::RpcError;
use crate::aside;

/// Most processes that are told of.
const MOST: usize = 4096;
/// Most bytes of a command line that are told.
const COMMAND_MAX: u64 = 1024;

/// Answers for the one kind of data that there is.
///
/// # Errors
/// [`RpcError::Unsupported`] for another kind; [`RpcError::NoContainer`].
pub async fn diagnostic(agent: &Agent, request: &GetDiagnosticDataRequest) -> Result<String, RpcError> {
    if request.log_type != PROCESSES {
        return Err(RpcError::Unsupported("this kind of diagnostic data"));
    }
    let wanted = Some(request.container_id.as_str()).filter(|id| !id.is_empty());
    let owners = owners(agent, wanted).await?;
    let owned_only = wanted.is_some();
    // Reading another's command line may wait for its memory: not on the thread that serves everybody else.
    let list = move || list(Path::new("/proc"), &owners, owned_only);
    let found = aside::within(aside::BOUND, "listing the processes of the guest", list).await?;
    serde_json::to_string(&found).map_err(|error| RpcError::State(error.to_string()))
}

/// The container of each process that is in one.
async fn owners(agent: &Agent, wanted: Option<&str>) -> Result<HashMap<u32, String>, RpcError> {
    let ids = match wanted {
        Some(id) => {
            agent.container(id)?;
            vec![id.to_owned()]
        }
        None => agent.container_ids(),
    };
    let mut owners = HashMap::new();
    for id in ids {
        let pids = match agent.engine.pids(&id).await {
            Ok(pids) => pids,
            Err(error) if wanted.is_some() => return Err(error.into()),
            // One in the making, or one that is going.
            Err(_) => continue,
        };
        owners.extend(pids.into_iter().map(|pid| (pid.as_raw_nonzero().get().unsigned_abs(), id.clone())));
    }
    Ok(owners)
}

/// The processes of `proc`, by pid.
fn list(proc: &Path, owners: &HashMap<u32, String>, owned_only: bool) -> Vec<GuestProcess> {
    let uptime_us = std::fs::read_to_string(proc.join("uptime")).ok().and_then(|text| {
        let (whole, hundredths) = text.split_whitespace().next()?.split_once('.')?;
        Some(whole.parse::<u64>().ok()? * 1_000_000 + hundredths.parse::<u64>().ok()? * 10_000)
    });
    let entries = std::fs::read_dir(proc).into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    let wanted = pids.into_iter().filter(|pid| !owned_only || owners.contains_key(pid));
    // One that ends meanwhile is none.
    let process = |pid| {
        let container = owners.get(&pid).cloned().unwrap_or_default();
        read(&proc.join(pid.to_string()), pid, container, uptime_us.unwrap_or_default())
    };
    wanted.filter_map(process).take(MOST).collect()
}

/// `None` for one that is gone, and for a kernel thread.
fn read(dir: &Path, pid: u32, container: String, uptime_us: u64) -> Option<GuestProcess> {
    let text = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
    let stat = text("stat")?;
    let (before, after) = stat.rsplit_once(')')?;
    let name = before.split_once('(')?.1;
    // Numbered as in proc(5), from the third on.
    let fields: Vec<&str> = after.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3).and_then(|word| word.parse::<u64>().ok());
    let kernel_thread = number(9)? & 0x0020_0000 != 0;
    if kernel_thread {
        return None;
    }
    let ticks_us = 1_000_000 / clock_ticks_per_second().max(1);
    let status = text("status")?;
    let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key));
    let innermost = line("NSpid:").and_then(|pids| pids.split_whitespace().last()?.parse().ok());
    Some(GuestProcess {
        container,
        pid,
        container_pid: innermost.unwrap_or(pid),
        parent_pid: number(4).and_then(|pid| u32::try_from(pid).ok()).unwrap_or_default(),
        uid: line("Uid:").and_then(|ids| ids.split_whitespace().nth(1)?.parse().ok()).unwrap_or_default(),
        state: fields.first().copied().unwrap_or_default().to_owned(),
        threads: number(20).and_then(|count| u32::try_from(count).ok()).unwrap_or_default(),
        cpu_time_us: (number(14)? + number(15)?) * ticks_us,
        rss_bytes: number(24)? * u64::try_from(page_size()).unwrap_or(4096),
        age_us: uptime_us.saturating_sub(number(22)? * ticks_us),
        command: command(&command_line(dir), name),
    })
}

/// Its beginning; the whole may be as long as a process has memory.
fn command_line(dir: &Path) -> Vec<u8> {
    let mut line = Vec::new();
    if let Ok(file) = std::fs::File::open(dir.join("cmdline")) {
        // What was read until an error is what there is.
        let _ = file.take(COMMAND_MAX).read_to_end(&mut line);
    }
    line
}

fn command(line: &[u8], name: &str) -> Vec<String> {
    let words: Vec<String> = line
        .strip_suffix(b"\0")
        .unwrap_or(line)
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    // A process that has ended, or that has written over its arguments.
    if words.iter().all(String::is_empty) { vec![format!("[{name}]")] } else { words }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_with_its_container_and_figures() {
        let mut child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let owners = HashMap::from([(child.id(), "box".to_owned())]);
        let found = list(Path::new("/proc"), &owners, true);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].pid, found[0].container.as_str()), (child.id(), "box"));
        assert_eq!(found[0].parent_pid, std::process::id());
        assert!(found[0].threads == 1 && found[0].age_us < 60_000_000, "{found:?}");
    }

    #[test]
    fn all_of_the_guest_are_told_without_the_kernels_threads() {
        let found = list(Path::new("/proc"), &HashMap::new(), false);
        let own = found.iter().find(|process| process.pid == std::process::id()).unwrap();
        assert!(own.rss_bytes > 0 && !own.command[0].is_empty());
        assert!(found.iter().all(|process| process.command[0] != "[kthreadd]"));
    }

    #[test]
    fn a_process_without_a_command_line_is_called_by_its_name() {
        assert_eq!(command(b"", "old"), ["[old]"]);
        assert_eq!(command(b"a\0b c\0", "a"), ["a", "b c"]);
        assert_eq!(command(b"title", "t"), ["title"]);
    }
}
