//! Each virtual CPU on a CPU of the host of its own.

use rustix::process::Pid;
use rustix::thread::{CpuSet as Affinity, sched_setaffinity};

use super::CpuSet;

/// Pins the threads, in order, where there are as many CPUs; else lets those run anywhere that were `pinned`. Whether they are
/// pinned now is the answer.
pub(super) fn arrange(threads: &[u32], cpus: Option<&CpuSet>, pinned: bool) -> bool {
    match cpus.filter(|cpus| cpus.0.len() == threads.len()) {
        Some(cpus) => {
            let pairs = threads.iter().zip(&cpus.0);
            pairs.fold(true, |all, (thread, cpu)| set(*thread, &[*cpu]) && all)
        }
        None => {
            if pinned {
                // Within the pod's cpuset, which the kernel looks after.
                let all: Vec<u32> = (0..u32::try_from(Affinity::MAX_CPU).unwrap_or(u32::MAX)).collect();
                for thread in threads {
                    set(*thread, &all);
                }
            }
            false
        }
    }
}

/// Whether the thread is there, and was put there. One that ended needs no place.
fn set(thread: u32, cpus: &[u32]) -> bool {
    let mut affinity = Affinity::new();
    for cpu in cpus.iter().filter_map(|cpu| usize::try_from(*cpu).ok()) {
        if cpu < Affinity::MAX_CPU {
            affinity.set(cpu);
        }
    }
    let pid = i32::try_from(thread).ok().and_then(Pid::from_raw);
    match pid.map(|pid| sched_setaffinity(Some(pid), &affinity)) {
        Some(Ok(())) => true,
        Some(Err(error)) => {
            tracing::warn!(thread, ?cpus, %error, "a virtual CPU cannot be pinned");
            false
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::sched_getaffinity;

    use super::*;

    fn own() -> Vec<usize> {
        let now = sched_getaffinity(None).unwrap();
        (0..Affinity::MAX_CPU).filter(|cpu| now.is_set(*cpu)).collect()
    }

    #[test]
    fn as_many_cpus_as_threads_are_one_each_and_any_other_number_is_none() {
        // On a thread of its own: nobody else's affinity changes.
        let seen = std::thread::spawn(|| {
            let thread = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
            let all = own();
            let first = u32::try_from(all[0]).unwrap();
            let one = CpuSet([first].into());
            assert!(arrange(&[thread], Some(&one), false));
            assert_eq!(own(), [all[0]]);
            let two = CpuSet([first, first + 1].into());
            assert!(!arrange(&[thread], Some(&two), true));
            (all, own())
        });
        let (before, after) = seen.join().unwrap();
        assert_eq!(before, after);
    }
}
