use super::*;

/// Runs `test` with the reaper's loop. Children are per process, so tests that reap must not share one:
/// nextest gives each its own, and plain `cargo test` takes turns by this lock.
fn with_reaper<F: Future<Output = ()>>(test: impl FnOnce(Reaper) -> F) {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let reaper = Reaper::new();
        let running = tokio::spawn(reaper.clone().run());
        tokio::time::timeout(Duration::from_secs(20), test(reaper)).await.expect("the test hangs");
        running.abort();
    });
}

fn sh(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    command
}

#[test]
fn a_spawned_process_gives_its_exit_code() {
    with_reaper(|reaper| async move {
        let (_, exit) = reaper.spawn(&mut sh("exit 7")).unwrap();
        assert_eq!(exit.wait().await, ExitStatus::Exited(7));
        assert_eq!(exit.clone().wait().await.code(), 7, "a second waiter gets it too");
    });
}

#[test]
fn a_killed_process_gives_128_plus_the_signal() {
    with_reaper(|reaper| async move {
        let (_, exit) = reaper.spawn(&mut sh("kill -9 $$")).unwrap();
        assert_eq!(exit.wait().await.code(), 137);
    });
}

#[test]
#[expect(clippy::zombie_processes, reason = "the reaper is to find it")]
fn a_child_that_ended_before_it_was_registered_is_not_lost() {
    with_reaper(|reaper| async move {
        let child = sh("exit 3").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        while test_kill_process(pid).is_ok() {
            tokio::task::yield_now().await;
        }
        assert_eq!(reaper.register(pid).wait().await, ExitStatus::Exited(3));
    });
}

#[test]
fn a_pid_that_never_was_a_child_is_lost_and_does_not_hang() {
    with_reaper(|reaper| async move {
        let pid = Pid::from_raw(i32::MAX - 1).unwrap();
        assert_eq!(reaper.register(pid).wait().await, ExitStatus::Lost);
    });
}

#[test]
fn a_held_child_is_left_to_its_own_waiter_and_hides_no_other() {
    with_reaper(|reaper| async move {
        let hold = reaper.hold();
        let mut owned = sh("exit 5").spawn().unwrap();
        let (_, exit) = reaper.spawn(&mut sh("exit 6")).unwrap();
        assert_eq!(exit.wait().await.code(), 6);
        assert_eq!(owned.wait().unwrap().code(), Some(5));
        drop(hold);
        let (_, exit) = reaper.spawn(&mut sh("exit 8")).unwrap();
        assert_eq!(exit.wait().await.code(), 8);
    });
}

#[test]
fn many_children_at_once_all_report() {
    with_reaper(|reaper| async move {
        let spawned: Vec<_> =
            (0..40).map(|code| (code, reaper.spawn(&mut sh(&format!("exit {code}"))).unwrap().1)).collect();
        for (code, exit) in spawned {
            assert_eq!(exit.wait().await.code(), code);
        }
    });
}
