//! `ps`

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kata_config::paths;
use serde::Serialize;

use super::Outcome;
use crate::cli::PsArgs;
use crate::failure::{Failure, chain};
use crate::pod::{Client, ContainerState, PodDir, PodState};
use crate::table;

/// Longest command that the table shows.
const COMMAND_WIDTH: usize = 40;

/// A pod in the list.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// `creating`, `running`, `paused`, `exited`, `stopped` or `dead`.
    state: String,
    exit_code: Option<u32>,
    owner_pid: u32,
    vmm_pid: Option<u32>,
    created_at_ms: u64,
    hypervisor: String,
    accelerator: String,
    command: Vec<String>,
    fault: Option<String>,
}

/// Lists the pods.
pub async fn run(args: &PsArgs) -> Outcome {
    let mut rows = Vec::new();
    for pod in pods()? {
        match row(&pod).await {
            Ok(row) => rows.push(row),
            Err(failure) => {
                let why = failure.error.map(|error| chain(&*error)).unwrap_or_default();
                eprintln!("kata-ctl: pod {} is left out: {why}", pod.name);
            }
        }
    }
    rows.retain(|row| args.all || !matches!(row.state.as_str(), "exited" | "stopped" | "dead"));
    rows.sort_by(|a, b| (b.created_at_ms, &a.name).cmp(&(a.created_at_ms, &b.name)));
    if args.json {
        println!("{:#}", serde_json::to_value(&rows)?);
    } else {
        print!("{}", as_table(&rows, SystemTime::now()));
    }
    Ok(0)
}

fn pods() -> Result<Vec<PodDir>, Failure> {
    let dir = paths::run_dir();
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::text(format!("cannot read {}: {error}", dir.display()))),
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    // What has no pod's name is no pod.
    Ok(names.filter_map(|name| PodDir::existing(&name).ok()).collect())
}

async fn row(pod: &PodDir) -> Result<Row, Failure> {
    let stored = PodState::load(&pod.run_dir)?;
    let alive = match &stored {
        Some(state) => state.owner_lives(),
        None => Client::connect(pod).await.is_ok(),
    };
    let mut state =
        stored.unwrap_or_else(|| PodState { state: "creating".to_owned(), ..PodState::default() });
    let mut vmm_pid = None;
    if alive && !state.is_stopped() {
        vmm_pid = refresh(pod, &mut state).await;
    }
    let container = state.containers.iter().find(|container| container.id == pod.name);
    Ok(Row {
        name: pod.name.clone(),
        state: state_word(&state, container, alive).to_owned(),
        exit_code: container
            .filter(|container| container.state == "stopped")
            .and_then(|container| container.exit_code),
        owner_pid: state.owner_pid,
        vmm_pid,
        created_at_ms: state.created_at_ms,
        command: container.map(|container| container.args.clone()).unwrap_or_default(),
        hypervisor: state.hypervisor,
        accelerator: state.accelerator,
        fault: state.fault,
    })
}

/// Replaces what the file says by what the owner says, if it answers; the pid of the virtual machine.
async fn refresh(pod: &PodDir, state: &mut PodState) -> Option<u32> {
    let seen = Client::connect(pod).await.ok()?.inspect().await.ok()?;
    state.state = seen.state;
    state.owner_pid = seen.owner_pid;
    state.created_at_ms = seen.created_at_ms;
    state.hypervisor = seen.hypervisor;
    state.accelerator = seen.accelerator;
    state.fault = Some(seen.fault).filter(|fault| !fault.is_empty());
    let container = |seen: kata_api::control::Container| ContainerState {
        exit_code: u32::try_from(seen.exit_code).ok().filter(|_| seen.state == "stopped"),
        id: seen.id,
        state: seen.state,
        args: seen.args,
    };
    state.containers = seen.containers.into_iter().map(container).collect();
    Some(seen.vmm_pid).filter(|pid| *pid > 0)
}

fn state_word<'a>(pod: &'a PodState, container: Option<&'a ContainerState>, alive: bool) -> &'a str {
    match (pod.state.as_str(), container.map(|container| container.state.as_str())) {
        ("stopped", Some("stopped")) => "exited",
        ("stopped", _) => "stopped",
        _ if !alive => "dead",
        ("ready", Some("stopped")) => "exited",
        ("ready", Some(state)) => state,
        ("ready", None) => "creating",
        (state, _) => state,
    }
}

fn as_table(rows: &[Row], now: SystemTime) -> String {
    let header = ["NAME", "STATE", "PID", "CREATED", "VMM", "COMMAND"].map(str::to_owned);
    let line = |row: &Row| {
        let state = match row.exit_code {
            Some(code) if row.state == "exited" => format!("exited ({code})"),
            _ => row.state.clone(),
        };
        let pid = if row.owner_pid == 0 { "-".to_owned() } else { row.owner_pid.to_string() };
        let vmm = match (row.hypervisor.as_str(), row.accelerator.as_str()) {
            ("", _) => "-".to_owned(),
            (driver, accelerator) => format!("{driver}/{accelerator}"),
        };
        [row.name.clone(), state, pid, age(row.created_at_ms, now), vmm, shortened(&row.command)]
    };
    let lines: Vec<[String; 6]> = std::iter::once(header).chain(rows.iter().map(line)).collect();
    table::columns(&lines)
}

fn age(created_at_ms: u64, now: SystemTime) -> String {
    if created_at_ms == 0 {
        return "-".to_owned();
    }
    let age = now.duration_since(UNIX_EPOCH + Duration::from_millis(created_at_ms)).unwrap_or_default();
    let (count, unit) = match age.as_secs() {
        seconds @ 0..60 => (seconds, "second"),
        seconds @ 60..3600 => (seconds / 60, "minute"),
        seconds @ 3600..172_800 => (seconds / 3600, "hour"),
        seconds => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

/// One line, whatever the arguments hold.
fn shortened(command: &[String]) -> String {
    let line: String = command.join(" ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match line.char_indices().nth(COMMAND_WIDTH) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(state: &str) -> ContainerState {
        ContainerState { id: "x".into(), state: state.into(), args: vec![], exit_code: None }
    }

    #[test]
    fn states_are_told_in_one_word() {
        let word = |pod: &str, inside: Option<&str>, alive| {
            let inside = inside.map(container);
            let pod = PodState { state: pod.into(), ..PodState::default() };
            state_word(&pod, inside.as_ref(), alive).to_owned()
        };
        assert_eq!(word("ready", Some("running"), true), "running");
        assert_eq!(word("ready", Some("paused"), true), "paused");
        assert_eq!(word("creating", None, true), "creating");
        assert_eq!(word("ready", None, true), "creating");
        assert_eq!(word("ready", Some("running"), false), "dead");
        assert_eq!(word("creating", None, false), "dead");
        assert_eq!(word("stopped", Some("stopped"), false), "exited");
        assert_eq!(word("stopped", None, false), "stopped");
    }

    #[test]
    fn ages_are_told_in_the_largest_unit() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let told = |seconds: u64| age((1_000_000 - seconds) * 1000, now);
        assert_eq!(told(1), "1 second ago");
        assert_eq!(told(59), "59 seconds ago");
        assert_eq!(told(125), "2 minutes ago");
        assert_eq!(told(7200), "2 hours ago");
        assert_eq!(told(3 * 86_400), "3 days ago");
        assert_eq!(age(0, now), "-");
        assert_eq!(age(u64::MAX / 1_000_000, UNIX_EPOCH), "0 seconds ago", "a clock that was set back");
    }

    #[test]
    fn commands_stay_on_one_line() {
        assert_eq!(shortened(&["sh".into(), "-c".into(), "a\nb".into()]), "sh -c a b");
        assert_eq!(shortened(&["ä".repeat(50)]).chars().count(), COMMAND_WIDTH + 1);
    }
}
