//! `factory`: the machines that pods start as copies of. The owner's program makes and knows them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Outcome;
use super::check::ask_owner;
use crate::cli::{FactoryArgs, FactoryCommand};
use crate::failure::{FAILED, Failure};
use crate::{output, table};

/// What the owner's program says of templates.
#[derive(Debug, Serialize, Deserialize)]
struct Status {
    dir: String,
    enabled: bool,
    state: String,
    reason: Option<String>,
    digest: String,
    templates: Vec<Template>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Template {
    digest: String,
    /// As the owner's program knows it; only some of it is shown.
    about: Option<Value>,
    fault: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Destroyed {
    dir: String,
    removed: Vec<String>,
}

/// Does what was asked.
pub fn run(command: &FactoryCommand) -> Outcome {
    match command {
        FactoryCommand::Init(args) => init(args),
        FactoryCommand::Status(args) => {
            let verify: &[&str] = if args.verify { &["--verify"] } else { &[] };
            let status = ask("status", verify, &args.common)?;
            show(&args.common, &status, |status: &Status| status_text(status))?;
            let ready = status.get("state").and_then(Value::as_str) == Some("ready");
            Ok(if ready { 0 } else { FAILED })
        }
        FactoryCommand::Destroy(args) => {
            let destroyed = ask("destroy", &[], args)?;
            show(args, &destroyed, |Destroyed { dir, removed }| match removed.len() {
                0 => format!("nothing to remove in {dir}\n"),
                number => format!("removed {number} from {dir}\n"),
            })?;
            Ok(0)
        }
    }
}

fn init(args: &FactoryArgs) -> Outcome {
    let status = ask("make", &[], args)?;
    show(args, &status, init_text)?;
    Ok(0)
}

fn show<T: for<'a> Deserialize<'a>>(
    args: &FactoryArgs,
    document: &Value,
    text: impl Fn(&T) -> String,
) -> Result<(), Failure> {
    match args.json {
        true => output::document(document),
        false => output::print(&text(&T::deserialize(document)?)),
    }
}

/// Has the owner's program do it.
fn ask(verb: &str, more: &[&str], args: &FactoryArgs) -> Result<Value, Failure> {
    let hypervisor = args.hypervisor.iter().map(|name| format!("runtime.hypervisor_name={name}"));
    let set: Vec<String> = args.set.iter().cloned().chain(hypervisor).collect();
    ask_owner(&[&["template", verb], more].concat(), args.config.as_deref(), &set)
}

fn init_text(status: &Status) -> String {
    let made = status.templates.iter().find(|template| template.digest == status.digest);
    let Some(about) = made.and_then(|made| made.about.as_ref()) else { return status_text(status) };
    let mut text = format!(
        "{}/{}\n{} MiB of memory, {} KiB of state, made in {} ms\n",
        status.dir,
        status.digest,
        number(about, "/memory/on_disk") >> 20,
        number(about, "/state/on_disk") >> 10,
        number(about, "/took_ms")
    );
    if !status.enabled {
        text.push_str("pods do not start from it: set hypervisor.qemu.factory.enable_template = true\n");
    }
    text
}

fn status_text(status: &Status) -> String {
    let reason = status.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    let enabled = match status.enabled {
        true => "yes",
        false => "no: hypervisor.qemu.factory.enable_template is false",
    };
    let lines = [
        ["directory", status.dir.as_str()].map(str::to_owned),
        ["state".to_owned(), format!("{}{reason}", status.state)],
        ["pods use it", enabled].map(str::to_owned),
    ];
    let mut text = table::columns(&lines);
    if status.templates.is_empty() {
        return text;
    }
    let head = ["TEMPLATE", "MADE OF", "MEMORY", "SIZE"].map(str::to_owned);
    let rows = status.templates.iter().map(|template| {
        let name = template.digest.chars().take(12).collect();
        match &template.about {
            Some(about) => [
                name,
                format!(
                    "kernel {}, agent {}",
                    text_of(about, "/guest_kernel"),
                    text_of(about, "/agent_version")
                ),
                format!("{} MiB", number(about, "/ingredients/memory_mib")),
                format!("{} MiB", number(about, "/memory/on_disk") >> 20),
            ],
            None => [name, template.fault.clone().unwrap_or_default(), String::new(), String::new()],
        }
    });
    text.push('\n');
    text.push_str(&table::columns(&std::iter::once(head).chain(rows).collect::<Vec<_>>()));
    text
}

fn number(of: &Value, at: &str) -> u64 {
    of.pointer(at).and_then(Value::as_u64).unwrap_or_default()
}

fn text_of<'a>(of: &'a Value, at: &str) -> &'a str {
    of.pointer(at).and_then(Value::as_str).filter(|text| !text.is_empty()).unwrap_or("unknown")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(state: &str, enabled: bool) -> Status {
        let about = json!({
            "guest_kernel": "6.12", "agent_version": "0.1.0", "took_ms": 900,
            "ingredients": { "memory_mib": 2048 },
            "memory": { "on_disk": 60 << 20 }, "state": { "on_disk": 16 << 10 },
        });
        serde_json::from_value(json!({
            "dir": "/t", "enabled": enabled, "state": state, "reason": "of another kernel", "digest": "ab",
            "templates": [{ "digest": "ab", "about": about, "fault": null },
                          { "digest": "cd", "about": null, "fault": "broken" }],
        }))
        .unwrap()
    }

    #[test]
    fn init_tells_where_how_large_and_how_long_and_that_nobody_uses_it() {
        let text = init_text(&status("ready", false));
        let (told, warned) = text.split_once("\npods do not").unwrap();
        assert_eq!(told, "/t/ab\n60 MiB of memory, 16 KiB of state, made in 900 ms");
        assert!(warned.contains("hypervisor.qemu.factory.enable_template = true"), "{warned}");
        assert!(!init_text(&status("ready", true)).contains("pods do not"));
    }

    #[test]
    fn status_tells_the_reason_and_all_that_is_there() {
        let text = status_text(&status("stale", true));
        assert!(text.contains("stale: of another kernel\n"), "{text}");
        assert!(text.contains("kernel 6.12, agent 0.1.0") && text.contains("2048 MiB"), "{text}");
        assert!(text.contains("cd") && text.contains("broken"), "{text}");
    }
}
