//! Limits that the kernel enforces: they need a hierarchy with controllers, as a guest has.

use kata_agent::container::{Engine, ProcessIo};
use kata_agent::reaper::ExitStatus;
use serde_json::json;

use crate::world::{World, parse, spec, with_world};

/// Whether the hierarchy lacks a controller; says so.
fn lacks(world: &World, controller: &str) -> bool {
    let file = world.cgroup_root.join("cgroup.controllers");
    let there = std::fs::read_to_string(file).unwrap().split_whitespace().any(|one| one == controller);
    if !there {
        eprintln!("skipped: the cgroup v2 hierarchy here has no {controller} controller");
    }
    !there
}

#[test]
fn the_memory_limit_kills_and_the_kill_is_told() {
    with_world(|world| async move {
        if lacks(&world, "memory") {
            return;
        }
        let id = world.id("c");
        let mut spec = spec();
        spec["process"]["args"] = json!(["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"]);
        spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
        let created =
            world.engine.create(&id, &parse(&spec), world.bundle.path(), ProcessIo::default()).await;
        let exit = world.reaper.register(created.unwrap().pid);
        let mut events = world.engine.oom_events(&id).unwrap();
        world.engine.start(&id).await.unwrap();
        assert_eq!(events.next().await, Some(1));
        assert_eq!(exit.wait().await, ExitStatus::Signaled(libc::SIGKILL));
        let stats = world.engine.stats(&id).await.unwrap();
        assert_eq!(stats.memory_stats.usage.limit, 16 << 20);
        assert!(stats.memory_stats.usage.failcnt > 0);
        world.engine.delete(&id).await.unwrap();
        assert_eq!(events.next().await, None, "the container is gone");
    });
}

#[test]
fn the_number_of_processes_is_limited_and_the_limit_can_be_lifted() {
    with_world(|world| async move {
        if lacks(&world, "pids") {
            return;
        }
        let mut spec = spec();
        spec["linux"]["resources"]["pids"] = json!({"limit": 3});
        let (id, _exit) = world.sleeper("c", &spec).await;
        let many = "sleep 1 & sleep 1 & sleep 1 & sleep 1 & wait";
        assert!(world.exec_sh(&id, many).await.stderr.contains("fork"), "the limit holds");
        let stats = world.engine.stats(&id).await.unwrap();
        assert_eq!(stats.pids_stats.limit, 3);
        let lifted = serde_json::from_value(json!({"pids": {"limit": -1}})).unwrap();
        world.engine.update(&id, &lifted).await.unwrap();
        assert_eq!(world.exec_sh(&id, many).await.stderr, "");
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn cpu_limits_reach_the_kernel_and_stay_when_others_change() {
    with_world(|world| async move {
        if lacks(&world, "cpu") {
            return;
        }
        let mut spec = spec();
        spec["linux"]["resources"]["cpu"] = json!({"shares": 2048, "quota": 30000, "period": 60000});
        let (id, _exit) = world.sleeper("c", &spec).await;
        let read =
            |file: &str| std::fs::read_to_string(world.cgroup(&id).join(file)).unwrap().trim().to_owned();
        assert_eq!((read("cpu.weight"), read("cpu.max")), ("174".to_owned(), "30000 60000".to_owned()));
        let change = serde_json::from_value(json!({"cpu": {"period": 80000}})).unwrap();
        world.engine.update(&id, &change).await.unwrap();
        assert_eq!((read("cpu.weight"), read("cpu.max")), ("174".to_owned(), "30000 80000".to_owned()));
        world.engine.delete(&id).await.unwrap();
    });
}
