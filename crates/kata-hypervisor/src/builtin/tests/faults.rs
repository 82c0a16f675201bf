//! A monitor that is killed, stopped, or answers what is none.

use std::io::Write as _;

use rustix::process::{Signal, kill_process};

use super::*;

/// A machine that runs, with somebody who sees its end.
async fn watched() -> (BuiltinVm, StdUnixStream, Pid, Bench) {
    let (vm, peer, bench) = running().await;
    let child = vm.vmm.control("watching").unwrap().child;
    let pid = Pid::from_raw(i32::try_from(child.pid()).unwrap()).unwrap();
    let life = Arc::clone(&vm.vmm.life);
    tokio::spawn(async move { life.supervise(child, Vec::new()).await });
    (vm, peer, pid, bench)
}

#[tokio::test]
async fn monitor_that_is_killed_is_the_answer_to_the_command_under_way_and_to_every_later_one() {
    // The second is what a monitor dies of whose memory file was cut off.
    for signal in [Signal::KILL, Signal::BUS] {
        let (vm, peer, pid, _bench) = watched().await;
        let killed = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            drop(peer);
            kill_process(pid, signal).unwrap();
        };
        let (now, ()) = tokio::join!(vm.pause(), killed);
        for error in [now.unwrap_err(), vm.resume().await.unwrap_err()] {
            assert!(
                matches!(&error, HypervisorError::Ended(VmExit::Signal(by)) if *by == signal.as_raw()),
                "{error}"
            );
        }
        assert_eq!(vm.exited().await, VmExit::Signal(signal.as_raw()));
        assert_eq!(vm.processes(), []);
    }
}

#[tokio::test]
async fn monitor_that_is_stopped_is_told_by_the_command_and_its_bound_and_can_be_ended() {
    let (vm, _peer, pid, _bench) = watched().await;
    kill_process(pid, Signal::STOP).unwrap();
    tokio::time::pause();
    let error = vm.pause().await.unwrap_err();
    tokio::time::resume();
    assert!(
        matches!(
            &error,
            HypervisorError::Builtin(BuiltinError::NoAnswer { command: "pause", bound }) if *bound == COMMAND_BOUND
        ),
        "{error}"
    );
    assert_eq!(vm.processes().len(), 1);
    vm.stop().await.unwrap();
    assert_eq!((vm.exited().await, vm.processes()), (VmExit::Stopped, Vec::new()));
}

#[tokio::test]
async fn monitor_that_closes_its_socket_and_runs_on_is_named_with_the_command() {
    let (vm, peer, _pid, _bench) = watched().await;
    drop(peer);
    let error = vm.pause().await.unwrap_err();
    assert!(matches!(error, HypervisorError::Builtin(BuiltinError::Closed { command: "pause" })), "{error}");
    vm.stop().await.unwrap();
}

#[tokio::test]
async fn disk_that_is_gone_is_named_before_the_monitor_is_asked() {
    let (vm, peer, _pid, bench) = watched().await;
    let path = bench.dir.path().join("image");
    std::fs::remove_file(&path).unwrap();
    let disk = Disk { id: "data".to_owned(), path: path.clone(), readonly: true };
    let error = vm.add_device(disk.into()).await.unwrap_err();
    assert!(matches!(&error, HypervisorError::File { path: named, .. } if *named == path), "{error}");
    let server = tokio::task::spawn_blocking(move || serve(&peer, done).0);
    vm.pause().await.unwrap();
    assert_eq!(server.await.unwrap(), Command::Pause);
    vm.stop().await.unwrap();
}

#[tokio::test]
async fn answer_of_which_the_end_comes_too_late_is_read_by_the_next_caller() {
    let (client, peer) = pair();
    let server = tokio::task::spawn_blocking(move || {
        let answer = |id| {
            let mut first = done(id);
            first.truncate(5);
            first
        };
        let first = serve(&peer, answer).0;
        // Past the bound of whoever asked.
        std::thread::sleep(Duration::from_millis(400));
        (&peer).write_all(&done(1)[5..]).unwrap();
        (first, serve(&peer, done).0)
    });
    let slow = client.execute(Command::Pause, Descriptors::default(), Duration::from_millis(200)).await;
    assert!(matches!(slow, Err(BuiltinError::NoAnswer { command: "pause", .. })), "{slow:?}");
    client.execute(Command::Resume, Descriptors::default(), COMMAND_BOUND).await.unwrap();
    assert_eq!(server.await.unwrap(), (Command::Pause, Command::Resume));
}

/// What is made of an answer behind which the socket is closed.
async fn made_of(answer: Vec<u8>) -> BuiltinError {
    let (client, peer) = pair();
    let server = std::thread::spawn(move || {
        serve(&peer, |_| Vec::new());
        // Whoever has read enough may be gone.
        let _ = (&peer).write_all(&answer);
    });
    let answer = client.execute(Command::Info, Descriptors::default(), COMMAND_BOUND).await;
    drop(client);
    tokio::task::spawn_blocking(|| server.join().unwrap()).await.unwrap();
    answer.unwrap_err()
}

#[tokio::test]
async fn answer_without_end_is_cut_off_and_one_without_its_end_is_none() {
    let longest = vec![b'x'; kata_vmm_api::MAX_LINE + 1];
    let error = made_of(longest).await;
    assert!(matches!(&error, BuiltinError::Garbled { said, .. } if said.len() == 200), "{error}");
    let error = made_of(b"{\"id\":1,\"done\":\"no".to_vec()).await;
    assert!(matches!(error, BuiltinError::Closed { command: "info" }), "{error}");
    let other = made_of(done(7)).await;
    assert!(matches!(&other, BuiltinError::Garbled { said, .. } if said.contains("\"id\":7")), "{other}");
}
