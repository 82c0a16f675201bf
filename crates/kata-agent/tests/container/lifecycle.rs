//! From create to delete.

use std::time::Duration;

use kata_agent::container::{Engine, EngineError, Fault, ProcessIo};
use kata_agent::reaper::ExitStatus;
use rustix::process::Signal;
use serde_json::json;

use crate::world::{parse, pipes, spec, with_world};

#[test]
fn exit_codes_and_output_come_back() {
    with_world(|world| async move {
        let outcome = world.sh(&spec(), "echo out; echo err >&2; exit 7").await;
        assert_eq!((outcome.code, outcome.stdout.as_str(), outcome.stderr.as_str()), (7, "out\n", "err\n"));
        assert_eq!(
            world.sh(&spec(), "kill -9 $$; sleep 5").await.code,
            0,
            "pid 1 is immune to its own signals"
        );
    });
}

#[test]
fn a_created_container_waits_until_it_is_started() {
    with_world(|world| async move {
        let id = world.id("c");
        let mut spec = spec();
        spec["process"]["args"] = json!(["echo", "ran"]);
        let (io, output) = pipes();
        let pid = world.engine.create(&id, &parse(&spec), world.bundle.path(), io).await.unwrap().pid;
        let exit = world.reaper.register(pid);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(exit.status(), None);
        assert_eq!(world.engine.pids(&id).await.unwrap(), [pid]);
        world.engine.start(&id).await.unwrap();
        assert_eq!(output.collect(exit).await.ok(), "ran");
        let again = world.engine.start(&id).await.unwrap_err();
        assert_eq!(again.fault(), Fault::WrongState);
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn a_command_that_does_not_exist_is_told_at_create_with_every_path_tried() {
    with_world(|world| async move {
        let mut spec = spec();
        spec["process"]["args"] = json!(["no-such-command"]);
        let error = world.run(&spec).await.unwrap_err();
        let EngineError::CommandNotFound { command, tried } = &error else { panic!("{error:?}") };
        assert_eq!(command, "no-such-command");
        assert_eq!(
            tried,
            &["/bin/no-such-command", "/usr/bin/no-such-command"].map(std::path::PathBuf::from)
        );
        assert_eq!(error.fault(), Fault::CommandNotFound);
    });
}

#[test]
fn what_cannot_be_executed_is_told_apart() {
    with_world(|world| async move {
        let write = |name: &str, text: &str, mode: u32| {
            let path = world.root().join("bin").join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        };
        write("plain", "#!/bin/sh\n", 0o644);
        write("garbage", "\u{1}\u{2}\u{3}not a program", 0o755);
        write("script", "#!/no/such/interpreter\n", 0o755);
        // The words that clients look for.
        for (command, words) in [
            ("plain", "plain: permission denied"),
            ("/bin", "/bin: is a directory"),
            ("garbage", "garbage: Exec format error (os error 8)"),
        ] {
            let mut spec = spec();
            spec["process"]["args"] = json!([command]);
            let error = world.run(&spec).await.unwrap_err();
            assert_eq!(error.fault(), Fault::NotExecutable, "{command}");
            let text = kata_agent::chain(&error);
            assert!(text.starts_with("cannot execute ") && text.ends_with(words), "{text}");
        }
        let mut spec = spec();
        spec["process"]["args"] = json!(["script"]);
        let error = world.run(&spec).await.unwrap_err();
        assert!(
            matches!(&error, EngineError::InterpreterNotFound { path } if path.ends_with("script")),
            "{error:?}"
        );
        assert!(error.to_string().contains("script: no such file or directory"), "{error}");
    });
}

#[test]
fn ids_are_taken_once_and_free_again_after_delete_and_after_failure() {
    with_world(|world| async move {
        let (id, _exit) = world.sleeper("c", &spec()).await;
        let again =
            world.engine.create(&id, &parse(&spec()), world.bundle.path(), ProcessIo::default()).await;
        assert!(matches!(again, Err(EngineError::Exists(_))));
        world.engine.delete(&id).await.unwrap();
        assert!(matches!(world.engine.start(&id).await, Err(EngineError::NoContainer(_))));
        let mut broken = spec();
        broken["root"]["path"] = json!("nowhere");
        let failed =
            world.engine.create(&id, &parse(&broken), world.bundle.path(), ProcessIo::default()).await;
        assert!(kata_agent::chain(&failed.unwrap_err()).contains("nowhere"));
        let (id, _exit) = world.sleeper("c", &spec()).await;
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn delete_ends_everything_in_the_container_even_before_its_start() {
    with_world(|world| async move {
        let (id, exit) = world.sleeper("running", &spec()).await;
        world.exec_sh(&id, "sleep 1000 >/dev/null 2>&1 & sleep 1000 >/dev/null 2>&1 &").await;
        assert_eq!(world.engine.pids(&id).await.unwrap().len(), 3);
        world.engine.delete(&id).await.unwrap();
        assert_eq!(exit.wait().await, ExitStatus::Signaled(libc::SIGKILL));
        assert!(!world.cgroup(&id).exists());

        let id = world.id("created");
        let io = ProcessIo::default();
        let pid = world.engine.create(&id, &parse(&spec()), world.bundle.path(), io).await.unwrap().pid;
        let exit = world.reaper.register(pid);
        world.engine.delete(&id).await.unwrap();
        exit.wait().await;
    });
}

#[test]
fn a_create_that_is_dropped_halfway_leaves_nothing() {
    with_world(|world| async move {
        for microseconds in [0, 500, 2000, 5000, 8000, 12000] {
            let id = world.id(&format!("dropped{microseconds}"));
            let spec = parse(&spec());
            let create = world.engine.create(&id, &spec, world.bundle.path(), ProcessIo::default());
            if let Ok(created) = tokio::time::timeout(Duration::from_micros(microseconds), create).await {
                created.unwrap();
                world.engine.delete(&id).await.unwrap();
            }
            while world.cgroup(&id).exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    });
}

#[test]
fn a_paused_container_stands_still_and_goes_on_when_resumed() {
    with_world(|world| async move {
        let id = world.id("c");
        let mut spec = spec();
        spec["process"]["args"] = json!(["sh", "-c", "while :; do echo x >> /count; done"]);
        let io = ProcessIo::default();
        world.engine.create(&id, &parse(&spec), world.bundle.path(), io).await.unwrap();
        world.engine.start(&id).await.unwrap();
        let count = || std::fs::metadata(world.root().join("count")).map_or(0, |file| file.len());
        while count() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        world.engine.pause(&id).await.unwrap();
        let before = count();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(count(), before);
        let refused =
            world.exec(&id, &json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["true"]})).await;
        assert_eq!(refused.unwrap_err().fault(), Fault::WrongState);
        world.engine.resume(&id).await.unwrap();
        while count() == before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        world.engine.pause(&id).await.unwrap();
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn a_signal_to_all_reaches_all() {
    with_world(|world| async move {
        let id = world.id("c");
        let mut spec = spec();
        spec["process"]["args"] = json!(["sh", "-c", "trap 'exit 5' TERM; sleep 1000 & sleep 1000 & wait"]);
        let io = ProcessIo::default();
        let pid = world.engine.create(&id, &parse(&spec), world.bundle.path(), io).await.unwrap().pid;
        let exit = world.reaper.register(pid);
        world.engine.start(&id).await.unwrap();
        while world.engine.pids(&id).await.unwrap().len() < 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        world.engine.signal_all(&id, Signal::TERM).await.unwrap();
        assert_eq!(exit.wait().await, ExitStatus::Exited(5));
        while !world.engine.pids(&id).await.unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        world.engine.signal_all(&id, Signal::KILL).await.unwrap();
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn many_containers_start_at_once() {
    with_world(|world| async move {
        let mut running = tokio::task::JoinSet::new();
        for number in 0..8 {
            let world = world.clone();
            running.spawn(async move {
                let (id, _exit) = world.sleeper(&format!("c{number}"), &spec()).await;
                let name = world.exec_sh(&id, "hostname").await.ok();
                world.engine.delete(&id).await.unwrap();
                name
            });
        }
        assert_eq!(running.join_all().await, ["box"; 8]);
    });
}

#[test]
fn a_limit_is_set_or_its_controller_is_missed_by_name() {
    with_world(|world| async move {
        let (id, _exit) = world.sleeper("c", &spec()).await;
        let resources = serde_json::from_value(json!({"pids": {"limit": 77}})).unwrap();
        match world.engine.update(&id, &resources).await {
            Ok(()) => assert_eq!(world.engine.stats(&id).await.unwrap().pids_stats.limit, 77),
            Err(error) => {
                assert_eq!(error.fault(), Fault::Unsupported);
                assert!(error.to_string().contains("pids.max"), "{error}");
            }
        }
        let stats = world.engine.stats(&id).await.unwrap();
        assert!(stats.cpu_stats.cpu_usage.total_usage > 0);
        world.engine.delete(&id).await.unwrap();
    });
}

/// Children of this process that wait to make containers.
fn templates() -> Vec<rustix::process::Pid> {
    let mine = format!("PPid:\t{}\n", std::process::id());
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let read =
        |pid: &i32, file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let templates = pids.filter(|pid| {
        read(pid, "cmdline").starts_with(kata_agent::container::HELPER_NAME)
            && read(pid, "status").contains(&mine)
    });
    templates.filter_map(rustix::process::Pid::from_raw).collect()
}

#[test]
fn a_killed_template_process_is_started_again() {
    with_world(|world| async move {
        let (id, _exit) = world.sleeper("c", &spec()).await;
        for template in templates() {
            let exit = world.reaper.register(template);
            rustix::process::kill_process(template, Signal::KILL).unwrap();
            exit.wait().await;
        }
        assert_eq!(world.exec_sh(&id, "echo on").await.ok(), "on");
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn only_the_template_process_is_left_of_the_engines_own() {
    with_world(|world| async move {
        for _ in 0..3 {
            world.sh(&spec(), "true").await.ok();
        }
        // Helpers that have done their work may still be on their way out.
        let begin = std::time::Instant::now();
        while templates().len() > 1 && begin.elapsed() < Duration::from_secs(20) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(templates().len(), 1);
    });
}
