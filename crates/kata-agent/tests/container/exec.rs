//! Further processes in a container.

use std::io::Write;

use kata_agent::container::{Engine, EngineError, Fault, ProcessIo};
use serde_json::{Value, json};

use crate::world::{parse, pipes, spec, with_world};

fn process(args: &[&str]) -> Value {
    json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin"], "args": args})
}

#[test]
fn an_exec_is_in_the_containers_namespaces_and_root() {
    with_world(|world| async move {
        let (id, _exit) = world.sleeper("c", &spec()).await;
        assert_eq!(world.exec_sh(&id, "hostname; exit 9").await.code, 9);
        let look = "for n in mnt pid ipc uts cgroup net; do readlink /proc/self/ns/$n; done";
        let of_init = "for n in mnt pid ipc uts cgroup net; do readlink /proc/1/ns/$n; done";
        let (mine, init) = (world.exec_sh(&id, look).await.ok(), world.exec_sh(&id, of_init).await.ok());
        assert_eq!(mine, init);
        assert!(world.exec_sh(&id, "ps").await.ok().contains("sleep 1000"));
        assert_eq!(world.exec_sh(&id, "cat /proc/self/cgroup | grep ^0").await.ok(), "0::/");
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn an_exec_has_rights_of_its_own() {
    with_world(|world| async move {
        let (id, _exit) = world.sleeper("c", &spec()).await;
        let mut asked = process(&[
            "sh",
            "-c",
            "id -u; id -G; pwd; echo $HOME; grep -E '^(CapEff|NoNewPrivs)' /proc/self/status",
        ]);
        asked["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 6]});
        asked["cwd"] = json!("/home/app");
        asked["capabilities"] = json!({"bounding": ["CAP_KILL"]});
        asked["noNewPrivileges"] = json!(true);
        let text = world.exec(&id, &asked).await.unwrap().ok();
        assert_eq!(text, "1000\n1000 5 6\n/home/app\n/home/app\nCapEff:\t0000000000000000\nNoNewPrivs:\t1");
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn an_exec_that_cannot_run_says_why() {
    with_world(|world| async move {
        let (id, _exit) = world.sleeper("c", &spec()).await;
        let missing = world.exec(&id, &process(&["nope"])).await.unwrap_err();
        assert!(matches!(missing, EngineError::CommandNotFound { .. }), "{missing:?}");
        let refused = world.exec(&id, &process(&["/etc/passwd"])).await.unwrap_err();
        assert_eq!(refused.fault(), Fault::NotExecutable);
        let mut asked = process(&["true"]);
        asked["cwd"] = json!("/etc/passwd");
        let error = world.exec(&id, &asked).await.unwrap_err();
        assert!(error.to_string().contains("working directory /etc/passwd"), "{error}");
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn an_exec_after_the_end_of_the_init_is_refused() {
    with_world(|world| async move {
        let id = world.id("c");
        let spec = parse(&spec());
        let created = world.engine.create(&id, &spec, world.bundle.path(), ProcessIo::default()).await;
        let exit = world.reaper.register(created.unwrap().pid);
        world.engine.start(&id).await.unwrap();
        exit.wait().await;
        let error = world.exec(&id, &process(&["true"])).await.unwrap_err();
        assert_eq!(error.fault(), Fault::WrongState, "{error:?}");
        world.engine.delete(&id).await.unwrap();
        assert_eq!(world.exec(&id, &process(&["true"])).await.unwrap_err().fault(), Fault::NoContainer);
    });
}

#[test]
fn input_reaches_the_process_until_its_end() {
    with_world(|world| async move {
        let (id, _exit) = world.sleeper("c", &spec()).await;
        let (mut io, output) = pipes();
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        io.stdin = Some(read);
        let cat = serde_json::from_value(process(&["cat"])).unwrap();
        let pid = world.engine.exec(&id, &cat, io).await.unwrap().pid;
        let mut input = std::fs::File::from(write);
        input.write_all(b"hello").unwrap();
        drop(input);
        assert_eq!(output.collect(world.reaper.register(pid)).await.ok(), "hello");
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn the_seccomp_filter_holds_for_execs() {
    with_world(|world| async move {
        let mut spec = spec();
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 27}]});
        let (id, _exit) = world.sleeper("c", &spec).await;
        let outcome = world.exec_sh(&id, "grep Seccomp: /proc/self/status; mkdir /tmp/x").await;
        assert!(outcome.stdout.contains("Seccomp:\t2"), "{outcome:?}");
        assert!(outcome.stderr.contains("File too large"), "{outcome:?}");
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn an_exec_follows_the_init_into_a_child_cgroup_when_controllers_are_handed_down() {
    with_world(|world| async move {
        let (id, _exit) = world.sleeper("c", &spec()).await;
        let cgroup = world.cgroup(&id);
        let available = std::fs::read_to_string(cgroup.join("cgroup.controllers")).unwrap();
        let Some(controller) = available.split_whitespace().next() else {
            eprintln!("skipped: the hierarchy has no controllers to hand down");
            return world.engine.delete(&id).await.unwrap();
        };
        std::fs::create_dir(cgroup.join("init")).unwrap();
        for pid in world.engine.pids(&id).await.unwrap() {
            std::fs::write(cgroup.join("init/cgroup.procs"), pid.as_raw_nonzero().to_string()).unwrap();
        }
        std::fs::write(cgroup.join("cgroup.subtree_control"), format!("+{controller}")).unwrap();
        assert_eq!(world.exec_sh(&id, "grep ^0 /proc/self/cgroup").await.ok(), "0::/init");
        world.engine.delete(&id).await.unwrap();
    });
}
