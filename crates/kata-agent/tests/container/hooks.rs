//! Hooks that run in the guest.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use kata_agent::container::{Engine, EngineError};
use serde_json::{Value, json};

use crate::world::{World, parse, pipes, spec, with_world};

/// A shell script of the guest's, beside the container's root.
fn script(world: &World, name: &str, text: &str) -> PathBuf {
    let path = world.bundle.path().join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn with_hooks(hooks: Value) -> Value {
    let mut spec = spec();
    spec["hooks"] = hooks;
    spec["annotations"] = json!({"color": "green"});
    spec
}

#[test]
fn a_hook_before_the_root_is_entered_sees_guest_and_container() {
    with_world(|world| async move {
        // It runs in the guest's tree, where the root has its mounts already, and in the container's namespaces.
        let root = world.root();
        let text = format!(
            "cat > {0}/tmp/state; grep -c . {0}/proc/self/mountinfo > {0}/tmp/mounts; hostname > {0}/tmp/name; echo $A $1 > {0}/tmp/args",
            root.display()
        );
        let hook = script(&world, "create", &text);
        let hooks = json!({"createContainer": [{"path": hook, "args": ["create", "one"], "env": ["A=b", "PATH=/bin:/usr/bin"]}]});
        let told = world.sh(&with_hooks(hooks), "cat /tmp/name /tmp/args; cat /tmp/state").await.ok();
        let (lines, state) = told.rsplit_once('\n').unwrap();
        assert_eq!(lines, "box\nb one");
        let state: Value = serde_json::from_str(state).unwrap();
        assert_eq!((&state["status"], &state["pid"]), (&json!("creating"), &json!(1)));
        assert_eq!(state["annotations"], json!({"color": "green"}));
        assert_eq!(state["bundle"], json!(world.bundle.path()));
        assert_eq!(state["ociVersion"], "1.1.0");
    });
}

#[test]
fn a_hook_before_the_command_is_the_containers_and_has_its_rights() {
    with_world(|world| async move {
        let root = world.root();
        fs::write(
            root.join("bin/hook"),
            "#!/bin/sh\nid -u > /tmp/user; cat > /tmp/state; grep CapEff /proc/self/status > /tmp/rights\n",
        )
        .unwrap();
        fs::set_permissions(root.join("bin/hook"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        let mut spec = with_hooks(json!({"startContainer": [{"path": "/bin/hook", "env": ["PATH=/bin"]}]}));
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["args"] = json!(["cat", "/tmp/user", "/tmp/rights", "/tmp/state"]);
        let id = world.id("start");
        let (io, output) = pipes();
        let pid = world.engine.create(&id, &parse(&spec), world.bundle.path(), io).await.unwrap().pid;
        let exit = world.reaper.register(pid);
        assert!(!root.join("tmp/user").exists(), "it is not run before the start");
        world.engine.start(&id).await.unwrap();
        let told = output.collect(exit).await.ok();
        world.engine.delete(&id).await.unwrap();
        assert!(told.starts_with("1000\nCapEff:\t0000000000000000\n"), "{told}");
        assert!(told.contains(r#""status":"created""#), "{told}");
    });
}

#[test]
fn a_hook_before_the_command_is_held_by_its_seccomp_profile_and_capabilities() {
    with_world(|world| async move {
        let root = world.root();
        let text = "#!/bin/sh\nmkdir /tmp/made; grep -E '^(Cap|Seccomp:|NoNewPrivs)' /proc/self/status > /tmp/rights\n";
        fs::write(root.join("bin/hook"), text).unwrap();
        fs::set_permissions(root.join("bin/hook"), fs::Permissions::from_mode(0o755)).unwrap();
        for (no_new_privileges, uid) in [(true, 0), (false, 0), (false, 1000)] {
            fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
            let mut spec =
                with_hooks(json!({"startContainer": [{"path": "/bin/hook", "env": ["PATH=/bin"]}]}));
            // The process that waits for the hook does more than the command: it is not held by this yet.
            spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"},
                {"names": ["memfd_create"], "action": "SCMP_ACT_KILL_PROCESS"}]});
            let sets = json!(["CAP_CHOWN"]);
            spec["process"]["capabilities"] = json!({"bounding": ["CAP_CHOWN", "CAP_KILL"], "permitted": sets,
                "effective": sets, "inheritable": sets, "ambient": sets});
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            spec["process"]["user"] = json!({"uid": uid, "gid": 0});
            let script = "cat /tmp/rights; test -e /tmp/made && echo made; rm /tmp/rights; \
                grep -E '^(Cap|Seccomp:|NoNewPrivs)' /proc/self/status";
            let told = world.sh(&spec, script).await.ok();
            let lines: Vec<&str> = told.lines().collect();
            let (hook, command) = lines.split_at(lines.len() / 2);
            assert_eq!(hook, command, "{told}");
            assert!(hook.contains(&"Seccomp:\t2") && hook.len() == 7, "{told}");
        }
    });
}

#[test]
fn a_hook_that_fails_ends_the_container_with_its_last_words() {
    with_world(|world| async move {
        let bad = script(&world, "bad", "echo first >&2; echo no such library >&2; exit 3");
        let slow = script(&world, "slow", "exec sleep 100");
        let error = |hooks: Value| {
            let (world, spec) = (world.clone(), with_hooks(hooks));
            async move { kata_agent::chain(&world.run(&spec).await.unwrap_err()) }
        };
        let text = error(json!({"createContainer": [{"path": bad}]})).await;
        assert!(text.contains("/bad") && text.ends_with("exited with code 3: no such library"), "{text}");
        let text = error(json!({"createContainer": [{"path": slow, "timeout": 1}]})).await;
        assert!(text.contains("did not end within 1s"), "{text}");
        let text = error(json!({"startContainer": [{"path": "/bin/absent"}]})).await;
        assert!(text.contains("the hook /bin/absent") && text.contains("No such file"), "{text}");
        let wrong = world.run(&with_hooks(json!({"startContainer": [{"path": "bin/x"}]}))).await.unwrap_err();
        assert!(matches!(wrong, EngineError::Invalid { .. }), "{wrong}");
    });
}
