//! The process of a pod's own container, which does nothing: images of it need not be pulled where the agent's own program can be
//! it. It ends when it is asked to, and reaps what others of the pod's pid namespace leave to it.

use std::io;
use std::path::Path;

use oci_spec::runtime::{Mount, Spec};
use rustix::process::{WaitOptions, wait};

/// Where the program is in the container, and the `argv[0]` that [`main`] goes by.
pub const PATH: &str = "/kata-pause";

/// Makes `spec`, whose root is empty, one of a container that pauses: by `program`, the agent's, by its path. The link to it in
/// /proc leads to a mount of the agent's own namespace, which cannot be bound in a container's.
pub fn adapt(spec: &mut Spec, program: &Path) {
    let mut mount = Mount::default();
    mount
        .set_destination(PATH.into())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(program.into()))
        .set_options(Some(["bind", "ro", "nosuid", "nodev"].map(str::to_owned).to_vec()));
    spec.mounts_mut().get_or_insert_default().push(mount);
    if let Some(process) = spec.process_mut() {
        process.set_args(Some(vec![PATH.to_owned()]));
        process.set_cwd(Path::new("/").into());
    }
}

/// Waits for a signal that asks for the end. The exit code is that of a pause: 0, or 1 where signals cannot be had.
#[must_use]
pub fn main() -> u8 {
    match run() {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

fn run() -> io::Result<()> {
    let signals = blocked(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD])?;
    loop {
        // SAFETY: the set is initialised, and no information on the signal is asked for.
        match unsafe { libc::sigwaitinfo(&raw const signals, std::ptr::null_mut()) } {
            libc::SIGTERM | libc::SIGINT => return Ok(()),
            // Several ends may be one signal.
            libc::SIGCHLD => while matches!(wait(WaitOptions::NOHANG), Ok(Some(_))) {},
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// The set of these signals, which wait to be fetched from now on.
fn blocked(signals: &[libc::c_int]) -> io::Result<libc::sigset_t> {
    // SAFETY: sigset_t is plain data for which all zeroes is a valid value.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid place for the length of the call.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in signals {
        // SAFETY: as above.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    // SAFETY: the set is initialised, and the old one is not asked for.
    match unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(set),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_that_pauses_runs_the_agents_program_and_keeps_the_rest_of_its_process() {
        let mut spec = Spec::default();
        let env = spec.process().as_ref().unwrap().env().clone();
        let program = Path::new("/usr/bin/agent");
        adapt(&mut spec, program);
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.args().as_deref(), Some([PATH.to_owned()].as_slice()));
        assert_eq!(process.env(), &env);
        let mount = spec.mounts().as_ref().unwrap().last().unwrap();
        assert_eq!(
            (mount.destination().as_path(), mount.source().as_deref()),
            (Path::new(PATH), Some(program))
        );
    }
}
