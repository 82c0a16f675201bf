//! Hooks that the guest runs for a container, by its own process, one after the other.
//!
//! | hook | program of | when | runs as |
//! |---|---|---|---|
//! | `createContainer` | the guest | mounts and devices are there, the root is not entered yet | root of the guest, in the container's namespaces |
//! | `startContainer` | the container | it is started, its command is next | the command: its user, capabilities, seccomp filter |
//!
//! Each reads the container's state as JSON from its input (OCI runtime specification, "State"); `pid` is the one that the
//! container knows itself by. The first that fails ends the container with the last line of its error output.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Spec};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::EngineError;
use super::restrictions::Restrictions;
use super::wire::Failure;

/// Bound on a hook that names none, as on the host.
const BOUND: Duration = Duration::from_secs(60);
/// A year: what asks for more means no bound, and clocks can count no further than some.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
/// How often a running hook is looked at: the process that waits for it has no other way.
const LOOK: Duration = Duration::from_millis(2);
/// How much of a hook's error output is looked at.
const OUTPUT: u64 = 4096;

/// The hooks of one container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct HooksPlan {
    pub create: Vec<HookPlan>,
    pub start: Vec<HookPlan>,
    /// The container's state but for what changes: status and pid.
    state: Value,
}

/// One program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HookPlan {
    path: PathBuf,
    /// With the program's own name first; empty for its path alone.
    args: Vec<String>,
    env: Vec<String>,
    /// How long it may run.
    bound: Duration,
}

impl HooksPlan {
    /// The hooks that `spec` has for the guest.
    pub(super) fn of(id: &str, spec: &Spec, bundle: &std::path::Path) -> Result<Self, EngineError> {
        let Some(hooks) = spec.hooks() else { return Ok(Self::default()) };
        let state = json!({
            "ociVersion": spec.version(),
            "id": id,
            "bundle": bundle,
            "annotations": spec.annotations().clone().unwrap_or_default(),
        });
        Ok(Self {
            create: plans("hooks.createContainer", hooks.create_container().as_deref())?,
            start: plans("hooks.startContainer", hooks.start_container().as_deref())?,
            state,
        })
    }

    /// Runs `createContainer`.
    pub(super) fn run_before_root(&self) -> Result<(), Failure> {
        self.run(&self.create, "creating", None)
    }

    /// Runs `startContainer`, each under the restrictions of the command. They are not yet on this process, which has to do
    /// more for a hook than a profile for the command may allow.
    pub(super) fn run_before_command(&self, restrictions: &Restrictions) -> Result<(), Failure> {
        self.run(&self.start, "created", Some(restrictions))
    }

    fn run(
        &self,
        hooks: &[HookPlan],
        status: &'static str,
        restrictions: Option<&Restrictions>,
    ) -> Result<(), Failure> {
        hooks.iter().try_for_each(|hook| {
            let mut state = self.state.clone();
            if let Some(fields) = state.as_object_mut() {
                fields.insert("status".to_owned(), json!(status));
                fields.insert("pid".to_owned(), json!(std::process::id()));
            }
            hook.run(&state, restrictions)
        })
    }
}

fn plans(key: &str, hooks: Option<&[Hook]>) -> Result<Vec<HookPlan>, EngineError> {
    let plan = |hook: &Hook| {
        if !hook.path().is_absolute() {
            return Err(EngineError::invalid(key, format!("{:?} is not an absolute path", hook.path())));
        }
        let bound = match hook.timeout() {
            None => BOUND,
            Some(seconds) => u64::try_from(seconds)
                .ok()
                .filter(|seconds| *seconds > 0)
                .map(Duration::from_secs)
                .ok_or_else(|| EngineError::invalid(key, format!("a timeout of {seconds} s")))?,
        };
        let (args, env) = (hook.args().clone().unwrap_or_default(), hook.env().clone().unwrap_or_default());
        Ok(HookPlan { path: hook.path().clone(), args, env, bound })
    };
    hooks.unwrap_or_default().iter().map(plan).collect()
}

impl HookPlan {
    fn run(&self, state: &Value, restrictions: Option<&Restrictions>) -> Result<(), Failure> {
        let step = |what: &str| format!("{what} the hook {}", self.path.display());
        let failed = |error: io::Error| Failure::setup(step("run"), error);
        // Files in memory: whatever a hook reads or writes, nobody has to be there for it.
        let memory = || {
            memfd_create("hook", MemfdFlags::CLOEXEC).map(File::from).map_err(|error| failed(error.into()))
        };
        let (mut input, mut output) = (memory()?, memory()?);
        input.write_all(state.to_string().as_bytes()).and_then(|()| input.rewind()).map_err(failed)?;
        let mut command = Command::new(&self.path);
        if let Some((name, rest)) = self.args.split_first() {
            command.arg0(name).args(rest);
        }
        let pairs = self.env.iter().map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        command.env_clear().envs(pairs).stdin(input).stdout(memory()?);
        command.stderr(output.try_clone().map_err(failed)?);
        if let Some(restrictions) = restrictions.cloned() {
            // SAFETY: this process has one thread, so what it has locked its child can unlock.
            unsafe { command.pre_exec(move || restrictions.put_on_child()) };
        }
        let mut child = command.spawn().map_err(failed)?;
        let deadline = Instant::now() + self.bound.min(LONGEST);
        let status = loop {
            match child.try_wait().map_err(failed)? {
                Some(status) => break status,
                None if Instant::now() < deadline => std::thread::sleep(LOOK),
                None => {
                    let _ = child.kill();
                    let _ = child.wait();
                    let late = format!(
                        "it did not end within {:?} and was killed{}",
                        self.bound,
                        last_line(&mut output)
                    );
                    return Err(failed(io::Error::other(late)));
                }
            }
        };
        if status.success() {
            return Ok(());
        }
        Err(failed(io::Error::other(format!("it {}{}", ended(status), last_line(&mut output)))))
    }
}

fn ended(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, signal) => format!("was ended by signal {}", signal.unwrap_or_default()),
    }
}

/// `: ` and the last line of what a hook said, or nothing.
fn last_line(output: &mut File) -> String {
    let mut text = Vec::new();
    let length = output.metadata().map_or(0, |metadata| metadata.len());
    let from = io::SeekFrom::Start(length.saturating_sub(OUTPUT));
    if output.seek(from).and_then(|_| output.take(OUTPUT).read_to_end(&mut text)).is_err() {
        return String::new();
    }
    let text = String::from_utf8_lossy(&text);
    text.trim_end().lines().next_back().map(|line| format!(": {line}")).unwrap_or_default()
}
