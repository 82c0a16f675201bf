//! Latency, printed. Run with `--run-ignored only --no-capture`.

use std::time::{Duration, Instant};

use kata_agent::container::{Engine, ProcessIo};
use serde_json::json;

use crate::world::{parse, spec, with_world};

const ROUNDS: usize = 50;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
#[ignore = "a measurement"]
fn latency_of_create_start_and_exec() {
    with_world(|world| async move {
        let spec = spec();
        let (mut creates, mut starts, mut ends, mut deletes) = (vec![], vec![], vec![], vec![]);
        for round in 0..ROUNDS {
            let id = world.id(&format!("c{round}"));
            let begin = Instant::now();
            let init = world
                .engine
                .create(&id, &parse(&spec), world.bundle.path(), ProcessIo::default())
                .await
                .unwrap();
            let exit = world.reaper.register(init.pid);
            creates.push(begin.elapsed());
            let begin = Instant::now();
            world.engine.start(&id).await.unwrap();
            starts.push(begin.elapsed());
            exit.wait().await;
            ends.push(begin.elapsed());
            let begin = Instant::now();
            world.engine.delete(&id).await.unwrap();
            deletes.push(begin.elapsed());
        }
        let (id, _exit) = world.sleeper("sleeper", &spec).await;
        let process = serde_json::from_value(
            json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["true"], "env": ["PATH=/bin"]}),
        )
        .unwrap();
        let (mut execs, mut plain) = (vec![], vec![]);
        for _ in 0..ROUNDS {
            let begin = Instant::now();
            let pid = world.engine.exec(&id, &process, ProcessIo::default()).await.unwrap().pid;
            world.reaper.register(pid).wait().await;
            execs.push(begin.elapsed());
            let init = world.engine.pids(&id).await.unwrap()[0];
            // The reaper runs on this thread, too, so it does not take this one's children from it.
            plain.push(fork_setns_exec(init.as_raw_nonzero().get()));
        }
        world.engine.delete(&id).await.unwrap();
        println!(
            "create {:?} · start {:?} · start to exit {:?} · delete {:?} · exec to exit {:?} · fork+setns+exec to exit {:?}",
            median(creates),
            median(starts),
            median(ends),
            median(deletes),
            median(execs),
            median(plain),
        );
    });
}

/// The least that an exec takes: a fork, the namespaces, a fork into them, the program.
fn fork_setns_exec(init: i32) -> Duration {
    let begin = Instant::now();
    let flags = libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    let (program, argument) = (c"/bin/true", c"true");
    let (args, env) = ([argument.as_ptr(), std::ptr::null()], [std::ptr::null()]);
    // SAFETY: between fork and exec only system calls are made; all pointers are to live, terminated lists.
    #[allow(clippy::multiple_unsafe_ops_per_block, reason = "one sequence of system calls")]
    unsafe {
        let pidfd = i32::try_from(libc::syscall(libc::SYS_pidfd_open, init, 0)).unwrap();
        let child = libc::fork();
        if child == 0 {
            libc::setns(pidfd, flags);
            let grandchild = libc::fork();
            if grandchild == 0 {
                libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr());
                libc::_exit(1);
            }
            let mut status = 0;
            libc::waitpid(grandchild, &raw mut status, 0);
            libc::_exit(i32::from(status != 0));
        }
        let mut status = 0;
        libc::waitpid(child, &raw mut status, 0);
        libc::close(pidfd);
        assert_eq!(status, 0);
    }
    begin.elapsed()
}

/// Every end is told, however short the life. As many as `KATA_ROUNDS` says, eight at a time.
#[test]
#[ignore = "takes minutes"]
fn the_end_of_thousands_of_short_containers_is_told() {
    const SCRIPTS: [(&str, i32); 3] = [("true", 0), ("exit 3", 3), ("true & exit 4", 4)];
    let rounds = std::env::var("KATA_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1000);
    with_world(|world| async move {
        let one = |round: usize| {
            let (world, (script, meant)) = (world.clone(), SCRIPTS[round % SCRIPTS.len()]);
            async move {
                let id = world.id(&format!("r{round}"));
                let mut spec = spec();
                spec["process"]["args"] = json!(["sh", "-c", script]);
                let made =
                    world.engine.create(&id, &parse(&spec), world.bundle.path(), ProcessIo::default()).await;
                let exit = world.reaper.register(made.unwrap().pid);
                let waits = tokio::spawn(async move { exit.wait().await.code() });
                world.engine.start(&id).await.unwrap();
                let told = tokio::time::timeout(Duration::from_secs(20), waits).await;
                assert_eq!(told.expect("no end was told").unwrap(), meant, "round {round}");
                world.engine.delete(&id).await.unwrap();
            }
        };
        for first in (0..rounds).step_by(8) {
            futures_util::future::join_all((first..rounds.min(first + 8)).map(one)).await;
        }
    });
}
