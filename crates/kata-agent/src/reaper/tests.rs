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
        tokio::time::timeout(Duration::from_secs(60), test(reaper)).await.expect("the test hangs");
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
fn many_children_at_once_all_report() {
    with_reaper(|reaper| async move {
        let spawned: Vec<_> =
            (0..40).map(|code| (code, reaper.spawn(&mut sh(&format!("exit {code}"))).unwrap().1)).collect();
        for (code, exit) in spawned {
            assert_eq!(exit.wait().await.code(), code);
        }
    });
}

/// What can come in any order: a child ends, the kernel tells, somebody registers it, somebody waits. Children are made as an
/// engine's are, unknown to the reaper.
#[test]
#[expect(clippy::zombie_processes, reason = "the reaper is to find them")]
fn every_wait_is_answered_whatever_comes_first() {
    // A generator of its own: a failure is the same each time.
    let mut state = 0x9e37_79b9_u32;
    let mut random = move |below: u32| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state % below
    };
    with_reaper(|reaper| async move {
        let mut waits = Vec::new();
        for round in 0..400 {
            let code = i32::try_from(random(100)).unwrap();
            let script = ["exit", "sleep 0.002; exit", ": & exit"][usize::try_from(random(3)).unwrap()];
            let child = sh(&format!("{script} {code}")).spawn().unwrap();
            let pid = Pid::from_child(&child);
            match random(4) {
                // It has ended, and been reaped or not, before anybody registers it.
                0 => std::thread::sleep(Duration::from_millis(random(4).into())),
                1 => tokio::time::sleep(Duration::from_millis(random(4).into())).await,
                2 => tokio::task::yield_now().await,
                _ => {}
            }
            let exit = reaper.register(pid);
            let again = (random(2) == 0).then(|| (reaper.register(pid), random(8)));
            waits.push(tokio::spawn(async move {
                if let Some((again, later)) = again {
                    tokio::time::sleep(Duration::from_millis(later.into())).await;
                    let _ = again.wait().await;
                }
                (round, exit.wait().await, ExitStatus::Exited(code))
            }));
        }
        for wait in waits {
            let (round, told, meant) = wait.await.unwrap();
            assert_eq!(told, meant, "round {round}");
        }
    });
}
