//! Where pods live on the host.

use std::path::PathBuf;

/// Directory of the pods' run time state, `<run_dir>/<id>` each: `KATA_RUN_DIR`, else `/run/kata`.
pub fn run_dir() -> PathBuf {
    from_env("KATA_RUN_DIR", "/run/kata")
}

/// Directory of what outlives a pod's run (image layers, writable layers): `KATA_STATE_DIR`, else `/var/lib/kata`.
pub fn state_dir() -> PathBuf {
    from_env("KATA_STATE_DIR", "/var/lib/kata")
}

fn from_env(name: &str, default: &str) -> PathBuf {
    // A relative or empty override would depend on the working directory of each process: not a place.
    match std::env::var_os(name).map(PathBuf::from) {
        Some(path) if path.is_absolute() => path,
        Some(path) => {
            tracing::warn!(variable = name, value = %path.display(), "not an absolute path: ignored");
            PathBuf::from(default)
        }
        None => PathBuf::from(default),
    }
}
