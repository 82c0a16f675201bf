//! Processes on a terminal.

use std::os::fd::OwnedFd;

use kata_agent::container::{Engine, EngineError, Fault, ProcessIo, Spawned};
use oci_spec::runtime::Process;
use rustix::process::Signal;
use rustix::termios::tcgetwinsize;
use serde_json::{Value, json};

use crate::world::{World, parse, spec, with_world};

fn on_terminal(script: &str) -> Value {
    let mut spec = spec();
    spec["process"]["args"] = json!(["sh", "-c", script]);
    spec["process"]["terminal"] = json!(true);
    spec
}

/// All that a process wrote to its terminal, once it has ended, and its exit code.
async fn ended(world: &World, process: Spawned) -> (String, i32) {
    let code = world.reaper.register(process.pid).wait().await.code();
    (written(&process.terminal.expect("a terminal")), code)
}

fn written(master: &OwnedFd) -> String {
    let (mut all, mut text) = (Vec::new(), [0; 256]);
    // A terminal that nobody holds ends with an error.
    while let Ok(length @ 1..) = rustix::io::read(master, &mut text) {
        all.extend_from_slice(&text[..length]);
    }
    String::from_utf8(all).unwrap().replace("\r\n", "\n")
}

/// What an init of `spec` writes to its terminal.
async fn run(world: &World, spec: &Value) -> String {
    let id = world.id("c");
    let created = world.engine.create(&id, &parse(spec), world.bundle.path(), ProcessIo::default()).await;
    let created = created.unwrap_or_else(|error| panic!("{}", kata_agent::chain(&error)));
    world.engine.start(&id).await.unwrap();
    let (text, code) = ended(world, created).await;
    assert_eq!(code, 0, "{text}");
    world.engine.delete(&id).await.unwrap();
    text
}

#[test]
fn a_terminal_is_the_controlling_one_and_the_console() {
    with_world(|world| async move {
        let script = "test -t 0 && test -t 1 && test -t 2 && echo hi > /dev/tty && \
            test $(stat -c %t:%T /dev/console) = $(stat -L -c %t:%T /proc/self/fd/0) && echo same > /dev/console";
        assert_eq!(run(&world, &on_terminal(script)).await, "hi\nsame\n");
    });
}

#[test]
fn a_terminal_has_a_name_in_the_container_and_is_the_only_one_there() {
    with_world(|world| async move {
        let text = run(&world, &on_terminal("tty; ls /dev/pts; echo by name > $(tty)")).await;
        assert_eq!(text, "/dev/pts/0\n0     ptmx\nby name\n");
    });
}

#[test]
fn a_terminal_has_its_size_from_the_start() {
    with_world(|world| async move {
        let mut spec = on_terminal("stty size");
        spec["process"]["consoleSize"] = json!({"height": 33, "width": 111});
        assert_eq!(run(&world, &spec).await, "33 111\n");
        spec["process"]["consoleSize"] = json!({"height": 33, "width": 65536});
        let error = world.run(&spec).await.unwrap_err();
        assert!(
            matches!(&error, EngineError::Invalid { key, .. } if key == "process.consoleSize"),
            "{error}"
        );
    });
}

#[test]
fn a_terminal_belongs_to_the_processs_user_and_the_group_of_devpts() {
    with_world(|world| async move {
        let mut spec = on_terminal("stat -c '%u:%g %a' $(tty) /dev/console; : > /dev/stdout");
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        assert_eq!(run(&world, &spec).await, "1000:0 620\n1000:0 620\n");
        spec["mounts"][2]["options"].as_array_mut().unwrap().push(json!("gid=5"));
        assert_eq!(run(&world, &spec).await, "1000:5 620\n1000:5 620\n");
    });
}

#[test]
fn a_terminal_works_with_a_read_only_root_and_a_filter() {
    with_world(|world| async move {
        let mut spec = on_terminal("tty; echo same > /dev/console");
        spec["root"]["readonly"] = json!(true);
        std::fs::create_dir_all(world.root().join("dev/pts")).unwrap();
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["sendmsg", "sendto"], "action": "SCMP_ACT_ERRNO"}]});
        assert_eq!(run(&world, &spec).await, "/dev/pts/0\nsame\n");
    });
}

#[test]
fn execs_have_terminals_of_their_own_in_the_container() {
    with_world(|world| async move {
        let (id, spec) = (world.id("c"), parse(&on_terminal("exec sleep 1000")));
        let init = world.engine.create(&id, &spec, world.bundle.path(), ProcessIo::default()).await.unwrap();
        world.engine.start(&id).await.unwrap();
        let script = "tty; stty size; test -t 2 && echo hi > /dev/tty";
        let exec = json!({"user": {"uid": 1000, "gid": 1000}, "cwd": "/", "args": ["sh", "-c", script],
            "env": ["PATH=/bin"], "terminal": true, "consoleSize": {"height": 7, "width": 9}});
        let exec: Process = serde_json::from_value(exec).unwrap();
        let exec = world.engine.exec(&id, &exec, ProcessIo::default()).await.unwrap();
        let size = tcgetwinsize(exec.terminal.as_ref().unwrap()).unwrap();
        assert_eq!((size.ws_row, size.ws_col), (7, 9));
        let (text, code) = ended(&world, exec).await;
        assert_eq!((text.as_str(), code), ("/dev/pts/1\n7 9\nhi\n", 0));
        drop(init);
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn closing_the_terminal_hangs_up_on_its_process() {
    with_world(|world| async move {
        let (id, _exit) = world.sleeper("c", &spec()).await;
        let exec = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["sleep", "1000"],
            "env": ["PATH=/bin"], "terminal": true});
        let exec: Process = serde_json::from_value(exec).unwrap();
        let Spawned { pid, terminal } = world.engine.exec(&id, &exec, ProcessIo::default()).await.unwrap();
        let exit = world.reaper.register(pid);
        drop(terminal);
        assert_eq!(exit.wait().await.code(), 128 + Signal::HUP.as_raw());
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn a_terminal_without_a_devpts_is_refused() {
    with_world(|world| async move {
        let mut without = on_terminal("true");
        without["mounts"].as_array_mut().unwrap().remove(2);
        let mut tmpfs = on_terminal("true");
        tmpfs["mounts"][2] = json!({"destination": "/dev/pts", "type": "tmpfs", "source": "tmpfs"});
        for spec in [without, tmpfs] {
            let error = world.run(&spec).await.unwrap_err();
            assert_eq!(error.fault(), Fault::Invalid, "{error:?}");
            assert!(error.to_string().contains("devpts"), "{error}");
        }
    });
}

/// What root in a container may do to its `/dev` must not reach the agent.
#[test]
fn a_replaced_ptmx_is_not_opened() {
    with_world(|world| async move {
        let (id, _exit) = world.sleeper("c", &spec()).await;
        world.exec_sh(&id, "rm /dev/ptmx && echo not a terminal > /dev/ptmx").await.ok();
        let exec = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["tty"],
            "env": ["PATH=/bin"], "terminal": true});
        let exec: Process = serde_json::from_value(exec).unwrap();
        let exec = world.engine.exec(&id, &exec, ProcessIo::default()).await.unwrap();
        assert_eq!(ended(&world, exec).await, ("/dev/pts/0\n".to_owned(), 0));
        world.engine.delete(&id).await.unwrap();
    });
}
