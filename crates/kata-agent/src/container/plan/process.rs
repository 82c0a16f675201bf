//! One process of a spec.

use oci_spec::runtime::{PosixRlimit, PosixRlimitType, Process};
use serde::{Deserialize, Serialize};

use crate::container::EngineError;
use crate::container::capabilities::CapabilityPlan;

/// A process, as the helper starts it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct ProcessPlan {
    /// At least one.
    pub args: Vec<String>,
    /// `NAME=value`, in order.
    pub env: Vec<String>,
    /// Absolute, in the container.
    pub cwd: String,
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups; all others are dropped.
    pub groups: Vec<u32>,
    /// File mode creation mask.
    pub umask: Option<u32>,
    /// All five sets.
    pub capabilities: CapabilityPlan,
    /// Limits to set; others are inherited from the agent.
    pub rlimits: Vec<Rlimit>,
    /// Whether `execve` may raise privileges.
    pub no_new_privileges: bool,
    /// For `/proc/self/oom_score_adj`.
    pub oom_score_adj: Option<i32>,
    /// The terminal to run on.
    pub terminal: Option<TerminalPlan>,
}

/// A terminal to be made. Sizes are in characters; zero is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct TerminalPlan {
    /// Height.
    pub rows: u16,
    /// Width.
    pub columns: u16,
}

/// One resource limit of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct Rlimit {
    /// `RLIMIT_*`.
    pub resource: u32,
    /// Soft limit; the maximum is "none".
    pub soft: u64,
    /// Hard limit; the maximum is "none".
    pub hard: u64,
}

impl ProcessPlan {
    pub(in crate::container) fn of(process: &Process) -> Result<Self, EngineError> {
        refuse(process)?;
        let args = process.args().clone().unwrap_or_default();
        if args.first().is_none_or(String::is_empty) {
            return Err(EngineError::invalid("process.args", "names no command"));
        }
        let env = process.env().clone().unwrap_or_default();
        let cwd =
            process.cwd().to_str().ok_or_else(|| EngineError::invalid("process.cwd", "is not UTF-8"))?;
        if !cwd.starts_with('/') {
            return Err(EngineError::invalid("process.cwd", format!("{cwd:?} is not absolute")));
        }
        for (key, list) in
            [("process.args", &args), ("process.env", &env), ("process.cwd", &vec![cwd.to_owned()])]
        {
            if list.iter().any(|text| text.contains('\0')) {
                return Err(EngineError::invalid(key, "contains a NUL byte"));
            }
        }
        let user = process.user();
        Ok(Self {
            args,
            env,
            cwd: cwd.to_owned(),
            uid: id("process.user.uid", user.uid())?,
            gid: id("process.user.gid", user.gid())?,
            groups: groups(user.additional_gids().as_deref().unwrap_or_default())?,
            umask: user.umask().map(|umask| umask & 0o777),
            capabilities: CapabilityPlan::of(process.capabilities().as_ref())?,
            rlimits: rlimits(process.rlimits().as_deref().unwrap_or_default())?,
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            oom_score_adj: oom_score(process.oom_score_adj())?,
            terminal: terminal(process)?,
        })
    }
}

fn refuse(process: &Process) -> Result<(), EngineError> {
    if process.selinux_label().as_ref().is_some_and(|label| !label.is_empty()) {
        return Err(EngineError::unsupported(
            "process.selinuxLabel",
            "the guest kernel does not run SELinux",
        ));
    }
    // The profile is the host's and the name comes along with every spec there; the VM stands in its place. A guest
    // kernel that does run AppArmor would be able to enforce it, so there it must not be dropped.
    if process
        .apparmor_profile()
        .as_ref()
        .is_some_and(|profile| !matches!(profile.as_str(), "" | "unconfined"))
        && apparmor_runs()
    {
        return Err(EngineError::unsupported(
            "process.apparmorProfile",
            "profiles are not applied in the guest",
        ));
    }
    let asked = [
        ("process.ioPriority", process.io_priority().is_some()),
        ("process.scheduler", process.scheduler().is_some()),
        ("process.execCPUAffinity", process.exec_cpu_affinity().is_some()),
    ];
    match asked.into_iter().find(|(_, asked)| *asked) {
        Some((key, _)) => Err(EngineError::unsupported(key, "scheduling attributes are not set")),
        None => Ok(()),
    }
}

fn apparmor_runs() -> bool {
    std::fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with(b"Y"))
}

/// -1 means "leave as it is" to the kernel's set*id calls, so it can never be a user or group.
fn id(key: &str, id: u32) -> Result<u32, EngineError> {
    if id == u32::MAX { Err(EngineError::invalid(key, "is out of range")) } else { Ok(id) }
}

fn groups(list: &[u32]) -> Result<Vec<u32>, EngineError> {
    if list.len() > 65536 {
        return Err(EngineError::invalid(
            "process.user.additionalGids",
            "has more groups than the kernel allows",
        ));
    }
    list.iter().map(|group| id("process.user.additionalGids", *group)).collect()
}

fn oom_score(score: Option<i32>) -> Result<Option<i32>, EngineError> {
    match score {
        Some(score) if !(-1000..=1000).contains(&score) => {
            Err(EngineError::invalid("process.oomScoreAdj", format!("{score} is not within -1000 and 1000")))
        }
        score => Ok(score),
    }
}

/// The size is not looked at without a terminal (OCI runtime specification, config, "Process").
fn terminal(process: &Process) -> Result<Option<TerminalPlan>, EngineError> {
    if !process.terminal().unwrap_or(false) {
        return Ok(None);
    }
    let Some(size) = process.console_size() else { return Ok(Some(TerminalPlan::default())) };
    let cells = |cells: u64| {
        u16::try_from(cells).map_err(|_| {
            EngineError::invalid("process.consoleSize", format!("{cells} rows or columns are too many"))
        })
    };
    Ok(Some(TerminalPlan { rows: cells(size.height())?, columns: cells(size.width())? }))
}

fn rlimits(list: &[PosixRlimit]) -> Result<Vec<Rlimit>, EngineError> {
    let mut limits: Vec<Rlimit> = Vec::with_capacity(list.len());
    for limit in list {
        let key = format!("process.rlimits[{}]", limit.typ());
        let resource = resource(limit.typ());
        if limits.iter().any(|seen| seen.resource == resource) {
            return Err(EngineError::invalid(key, "is listed twice"));
        }
        if limit.soft() > limit.hard() {
            return Err(EngineError::invalid(key, "the soft limit is above the hard one"));
        }
        limits.push(Rlimit { resource, soft: limit.soft(), hard: limit.hard() });
    }
    Ok(limits)
}

fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
    }
}
