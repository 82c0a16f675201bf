//! `events`: what happens in pods, from their launch on.

use std::collections::HashSet;
use std::time::Duration;

use kata_api::control::Event;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{Outcome, exit_code};
use crate::cli::EventsArgs;
use crate::colour::Palette;
use crate::failure::{Failure, chain};
use crate::output;
use crate::pod::{CallError, Client, PodDir, PodState, Signals};
use crate::table::{short, timestamp};

/// Between two looks for new pods.
const LOOK: Duration = Duration::from_secs(1);
/// Longest wait that an owner is asked for at once.
const WAIT: Duration = Duration::from_secs(30);

/// Prints the events of one pod until it is over, or those of all.
pub async fn run(args: &EventsArgs) -> Outcome {
    let mut signals = Signals::catch()?;
    let telling = async {
        match &args.pod {
            Some(name) => one(args, &PodDir::alive(name)?).await,
            None if args.once => until_now(args).await,
            None => all(args).await,
        }
    };
    tokio::select! {
        told = telling => told.map(|()| 0),
        // To be ended is how it ends, unless it ends before.
        signal = signals.ending() => Ok(if args.once { exit_code(128 + signal) } else { 0 }),
    }
}

async fn one(args: &EventsArgs, pod: &PodDir) -> Result<(), Failure> {
    let client = Client::connect(pod).await?;
    let mut from = 0;
    loop {
        let wait = if args.once { Duration::ZERO } else { WAIT };
        let news = match client.events(from, wait).await {
            // It left after the last event.
            Err(CallError::Lost(_)) if from > 0 && !args.once => return Ok(()),
            news => news?,
        };
        for event in &news.events {
            tell(args.json, &pod.name, event)?;
        }
        if args.once || news.ended {
            return Ok(());
        }
        from = news.next;
    }
}

fn live() -> Result<Vec<PodDir>, Failure> {
    let alive = |pod: &PodDir| match PodState::load(&pod.run_dir) {
        Ok(Some(state)) => state.owner_lives(),
        Ok(None) => true,
        Err(_) => false,
    };
    Ok(PodDir::all()?.into_iter().filter(alive).collect())
}

/// What has happened in all pods, in the order of time.
async fn until_now(args: &EventsArgs) -> Result<(), Failure> {
    let mut events = Vec::new();
    for pod in live()? {
        let told = async { Client::connect(&pod).await?.events(0, Duration::ZERO).await };
        match told.await {
            Ok(told) => events.extend(told.events.into_iter().map(|event| (pod.name.clone(), event))),
            Err(error) => eprintln!("kata-ctl: pod {} is left out: {}", pod.name, chain(&error)),
        }
    }
    events.sort_by_key(|(_, event)| event.at_ms);
    events.iter().try_for_each(|(pod, event)| tell(args.json, pod, event))
}

/// What happens in all pods, those to come included.
async fn all(args: &EventsArgs) -> Result<(), Failure> {
    let (post, mut told) = mpsc::channel::<(String, Event)>(64);
    let mut known: HashSet<String> = HashSet::new();
    let mut looks = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            _ = looks.tick() => {
                let pods = live()?;
                known.retain(|name| pods.iter().any(|pod| pod.name == *name));
                for pod in pods {
                    if known.insert(pod.name.clone()) {
                        tokio::spawn(follow(pod, post.clone()));
                    }
                }
            }
            Some((pod, event)) = told.recv() => tell(args.json, &pod, &event)?,
        }
    }
}

/// Passes a pod's events on until it is over.
async fn follow(pod: PodDir, post: mpsc::Sender<(String, Event)>) {
    let Ok(client) = Client::connect(&pod).await else { return };
    let mut from = 0;
    while let Ok(news) = client.events(from, WAIT).await {
        for event in news.events {
            if post.send((pod.name.clone(), event)).await.is_err() {
                return;
            }
        }
        if news.ended {
            return;
        }
        from = news.next;
    }
}

fn tell(json: bool, pod: &str, event: &Event) -> Result<(), Failure> {
    if json { output::line(&document(pod, event)) } else { output::print(&as_text(pod, event)) }
}

fn document(pod: &str, event: &Event) -> Value {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let has_code = matches!(event.kind.as_str(), "exited" | "deleted");
    json!({
        "number": event.number,
        "at_ms": event.at_ms,
        "pod": pod,
        "kind": event.kind,
        "container": text(&event.container),
        "exec": text(&event.exec),
        "exit_code": has_code.then_some(event.exit_code),
        "fault": text(&event.fault),
    })
}

fn as_text(pod: &str, event: &Event) -> String {
    let palette = Palette::stdout();
    let kind = format!("{:8}", event.kind);
    let kind = match event.kind.as_str() {
        "oom" => palette.red(&kind),
        "stopped" if !event.fault.is_empty() => palette.red(&kind),
        "exited" if event.exit_code != 0 => palette.yellow(&kind),
        _ => kind,
    };
    let mut line = format!("{}  {kind}  {}", palette.dim(&timestamp(event.at_ms)), short(pod));
    if !event.container.is_empty() {
        line.push_str(&format!(" container {}", short(&event.container)));
    }
    if !event.exec.is_empty() {
        line.push_str(&format!(" exec {}", event.exec));
    }
    if matches!(event.kind.as_str(), "exited" | "deleted") {
        line.push_str(&format!(": exit code {}", event.exit_code));
    }
    if !event.fault.is_empty() {
        line.push_str(&format!(": {}", event.fault));
    }
    line + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_says_what_it_is_of_and_how_it_ended() {
        let event = Event {
            number: 3,
            at_ms: 951_782_400_000,
            kind: "exited".to_owned(),
            container: "web".to_owned(),
            exec: "e1".to_owned(),
            exit_code: 3,
            ..Event::default()
        };
        let told = "2000-02-29T00:00:00.000Z  exited    web container web exec e1: exit code 3\n";
        assert_eq!(as_text("web", &event), told);
        assert_eq!(document("web", &event)["exit_code"], 3);
        let stopped = Event { kind: "stopped".to_owned(), fault: "it broke".to_owned(), ..Event::default() };
        assert!(as_text("web", &stopped).ends_with("web: it broke\n"));
        assert_eq!(document("web", &stopped)["exit_code"], Value::Null);
    }
}
