//! `list`: the pods, whoever started them.

use std::time::SystemTime;

use serde::Serialize;

use super::Outcome;
use crate::cli::ListArgs;
use crate::colour::Palette;
use crate::failure::{Failure, chain};
use crate::output;
use crate::pod::{Client, ContainerState, PodDir, PodState};
use crate::table::{self, age, short, shortened};

/// Longest command that the table shows.
const COMMAND_WIDTH: usize = 40;

/// A pod in the list.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// containerd's namespace; `null` for a pod of `kata-ctl run`.
    namespace: Option<String>,
    /// `creating`, `running`, `paused`, `exited`, `stopped` or `dead`.
    state: String,
    exit_code: Option<u32>,
    owner_pid: u32,
    vmm_pid: Option<u32>,
    created_at_ms: u64,
    hypervisor: String,
    accelerator: String,
    containers: usize,
    command: Vec<String>,
    fault: Option<String>,
}

/// Lists the pods.
pub async fn run(args: &ListArgs) -> Outcome {
    let mut rows = Vec::new();
    for pod in PodDir::all()? {
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
        output::document(&rows)?;
    } else {
        output::print(&as_table(&rows, SystemTime::now()))?;
    }
    Ok(0)
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
        namespace: pod.namespace(),
        state: state_word(&state, container, alive).to_owned(),
        exit_code: container
            .filter(|container| container.state == "stopped")
            .and_then(|container| container.exit_code),
        owner_pid: state.owner_pid,
        vmm_pid,
        created_at_ms: state.created_at_ms,
        containers: state.containers.len(),
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
    let palette = Palette::stdout();
    let header = ["NAME", "STATE", "PID", "CREATED", "VMM", "FROM", "COMMAND"].map(str::to_owned);
    let line = |row: &Row| {
        let state = match row.exit_code {
            Some(code) if row.state == "exited" => format!("exited ({code})"),
            _ => row.state.clone(),
        };
        let state = match row.state.as_str() {
            "running" => palette.green(&state),
            "dead" => palette.red(&state),
            "exited" | "stopped" => palette.dim(&state),
            _ => palette.yellow(&state),
        };
        let pid = if row.owner_pid == 0 { "-".to_owned() } else { row.owner_pid.to_string() };
        let vmm = match (row.hypervisor.as_str(), row.accelerator.as_str()) {
            ("", _) => "-".to_owned(),
            (driver, accelerator) => format!("{driver}/{accelerator}"),
        };
        let from =
            row.namespace.as_ref().map_or_else(|| "kata-ctl".to_owned(), |it| format!("containerd/{it}"));
        let command = shortened(&row.command, COMMAND_WIDTH);
        [short(&row.name).to_owned(), state, pid, age(row.created_at_ms, now), vmm, from, command]
    };
    let lines: Vec<[String; 7]> = std::iter::once(header).chain(rows.iter().map(line)).collect();
    table::columns(&lines)
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
}
