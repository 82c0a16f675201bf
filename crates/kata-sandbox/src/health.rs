//! Whether a pod that says nothing still lives.
//!
//! A process that ends is noticed at once; one that is stopped, or a guest that is stuck, says nothing. So the agent is asked
//! now and then, and the states of the pod's processes are looked at. Who gave no sign of life for
//! `agent.kata.health_timeout_ms` counts as dead: noticed after that time and a third of it at most.

use std::time::{Duration, Instant};

use kata_hypervisor::process::Child;

use crate::agent_client::Agent;
use crate::boot::Excerpt;
use crate::lifecycle::Pod;

/// Looks within one bound.
const LOOKS: u32 = 3;

/// Waits until the pod counts as dead, and says why.
pub(crate) async fn lapsed(pod: &Pod, agent: &Agent, virtiofsd: Option<&Child>) -> String {
    let Some(bound) = pod.config.agent.kata.health_bound() else { return std::future::pending().await };
    tokio::select! {
        cause = stopped(pod, virtiofsd, bound) => cause,
        () = silent(agent, bound) => silence(pod, bound),
    }
}

/// Resolves when the agent has not answered for as long as `bound`.
async fn silent(agent: &Agent, bound: Duration) {
    // An answer of whatever kind is one; a connection that broke is noticed elsewhere.
    while agent.answers(bound).await {
        tokio::time::sleep(bound / LOOKS).await;
    }
}

fn silence(pod: &Pod, bound: Duration) -> String {
    let held = pod
        .vm
        .processes()
        .iter()
        .find(|process| is_stopped(process.pid))
        .map_or_else(String::new, |process| {
            format!("; process {} ({}) is stopped", process.pid, process.name)
        });
    let console = Excerpt::console(&pod.vm.console_tail());
    format!("the agent has not answered for {bound:?} (agent.kata.health_timeout_ms){held}{console}")
}

/// Resolves when one of the pod's processes was seen stopped at each look during `bound`.
async fn stopped(pod: &Pod, virtiofsd: Option<&Child>, bound: Duration) -> String {
    let mut since = None;
    loop {
        tokio::time::sleep(bound / LOOKS).await;
        let machine = pod.vm.processes().into_iter().map(|process| (process.name, process.pid));
        let daemon = virtiofsd.map(|child| (child.name().to_owned(), child.pid()));
        let Some((name, pid)) = machine.chain(daemon).find(|(_, pid)| is_stopped(*pid)) else {
            since = None;
            continue;
        };
        if since.get_or_insert_with(Instant::now).elapsed() >= bound {
            return format!(
                "process {pid} ({name}) has been stopped for {bound:?} (agent.kata.health_timeout_ms)"
            );
        }
    }
}

/// Whether the process was stopped by a signal or a debugger: the third field of `/proc/<pid>/stat` (proc(5)).
fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, fields)| fields.trim_start().starts_with(['T', 't']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_process_is_told_from_one_that_sleeps() {
        let mut child = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        assert!(!is_stopped(child.id()));
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        let begin = Instant::now();
        while !is_stopped(child.id()) {
            assert!(begin.elapsed() < Duration::from_secs(5));
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
