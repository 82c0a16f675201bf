//! The OCI bundle of a pod: `config.json` from the image's configuration and the user's flags.
//!
//! The defaults are those that Docker's users expect: its fourteen capabilities, its masked and read-only paths, its
//! mounts. Where they differ, a comment says so.

mod filter;
mod volume;

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kata_oci::{ProcessDefaults, RootStack, User, UserError};
use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};

pub use volume::Volume;

/// Capabilities of a container's processes where nothing is said: those that container runtimes give.
pub const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Files of /proc and /sys that tell about the kernel, or reach into it.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Files of /proc that steer the kernel.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Where programs are looked for when the image does not say.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Open files: programs that close every possible one should not take seconds for it, others may raise the limit.
const OPEN_FILES: (u64, u64) = (1024, 524_288);
/// The image specification's name for the signal that asks a container to end (conversion to a runtime configuration).
const STOP_SIGNAL: &str = "org.opencontainers.image.stopSignal";

/// What the user asked for.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Name of the pod; also the host name.
    pub name: String,
    /// Command line; empty for the image's.
    pub command: Vec<String>,
    /// `NAME=value`, or `NAME` for the value that the variable has here.
    pub env: Vec<String>,
    /// Working directory.
    pub workdir: Option<String>,
    /// `user[:group]`, by name or number.
    pub user: Option<String>,
    /// No writing to the root file system.
    pub read_only: bool,
    /// A pseudo terminal.
    pub terminal: bool,
    /// Columns and rows of the terminal, where they are known.
    pub size: Option<(u16, u16)>,
    /// Files and directories of the host.
    pub volumes: Vec<Volume>,
}

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Nothing to run.
    #[error("the image names no command: give one after the image")]
    NoCommand,
    /// A working directory that depends on something.
    #[error("the working directory {0:?} is not an absolute path")]
    WorkingDirectory(String),
    /// A variable without a name.
    #[error("{0:?} is not NAME=VALUE")]
    Environment(String),
    /// No such user.
    #[error(transparent)]
    User(#[from] UserError),
    /// A file of the bundle cannot be written or read.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The configuration is not one of the runtime specification.
    #[error("{} is not a configuration of the OCI runtime specification", path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
}

/// Writes the bundle into `dir`, which is made: `config.json`, the files behind /etc/hostname and /etc/hosts, and the
/// mount point `rootfs`.
///
/// # Errors
/// [`BundleError`].
pub fn write(
    dir: &Path,
    request: &Request,
    image: &ProcessDefaults,
    root: &RootStack,
) -> Result<(), BundleError> {
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| BundleError::Io { action, path, source }
    };
    // Variables may be secrets, and the mounted root file system may hold set-uid programs.
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io("create", dir))?;
    let rootfs = dir.join("rootfs");
    fs::create_dir_all(&rootfs).map_err(io("create", &rootfs))?;
    for (name, content) in etc_files(&request.name) {
        let path = dir.join(name);
        fs::write(&path, content).map_err(io("write", &path))?;
        // Every user in the container reads it, whatever the umask here.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))
            .map_err(io("set the mode of", &path))?;
    }
    root.store(dir).map_err(io("write into", dir))?;
    let path = dir.join("config.json");
    let spec = spec(dir, request, image, root)?;
    let text =
        serde_json::to_vec(&spec).map_err(|source| BundleError::Spec { path: path.clone(), source })?;
    fs::write(&path, text).map_err(io("write", &path))
}

/// The process of the container whose bundle is in `dir`: what `exec` starts from.
///
/// # Errors
/// [`BundleError`].
pub fn process_of(dir: &Path) -> Result<Process, BundleError> {
    Ok(read(dir)?.process_mut().take().unwrap_or_default())
}

/// The configuration of the bundle in `dir`, as it is there.
///
/// # Errors
/// [`BundleError`].
pub fn read(dir: &Path) -> Result<Spec, BundleError> {
    let path = dir.join("config.json");
    let text =
        fs::read(&path).map_err(|source| BundleError::Io { action: "read", path: path.clone(), source })?;
    serde_json::from_slice(&text).map_err(|source| BundleError::Spec { path, source })
}

/// An annotation of the container whose bundle is in `dir`, if it can be read.
pub fn annotation(dir: &Path, key: &str) -> Option<String> {
    read(dir).ok()?.annotations().as_ref()?.get(key).cloned()
}

/// Appends `extra` (`NAME=value`, or `NAME` for this process's value) to `env`, replacing what has the same name.
///
/// # Errors
/// An entry without a name.
pub fn extend_env(env: &mut Vec<String>, extra: &[String]) -> Result<(), BundleError> {
    for entry in extra {
        let name = entry.split('=').next().unwrap_or_default();
        if name.is_empty() || entry.contains('\0') {
            return Err(BundleError::Environment(entry.clone()));
        }
        env.retain(|old| old.split('=').next() != Some(name));
        match entry.contains('=') {
            true => env.push(entry.clone()),
            // As elsewhere, a variable that is not set here is not set there either.
            false => env.extend(std::env::var(name).ok().map(|value| format!("{name}={value}"))),
        }
    }
    Ok(())
}

/// Checks a working directory.
///
/// # Errors
/// It is not absolute.
pub fn absolute(workdir: &str) -> Result<&str, BundleError> {
    match workdir.starts_with('/') {
        true => Ok(workdir),
        false => Err(BundleError::WorkingDirectory(workdir.to_owned())),
    }
}

fn etc_files(name: &str) -> [(&'static str, String); 2] {
    let hosts = format!(
        "127.0.0.1\tlocalhost {name}\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
    );
    [("hostname", format!("{name}\n")), ("hosts", hosts)]
}

/// The configuration of the bundle in `dir`.
///
/// # Errors
/// [`BundleError`].
pub fn spec(
    dir: &Path,
    request: &Request,
    image: &ProcessDefaults,
    root: &RootStack,
) -> Result<Spec, BundleError> {
    // Labels of the image do not become annotations: annotations can configure the pod, and images are not trusted to.
    let annotations = image.stop_signal.as_ref().map(|signal| json!({ STOP_SIGNAL: signal }));
    let document = json!({
        "ociVersion": "1.2.0",
        "process": process(request, image, root)?,
        "root": { "path": "rootfs", "readonly": request.read_only },
        "hostname": request.name,
        "mounts": mounts(dir, request),
        "annotations": annotations.unwrap_or_else(|| json!({})),
        "linux": linux(&request.name),
    });
    serde_json::from_value(document)
        .map_err(|source| BundleError::Spec { path: dir.join("config.json"), source })
}

fn process(request: &Request, image: &ProcessDefaults, root: &RootStack) -> Result<Value, BundleError> {
    let user = request.user.as_deref().or(image.user.as_deref()).unwrap_or_default();
    let user = User::resolve(user, root)?;
    let workdir = request.workdir.as_deref().or(image.working_dir.as_deref()).filter(|dir| !dir.is_empty());
    Ok(json!({
        "terminal": request.terminal,
        "consoleSize": request.size.map(|(columns, rows)| json!({ "height": rows, "width": columns })),
        "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups },
        "args": args(request, image)?,
        "env": env(request, image, &user)?,
        "cwd": absolute(workdir.unwrap_or("/"))?,
        // Nothing is inheritable: a program without the right attributes on its file gains nothing.
        "capabilities": {
            "bounding": CAPABILITIES,
            "effective": CAPABILITIES,
            "permitted": CAPABILITIES,
        },
        "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": OPEN_FILES.0, "hard": OPEN_FILES.1 }],
        "noNewPrivileges": false,
    }))
}

/// The user's command replaces the image's, and is itself given to the image's entry point.
fn args(request: &Request, image: &ProcessDefaults) -> Result<Vec<String>, BundleError> {
    let command = match request.command.as_slice() {
        [] => image.cmd.clone().unwrap_or_default(),
        command => command.to_vec(),
    };
    let args: Vec<String> = image.entrypoint.clone().unwrap_or_default().into_iter().chain(command).collect();
    if args.is_empty() { Err(BundleError::NoCommand) } else { Ok(args) }
}

fn env(request: &Request, image: &ProcessDefaults, user: &User) -> Result<Vec<String>, BundleError> {
    let mut env = vec![PATH.to_owned(), format!("HOSTNAME={}", request.name)];
    if request.terminal {
        env.push(format!("TERM={}", std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned())));
    }
    extend_env(&mut env, image.env.as_deref().unwrap_or_default())?;
    extend_env(&mut env, &request.env)?;
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        env.push(format!("HOME={}", user.home));
    }
    Ok(env)
}

fn mounts(dir: &Path, request: &Request) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": source, "options": options });
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
    ];
    let taken = |path: &str| request.volumes.iter().any(|volume| volume.destination == path);
    for (path, file) in [("/etc/hostname", "hostname"), ("/etc/hosts", "hosts")] {
        if !taken(path) {
            mounts.push(mount(path, "bind", &dir.join(file).to_string_lossy(), &["rbind", "rprivate", "rw"]));
        }
    }
    for volume in &request.volumes {
        let mode = if volume.read_only { "ro" } else { "rw" };
        mounts.push(mount(&volume.destination, "bind", &volume.source, &["rbind", "rprivate", mode]));
    }
    mounts
}

fn linux(name: &str) -> Value {
    // No network namespace: the guest's own is the pod's.
    let namespaces = ["pid", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({ "type": kind }));
    json!({
        "namespaces": namespaces,
        "cgroupsPath": format!("/kata/{name}"),
        "maskedPaths": MASKED,
        "readonlyPaths": READ_ONLY,
        // The devices that every container has are added by the runtime (runtime specification, "Default Devices").
        "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
        "seccomp": filter::profile(),
    })
}

#[cfg(test)]
mod tests;
