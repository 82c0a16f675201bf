//! The agent's settings: `agent.*` words of the kernel command line, and `KATA_AGENT_*` of the environment over them.

use std::time::Duration;

use kata_api::ports;
use tracing::level_filters::LevelFilter;

/// What the agent was told at boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Least severity that is logged (`agent.log`).
    pub log_level: LevelFilter,
    /// Address of the agent service, ttrpc style (`agent.server_addr`).
    pub server_addr: String,
    /// vsock port of the log (`agent.log_vport`).
    pub log_port: u32,
    /// Whether a shell is offered on [`console_port`](Self::console_port) (`agent.debug_console`).
    pub debug_console: bool,
    /// vsock port of the debug console (`agent.debug_console_vport`).
    pub console_port: u32,
    /// vsock port of the standard streams (`agent.passfd_listener_port`).
    pub stream_port: u32,
    /// Size of the pipes of processes in bytes (`agent.container_pipe_size`).
    pub pipe_size: usize,
    /// How long a hot-plugged device may take to appear (`agent.hotplug_timeout`, seconds).
    pub hotplug_timeout: Duration,
    /// How long a service of the guest may take to pull an image (`agent.image_pull_timeout`, seconds).
    pub image_pull_timeout: Duration,
    /// How long a service of the guest may take for anything else (`agent.guest_service_timeout`, seconds).
    pub guest_service_timeout: Duration,
    /// Whether volumes that are encrypted are protected against changes, too (`agent.secure_storage_integrity`).
    pub secure_storage_integrity: bool,
    /// Whether sealed secrets are looked for in every container, and not only where it asks (`agent.unseal`).
    pub unseal_implicitly: bool,
    /// `agent.*` words that were not understood, as they stood.
    pub ignored: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            log_level: LevelFilter::INFO,
            server_addr: format!("vsock://-1:{}", ports::AGENT),
            log_port: ports::LOG,
            debug_console: false,
            console_port: ports::DEBUG_CONSOLE,
            stream_port: ports::STREAM,
            pipe_size: 256 << 10,
            hotplug_timeout: Duration::from_secs(3),
            image_pull_timeout: Duration::from_secs(1200),
            guest_service_timeout: Duration::from_secs(50),
            secure_storage_integrity: true,
            unseal_implicitly: false,
            ignored: Vec::new(),
        }
    }
}

impl Settings {
    /// Reads the words of a kernel command line, then `(name, value)` pairs of the environment.
    ///
    /// Nothing here is fatal: a guest that cannot tell what is wrong with it helps nobody. What is not understood is
    /// listed in [`ignored`](Self::ignored) for the log.
    #[must_use]
    pub fn parse(cmdline: &str, environment: impl Iterator<Item = (String, String)>) -> Self {
        let mut settings = Self::default();
        for word in words(cmdline) {
            let Some(rest) = word.strip_prefix("agent.") else { continue };
            let (key, value) = rest.split_once('=').unwrap_or((rest, ""));
            if settings.apply(key, value).is_none() {
                settings.ignored.push(word);
            }
        }
        for (name, value) in environment {
            let key = match name.as_str() {
                "KATA_AGENT_SERVER_ADDR" => "server_addr",
                "KATA_AGENT_LOG_LEVEL" => "log",
                _ => continue,
            };
            if settings.apply(key, &value).is_none() {
                settings.ignored.push(format!("{name}={value}"));
            }
        }
        settings
    }

    fn apply(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "log" => self.log_level = level(value)?,
            "server_addr" => self.server_addr = Some(value).filter(|value| value.contains("://"))?.to_owned(),
            "log_vport" => self.log_port = value.parse().ok()?,
            "debug_console" => self.debug_console = truth(value)?,
            "debug_console_vport" => {
                self.console_port = value.parse().ok()?;
                self.debug_console = true;
            }
            "passfd_listener_port" => self.stream_port = value.parse().ok()?,
            "container_pipe_size" => self.pipe_size = value.parse().ok()?,
            "hotplug_timeout" => self.hotplug_timeout = seconds(value)?,
            "image_pull_timeout" => self.image_pull_timeout = seconds(value)?,
            "guest_service_timeout" => self.guest_service_timeout = seconds(value)?,
            "secure_storage_integrity" => self.secure_storage_integrity = truth(value)?,
            "unseal" => {
                self.unseal_implicitly = match value {
                    "implicit" => true,
                    "explicit" => false,
                    _ => return None,
                }
            }
            _ => return None,
        }
        Some(())
    }
}

fn seconds(value: &str) -> Option<Duration> {
    value.parse().ok().map(Duration::from_secs)
}

fn level(value: &str) -> Option<LevelFilter> {
    match value {
        "critical" | "fatal" | "panic" => Some(LevelFilter::ERROR),
        "warning" => Some(LevelFilter::WARN),
        _ => value.parse().ok(),
    }
}

/// A switch that is on when only named.
fn truth(value: &str) -> Option<bool> {
    match value {
        "" | "1" | "true" | "on" | "yes" => Some(true),
        "0" | "false" | "off" | "no" => Some(false),
        _ => None,
    }
}

/// Splits at blanks outside of double quotes, which are dropped, as the kernel does.
fn words(cmdline: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    for character in cmdline.chars() {
        match character {
            '"' => quoted = !quoted,
            blank if blank.is_ascii_whitespace() && !quoted => words.push(std::mem::take(&mut word)),
            other => word.push(other),
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(cmdline: &str) -> Settings {
        Settings::parse(cmdline, std::iter::empty())
    }

    #[test]
    fn a_command_line_of_others_changes_nothing() {
        assert_eq!(parsed("console=ttyS0 quiet panic=1 agentx=1 root=\"/dev/vda 1\"\n"), Settings::default());
    }

    #[test]
    fn every_key_is_read() {
        let settings = parsed(
            "agent.log=debug agent.debug_console agent.log_vport=2025 agent.passfd_listener_port=2027 \
             agent.hotplug_timeout=9 agent.container_pipe_size=1048576 agent.server_addr=unix:///run/a.sock \
             agent.image_pull_timeout=60 agent.guest_service_timeout=7 agent.secure_storage_integrity=false \
             agent.unseal=implicit",
        );
        assert_eq!(settings.log_level, LevelFilter::DEBUG);
        assert!(settings.debug_console);
        assert_eq!((settings.log_port, settings.stream_port, settings.console_port), (2025, 2027, 1026));
        assert_eq!(settings.hotplug_timeout, Duration::from_secs(9));
        assert_eq!(settings.pipe_size, 1 << 20);
        assert_eq!(settings.server_addr, "unix:///run/a.sock");
        assert_eq!(settings.image_pull_timeout, Duration::from_secs(60));
        assert_eq!(settings.guest_service_timeout, Duration::from_secs(7));
        assert!(!settings.secure_storage_integrity && settings.unseal_implicitly);
        assert!(settings.ignored.is_empty());
    }

    #[test]
    fn a_console_port_switches_the_console_on() {
        assert!(parsed("agent.debug_console_vport=1026").debug_console);
        assert!(!parsed("agent.debug_console=false").debug_console);
    }

    #[test]
    fn what_is_not_understood_is_kept_for_the_log() {
        let settings = parsed(
            "agent.log=loud agent.trace=true agent.log_vport=x agent.server_addr=nowhere agent.unseal=all",
        );
        assert_eq!(settings.ignored.len(), 5);
        assert_eq!(settings.log_port, ports::LOG);
    }

    #[test]
    fn the_environment_wins_over_the_command_line() {
        let environment = [("KATA_AGENT_LOG_LEVEL", "trace"), ("PATH", "/bin")];
        let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(Settings::parse("agent.log=warn", environment.into_iter()).log_level, LevelFilter::TRACE);
    }
}
