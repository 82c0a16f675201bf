//! Core scheduling: no process of another pod runs beside a pod's on the same core's hardware threads.
//!
//! containerd asks for it by `SCHED_CORE` in the environment of its shims. The owner takes a cookie of its own before it
//! has a second thread; all that it starts for the pod inherits it (kernel documentation, "Core Scheduling").

use std::ffi::OsStr;

use rustix::io::Errno;
use rustix::thread::{CoreSchedulingScope, create_core_scheduling_cookie};
use thiserror::Error;

/// What asks for it.
const VARIABLE: &str = "SCHED_CORE";

#[derive(Debug, Error)]
#[error(
    "{VARIABLE} asks for core scheduling, and the kernel does not give it; leave {VARIABLE} unset for containerd, or use a \
     kernel with CONFIG_SCHED_CORE"
)]
pub(crate) struct SchedCoreError(#[source] Errno);

/// Does as the environment asks.
pub(crate) fn enter() -> Result<(), SchedCoreError> {
    if asked(std::env::var_os(VARIABLE).as_deref()) {
        settle(create_core_scheduling_cookie(rustix::process::getpid(), CoreSchedulingScope::ThreadGroup))
    } else {
        Ok(())
    }
}

/// Any value asks, as with runc's shim.
fn asked(value: Option<&OsStr>) -> bool {
    value.is_some_and(|value| !value.is_empty())
}

fn settle(made: Result<(), Errno>) -> Result<(), SchedCoreError> {
    match made {
        // No core of this host has a second hardware thread: nobody can be beside the pod.
        Ok(()) | Err(Errno::NODEV) => Ok(()),
        Err(error) => Err(SchedCoreError(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_hardware_threads_needs_no_core_scheduling_and_a_kernel_without_it_is_an_error() {
        assert!(asked(Some(OsStr::new("1"))) && !asked(Some(OsStr::new(""))) && !asked(None));
        settle(Err(Errno::NODEV)).unwrap();
        let error = settle(Err(Errno::INVAL)).unwrap_err().to_string();
        assert!(error.contains("CONFIG_SCHED_CORE"), "{error}");
    }

    #[test]
    fn a_core_scheduling_cookie_is_given_where_the_kernel_has_them() {
        // For this thread alone, which ends with the test.
        let made = std::thread::spawn(|| {
            let thread = rustix::thread::gettid();
            let made = create_core_scheduling_cookie(thread, CoreSchedulingScope::Thread);
            made.map(|()| rustix::thread::core_scheduling_cookie(thread, CoreSchedulingScope::Thread))
        });
        match made.join().unwrap() {
            Ok(cookie) => assert_ne!(cookie.unwrap(), 0),
            Err(error) => kata_testkit::skip(&format!("no core scheduling on this host: {error}")),
        }
    }
}
