//! systemd units for what an extension brings: one service a process.
//!
//! Every value is quoted for where it stands, and none with a control character comes this far: what an extension says can
//! become an argument, and never a line.

use std::fmt::Write;

use crate::plan::{Arguments, Process};

/// This program, as the units start it.
pub const LAUNCHER: &str = "/run/kata-guest-init/exec";

/// What starts all of them.
pub const TARGET: &str = "guest-services.target";

/// A unit file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Its file name.
    pub name: String,
    /// Its content.
    pub text: String,
}

/// The unit of `process`, which `owner` brings in the directory `root`. It follows those of `processes` that have their turn
/// before it.
#[must_use]
pub fn unit(owner: &str, root: &str, process: &Process, processes: &[Process]) -> Unit {
    let mut text = format!("# Made at boot, from the manifest of {owner}.\n[Unit]\n");
    let mut line = |key: &str, value: &str| {
        // Writing to a text does not fail.
        let _ = writeln!(text, "{key}={value}");
    };
    line("Description", &format!("Guest service {} of {owner}", process.id));
    // As early as the agent is: what systemd sets up for a whole system is not for guests to wait for.
    line("DefaultDependencies", "no");
    line("Conflicts", "shutdown.target");
    line("Before", "shutdown.target");
    line("Requires", "initdata.target");
    line("After", "initdata.target");
    for earlier in processes.iter().filter(|other| other.level < process.level) {
        line("After", &name(owner, &earlier.id));
    }
    line("StartLimitIntervalSec", "60");
    line("StartLimitBurst", "10");
    line("\n[Service]\nType", "exec");
    line("ExecStart", &start(root, process));
    if let Some(socket) = &process.socket {
        line("ExecStartPost", &command(&[LAUNCHER, "wait", socket]));
    }
    line("TimeoutStartSec", &process.timeout.to_string());
    for (name, value) in &process.environment {
        line("Environment", &quoted(&format!("{name}={value}"), false));
    }
    if let Some(namespace) = &process.network_namespace {
        line("NetworkNamespacePath", &namespace.replace('%', "%%"));
    }
    line("Restart", "on-failure");
    line("RestartSec", "200ms");
    line("Slice", "guest-services.slice");
    Unit { name: name(owner, &process.id), text }
}

fn name(owner: &str, id: &str) -> String {
    format!("{owner}.{id}.service")
}

/// See [`crate::launch`] for the words.
fn start(root: &str, process: &Process) -> String {
    let program = format!("{root}/{}", process.program);
    let socket = process.socket.as_deref().unwrap_or("-");
    let mut words = vec![LAUNCHER.to_owned(), "start".to_owned(), socket.to_owned(), program];
    for Arguments { condition, words: these } in &process.arguments {
        words.push(these.len().to_string());
        words.push(condition.clone().unwrap_or_else(|| "-".to_owned()));
        words.extend(these.iter().cloned());
    }
    command(&words)
}

fn command(words: &[impl AsRef<str>]) -> String {
    words.iter().map(|word| quoted(word.as_ref(), true)).collect::<Vec<_>>().join(" ")
}

/// `text` as one word (systemd.syntax(7), systemd.service(5) "Command lines"): in quotes, so that neither spaces nor `;` part
/// it; without specifiers, and in a command without variables of systemd's.
fn quoted(text: &str, in_command: bool) -> String {
    let mut result = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => result.extend(['\\', character]),
            '%' => result.push_str("%%"),
            '$' if in_command => result.push_str("$$"),
            _ => result.push(character),
        }
    }
    result.push('"');
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::{COCO, plan_of};

    fn units(text: &str) -> Vec<Unit> {
        let processes = plan_of(text, &["coco"]).unwrap();
        let root = "/run/kata-extensions/coco";
        processes.iter().map(|process| unit("extension-coco", root, process, &processes)).collect()
    }

    #[test]
    fn the_published_schema_becomes_units() {
        let units = units(COCO);
        let names: Vec<&str> = units.iter().map(|unit| unit.name.as_str()).collect();
        let expected = ["attestation-agent", "confidential-data-hub", "api-server-rest"];
        assert_eq!(names, expected.map(|id| format!("extension-coco.{id}.service")));
        let agent = r#"# Made at boot, from the manifest of extension-coco.
[Unit]
Description=Guest service attestation-agent of extension-coco
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
Requires=initdata.target
After=initdata.target
StartLimitIntervalSec=60
StartLimitBurst=10

[Service]
Type=exec
ExecStart="/run/kata-guest-init/exec" "start" "/run/confidential-containers/attestation-agent/attestation-agent.sock" "/run/kata-extensions/coco/usr/local/bin/attestation-agent" "2" "-" "--attestation_sock" "unix:///run/confidential-containers/attestation-agent/attestation-agent.sock" "2" "/run/measured-cfg/initdata.toml" "--initdata-toml" "/run/measured-cfg/initdata.toml" "2" "/run/measured-cfg/aa.toml" "-c" "/run/measured-cfg/aa.toml"
ExecStartPost="/run/kata-guest-init/exec" "wait" "/run/confidential-containers/attestation-agent/attestation-agent.sock"
TimeoutStartSec=30
Restart=on-failure
RestartSec=200ms
Slice=guest-services.slice
"#;
        assert_eq!(units[0].text, agent);
        let after = "After=initdata.target\nAfter=extension-coco.attestation-agent.service\nStartLimit";
        assert!(units[1].text.contains(after), "{}", units[1].text);
        assert!(units[2].text.contains("After=extension-coco.confidential-data-hub.service\n"));
        assert!(!units[2].text.contains("ExecStartPost"));
    }

    #[test]
    fn what_systemd_would_read_as_more_than_a_word_is_quoted() {
        let units = units(
            r#"schema_version = 1
            [[process]]
            id = "a"
            level = 1
            path = "bin/a b;%n"
            args = ["", ";", "a b", "\"; ExecStart=x", "\\n\\", "%i", "$HOME ${USER}", "'"]
            env = { A = "\" B=c %h $x \\" }
            network_namespace = "/run/netns/pod"
            "#
            .replace("${USER}", "$")
            .as_str(),
        );
        let text = &units[0].text;
        assert!(text.contains(r#""/run/kata-extensions/coco/bin/a b;%%n""#), "{text}");
        let words = r#""8" "-" "" ";" "a b" "\"; ExecStart=x" "\\n\\" "%%i" "$$HOME $$" "'""#;
        assert!(text.contains(words), "{text}");
        assert!(text.contains("\nEnvironment=\"A=\\\" B=c %%h $x \\\\\"\n"), "{text}");
        assert!(text.contains("\nNetworkNamespacePath=/run/netns/pod\n"), "{text}");
    }
}
