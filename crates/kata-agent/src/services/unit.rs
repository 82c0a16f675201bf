//! What the guest's init knows of a service: its unit's state, and the last line of its log.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Signal, kill_process};

use super::error::one_line;
use crate::reaper::{ExitStatus, Reaper};

/// How long the init may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of an answer that are read.
const ANSWER_MAX: u64 = 16 << 10;

/// The way to the units. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Units {
    /// Where systemd says that it is the init, see sd_booted(3).
    booted: PathBuf,
    /// Where its programs are.
    programs: PathBuf,
    reaper: Reaper,
    patience: Duration,
}

/// What `systemctl show` tells of a unit.
#[derive(Debug, Default, PartialEq, Eq)]
struct State {
    /// Its own name: it may have been asked for by another.
    id: String,
    /// Number of what systemd has yet to do with it; empty where that is nothing.
    job: String,
    load: String,
    active: String,
    sub: String,
    result: String,
}

impl State {
    fn parse(answer: &str) -> Self {
        let mut state = Self::default();
        for (key, value) in answer.lines().filter_map(|line| line.split_once('=')) {
            let field = match key {
                "Id" => &mut state.id,
                "Job" => &mut state.job,
                "LoadState" => &mut state.load,
                "ActiveState" => &mut state.active,
                "SubState" => &mut state.sub,
                "Result" => &mut state.result,
                _ => continue,
            };
            *field = one_line(value);
        }
        state
    }
}

impl Units {
    pub(super) fn of_guest(reaper: Reaper) -> Self {
        Self { booted: "/run/systemd/system".into(), programs: "/usr/bin".into(), reaper, patience: PATIENCE }
    }

    #[cfg(test)]
    pub(super) fn at(booted: PathBuf, programs: PathBuf, reaper: Reaper, patience: Duration) -> Self {
        Self { booted, programs, reaper, patience }
    }

    /// Whether the service of this name is on its way up, or has yet to be started.
    pub(super) async fn is_starting(&self, name: &str) -> bool {
        let starts = |state: State| match state.active.as_str() {
            "activating" => true,
            "inactive" => !state.job.is_empty(),
            _ => false,
        };
        self.booted.exists() && self.state(name).await.is_ok_and(starts)
    }

    /// What there is to know of the service of this name, and what to do, after a colon.
    pub(super) async fn tell(&self, name: &str) -> String {
        if !self.booted.exists() {
            return "this guest image has no such service; kata-ctl image build --flavour services makes one that may"
                .to_owned();
        }
        let unit = format!("{name}.service");
        let state = match self.state(name).await {
            Ok(state) => state,
            Err(error) => return format!("the guest does not say what its unit {unit} is doing ({error})"),
        };
        if state.load == "not-found" {
            return format!("the guest image has no unit {unit}; an extension of the image may bring it");
        }
        let State { id, active, sub, result, .. } = state;
        let unit = if id.is_empty() { unit } else { id };
        let said = match self.last_words(&unit).await {
            Ok(line) if !line.is_empty() => format!(", and the last line of its log is: {line}"),
            Ok(_) => ", and its log is empty".to_owned(),
            Err(_) => ", and the guest keeps no log of it that could be read".to_owned(),
        };
        format!("its unit {unit} is {active} ({sub}, result {result}){said}")
    }

    async fn state(&self, name: &str) -> io::Result<State> {
        let unit = format!("{name}.service");
        let answer = self
            .ask("systemctl", &["show", "-p", "Id,Job,LoadState,ActiveState,SubState,Result", "--", &unit])
            .await?;
        Ok(State::parse(&answer))
    }

    async fn last_words(&self, unit: &str) -> io::Result<String> {
        let answer =
            self.ask("journalctl", &["-q", "--no-pager", "-n", "1", "-o", "cat", "-u", unit]).await?;
        Ok(one_line(&answer))
    }

    /// What a program of systemd prints.
    async fn ask(&self, program: &str, arguments: &[&str]) -> io::Result<String> {
        // A file in memory: no pipe whose other end would have to be read meanwhile.
        let mut answer = File::from(memfd_create("answer", MemfdFlags::CLOEXEC)?);
        let mut command = Command::new(self.programs.join(program));
        command.args(arguments).env_clear().current_dir("/");
        command.stdin(Stdio::null()).stdout(answer.try_clone()?).stderr(Stdio::null());
        let (pid, exit) = self.reaper.spawn(&mut command)?;
        let failed = |what: String| io::Error::other(format!("{program} {what}"));
        match tokio::time::timeout(self.patience, exit.wait()).await {
            Ok(ExitStatus::Exited(0)) => {}
            Ok(status) => return Err(failed(format!("ended with {}", status.code()))),
            Err(_) => {
                let _ = kill_process(pid, Signal::KILL);
                return Err(failed(format!("did not answer within {:?}", self.patience)));
            }
        }
        answer.rewind()?;
        let mut bytes = Vec::new();
        answer.take(ANSWER_MAX).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;

    fn program(dir: &Path, name: &str, text: &str) {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A guest with these two programs. One for each test: two reapers would take each other's children.
    fn units(dir: &Path, systemctl: &str, journalctl: &str) -> Units {
        patient_units(dir, systemctl, journalctl, Duration::from_secs(30))
    }

    fn patient_units(dir: &Path, systemctl: &str, journalctl: &str, patience: Duration) -> Units {
        program(dir, "systemctl", systemctl);
        program(dir, "journalctl", journalctl);
        let reaper = Reaper::new();
        tokio::spawn(reaper.clone().run());
        Units::at(dir.to_owned(), dir.to_owned(), reaper, patience)
    }

    #[tokio::test]
    async fn a_failed_unit_is_told_with_the_last_line_of_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let state =
            "echo LoadState=loaded; echo ActiveState=failed; echo SubState=failed; echo Result=exit-code";
        let told = units(dir.path(), state, "echo cannot read $8").tell("image-pull").await;
        let expected = "its unit image-pull.service is failed (failed, result exit-code), and the last line of its log is: \
                        cannot read image-pull.service";
        assert_eq!(told, expected);
    }

    #[tokio::test]
    async fn a_unit_that_the_image_does_not_have_is_told_as_that() {
        let dir = tempfile::tempdir().unwrap();
        let units = units(dir.path(), "echo LoadState=not-found; echo ActiveState=inactive", "exit 1");
        let told = units.tell("secure-mount").await;
        assert!(told.contains("no unit secure-mount.service"), "{told}");
        assert!(!units.is_starting("secure-mount").await);
    }

    #[tokio::test]
    async fn a_unit_on_its_way_up_is_starting() {
        let dir = tempfile::tempdir().unwrap();
        let units = units(dir.path(), "echo ActiveState=activating", "exit 1");
        assert!(units.is_starting("image-pull").await);
        let told = units.tell("image-pull").await;
        assert!(told.contains("is activating") && told.contains("keeps no log"), "{told}");
    }

    #[tokio::test]
    async fn a_unit_that_waits_for_its_turn_is_starting_and_one_that_nobody_starts_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let units = units(dir.path(), "", "");
        for (state, starting) in [
            ("echo ActiveState=inactive; echo Job=7", true),
            ("echo ActiveState=inactive", false),
            ("echo ActiveState=failed; echo Job=7", false),
        ] {
            program(dir.path(), "systemctl", state);
            assert_eq!(units.is_starting("image-pull").await, starting, "{state}");
        }
    }

    #[tokio::test]
    async fn a_unit_of_another_name_is_told_by_its_own_and_so_is_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let state = "echo Id=extension-x.a.service; echo ActiveState=failed; echo SubState=failed; echo Result=exit-code";
        let told = units(dir.path(), state, "echo the log of $8").tell("image-pull").await;
        assert!(told.starts_with("its unit extension-x.a.service is failed"), "{told}");
        assert!(told.ends_with("the log of extension-x.a.service"), "{told}");
    }

    #[tokio::test]
    async fn an_init_that_does_not_answer_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let begin = std::time::Instant::now();
        let units = patient_units(dir.path(), "exec sleep 60", "exec sleep 60", Duration::from_millis(300));
        let told = units.tell("image-pull").await;
        assert!(told.contains("did not answer within 300ms"), "{told}");
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    #[tokio::test]
    async fn a_guest_without_an_init_of_its_own_has_no_such_service() {
        let dir = tempfile::tempdir().unwrap();
        let units = Units::at(dir.path().join("absent"), dir.path().to_owned(), Reaper::new(), PATIENCE);
        assert!(units.tell("image-pull").await.contains("this guest image has no such service"));
        assert!(!units.is_starting("image-pull").await);
    }
}
