//! What a container sees, and what it does not.

use kata_agent::container::{Engine, PodNamespaces};
use serde_json::json;

use crate::world::{parse, spec, with_world};

#[test]
fn the_container_has_its_own_root_processes_and_name() {
    with_world(|world| async move {
        let text = world
            .sh(&spec(), "hostname; echo $$; ls -d /proc/[0-9]* | wc -l; ls / | tr '\\n' ' '")
            .await
            .ok();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(&lines[..2], ["box", "1"]);
        assert!(lines[2].parse::<u32>().unwrap() <= 4, "{text}");
        assert_eq!(lines[3].trim(), "bin dev etc home proc root sys tmp");
    });
}

#[test]
fn nothing_of_the_guests_mounts_is_left_in_the_container() {
    with_world(|world| async move {
        let text = world.sh(&spec(), "cut -d' ' -f5 /proc/self/mountinfo").await.ok();
        let mut points: Vec<&str> = text.lines().collect();
        points.sort_unstable();
        assert_eq!(points, ["/", "/dev", "/dev/mqueue", "/dev/pts", "/proc", "/sys"]);
    });
}

#[test]
fn no_descriptor_or_signal_setting_of_the_agent_is_inherited() {
    with_world(|world| async move {
        // 3 is the directory that ls reads.
        let (fds, signals) = ("0\n1\n2\n3", "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000");
        let look: [&[&str]; 2] =
            [&["ls", "/proc/self/fd"], &["grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status"]];
        for (args, wanted) in look.into_iter().zip([fds, signals]) {
            let mut spec = spec();
            spec["process"]["args"] = json!(args);
            assert_eq!(world.run(&spec).await.unwrap().ok(), wanted);
            let (id, _exit) = world.sleeper("c", &spec).await;
            let process =
                json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": args, "env": ["PATH=/bin"]});
            assert_eq!(world.exec(&id, &process).await.unwrap().ok(), wanted);
            world.engine.delete(&id).await.unwrap();
        }
    });
}

#[test]
fn the_default_devices_and_links_are_there() {
    with_world(|world| async move {
        let script = "for d in null zero full random urandom tty; do stat -c '%n %F %a %t:%T' /dev/$d; done; \
            for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done; echo x > /dev/null; head -c 4 /dev/zero | wc -c";
        let text = world.sh(&spec(), script).await.ok();
        let wanted = "/dev/null character special file 666 1:3\n/dev/zero character special file 666 1:5\n\
            /dev/full character special file 666 1:7\n/dev/random character special file 666 1:8\n\
            /dev/urandom character special file 666 1:9\n/dev/tty character special file 666 5:0\n\
            /proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n4";
        assert_eq!(text, wanted);
    });
}

#[test]
fn devices_of_the_spec_are_made_with_their_owner_and_mode() {
    with_world(|world| async move {
        let mut spec = spec();
        spec["linux"]["devices"] = json!([
            {"path": "/dev/deep/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 7, "gid": 8},
            {"path": "/dev/pipe", "type": "p", "fileMode": 0o600},
            {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o622},
        ]);
        let text = world
            .sh(&spec, "stat -c '%a %u %g %t:%T' /dev/deep/fuse; stat -c '%F %a' /dev/pipe /dev/null")
            .await;
        assert_eq!(text.ok(), "640 7 8 a:e5\nfifo 600\ncharacter special file 622");
    });
}

/// A device that every kernel has and that root may open without further rights.
fn harmless_device() -> Option<u32> {
    let devices = std::fs::read_to_string("/proc/misc").unwrap();
    let mut lines = devices.lines().filter_map(|line| line.trim().split_once(' '));
    let minor = lines.find(|(_, name)| *name == "cpu_dma_latency").map(|(minor, _)| minor.parse().unwrap());
    if minor.is_none() {
        eprintln!("skipped: the kernel has no device that is safe to open");
    }
    minor
}

#[test]
fn a_device_that_no_rule_allows_cannot_be_opened() {
    with_world(|world| async move {
        let Some(minor) = harmless_device() else { return };
        let mut spec = spec();
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_MKNOD"], "permitted": ["CAP_MKNOD"], "effective": ["CAP_MKNOD"]});
        let script = format!("mknod /dev/x c 10 {minor} && head -c 0 /dev/x");
        let denied = world.sh(&spec, &script).await;
        assert!(denied.code != 0 && denied.stderr.contains("Operation not permitted"), "{denied:?}");
        spec["linux"]["resources"]["devices"] = json!([
            {"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 10, "minor": minor, "access": "r"}]);
        assert_eq!(world.sh(&spec, &script).await.code, 0);
        let denied = world.sh(&spec, &format!("mknod /dev/x c 10 {minor} && echo x > /dev/x")).await;
        assert!(denied.stderr.contains("not permitted"), "{denied:?}");
    });
}

#[test]
fn device_rules_can_be_changed_while_it_runs() {
    with_world(|world| async move {
        let Some(minor) = harmless_device() else { return };
        let mut spec = spec();
        spec["linux"]["devices"] = json!([{"path": "/dev/some", "type": "c", "major": 10, "minor": minor}]);
        let (id, _exit) = world.sleeper("c", &spec).await;
        let look = "head -c 0 /dev/some";
        assert_ne!(world.exec_sh(&id, look).await.code, 0);
        let rules = |allow: bool| {
            let rule = json!({"allow": allow, "type": "c", "major": 10, "minor": minor, "access": "rw"});
            serde_json::from_value(json!({"devices": [rule]})).unwrap()
        };
        world.engine.update(&id, &rules(true)).await.unwrap();
        assert_eq!(world.exec_sh(&id, look).await.code, 0);
        world.engine.update(&id, &rules(false)).await.unwrap();
        assert_ne!(world.exec_sh(&id, look).await.code, 0, "the former filter is replaced, not added to");
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn masked_and_read_only_paths_are() {
    with_world(|world| async move {
        std::fs::create_dir(world.root().join("hidden")).unwrap();
        std::fs::write(world.root().join("hidden/file"), "secret").unwrap();
        std::fs::write(world.root().join("hidden-file"), "secret").unwrap();
        let mut spec = spec();
        spec["linux"]["maskedPaths"] =
            json!(["/hidden", "/hidden-file", "/proc/kcore", "/proc/no-such-file"]);
        spec["linux"]["readonlyPaths"] = json!(["/proc/sys", "/etc", "/no/such/path"]);
        let script = "ls /hidden | wc -l; cat /hidden-file | wc -c; touch /hidden/x; touch /etc/x; \
            echo 1 > /proc/sys/kernel/hostname; touch /tmp/fine && echo fine";
        let outcome = world.sh(&spec, script).await;
        assert_eq!(outcome.stdout, "0\n0\nfine\n");
        assert_eq!(outcome.stderr.matches("Read-only file system").count(), 3, "{outcome:?}");
    });
}

#[test]
fn a_read_only_root_leaves_its_mounts_writable() {
    with_world(|world| async move {
        let mut spec = spec();
        spec["root"]["readonly"] = json!(true);
        spec["mounts"]
            .as_array_mut()
            .unwrap()
            .push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
        let outcome = world.sh(&spec, "touch /tmp/x && echo tmp; touch /x").await;
        assert_eq!(outcome.stdout, "tmp\n");
        assert!(outcome.stderr.contains("Read-only"), "{outcome:?}");
    });
}

#[test]
fn the_cgroup_is_seen_as_its_own_root() {
    with_world(|world| async move {
        let mut with_view = spec();
        with_view["mounts"].as_array_mut().unwrap().push(
            json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid"]}));
        let script =
            "grep ^0 /proc/self/cgroup; cat /sys/fs/cgroup/cgroup.procs | head -n 1; mkdir /sys/fs/cgroup/x";
        let outcome = world.sh(&with_view, script).await;
        assert_eq!(outcome.stdout, "0::/\n1\n");
        assert!(outcome.stderr.contains("Read-only"), "{outcome:?}");
        // Without a cgroup namespace it is the same directory, bound.
        with_view["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "uts"}, {"type": "mount"}]);
        let text = world
            .sh(&with_view, "head -n 1 /sys/fs/cgroup/cgroup.procs; ls /sys/fs/cgroup | grep -c ^kata")
            .await;
        assert_eq!(text.stdout, "1\n0\n");
    });
}

#[test]
fn namespaces_are_joined_by_path() {
    with_world(|world| async move {
        let first = spec();
        let (id, _exit) = world.sleeper("first", &first).await;
        let init = world.engine.pids(&id).await.unwrap()[0].as_raw_nonzero();
        let mut second = spec();
        let path = |kind: &str| format!("/proc/{init}/ns/{kind}");
        second["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "cgroup"},
            {"type": "pid", "path": path("pid")}, {"type": "ipc", "path": path("ipc")}, {"type": "uts", "path": path("uts")}]);
        second["hostname"] = json!(null);
        let text =
            world.sh(&second, "hostname; ps | grep -c 'sleep 100[0]'; test $$ != 1 && echo other").await.ok();
        assert_eq!(text, "box\n1\nother");
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn containers_of_a_pod_share_host_name_and_ipc() {
    with_world(|world| async move {
        let pod = PodNamespaces::new().unwrap();
        let guest = |kind: &str| std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        let (first, _exit) = world.sleeper_in(Some(&pod), "first", &spec()).await;
        let mut second = spec();
        second["hostname"] = json!(null);
        let (second, _exit) = world.sleeper_in(Some(&pod), "second", &second).await;
        assert_eq!(world.exec_sh(&second, "hostname").await.ok(), "box", "the first container's name");
        world.exec_sh(&first, "hostname renamed; touch /dev/mqueue/queue").await;
        assert_eq!(world.exec_sh(&second, "ls /dev/mqueue").await.ok(), "queue");
        for (kind, shared) in [("uts", true), ("ipc", true), ("pid", false), ("mnt", false)] {
            let look = format!("readlink /proc/self/ns/{kind}");
            let (one, other) =
                (world.exec_sh(&first, &look).await.ok(), world.exec_sh(&second, &look).await.ok());
            assert_eq!(one == other, shared, "{kind}");
            assert_ne!(guest(kind).to_str().unwrap(), one, "the guest keeps its own {kind}");
        }
        let (alone, _exit) = world.sleeper("alone", &spec()).await;
        assert_eq!(world.exec_sh(&alone, "ls /dev/mqueue").await.ok(), "");
        world.engine.delete(&first).await.unwrap();
        assert_eq!(
            world.exec_sh(&second, "ls /dev/mqueue").await.ok(),
            "queue",
            "the pod outlives its containers"
        );
        for id in [second, alone] {
            world.engine.delete(&id).await.unwrap();
        }
    });
}

#[test]
fn containers_of_a_pod_share_processes_where_it_is_said() {
    with_world(|world| async move {
        let pod = PodNamespaces::new().unwrap();
        let (first, _exit) = world.sleeper_in(Some(&pod), "first", &spec()).await;
        pod.keep_pids_of(world.engine.pids(&first).await.unwrap()[0]);
        let (own, _exit) = world.sleeper_in(Some(&pod), "own", &spec()).await;
        pod.keep_pids_of(world.engine.pids(&own).await.unwrap()[0]);
        let mut joins = parse(&spec());
        pod.share_pids_with(&mut joins);
        let joins = serde_json::to_value(&joins).unwrap();
        let seen = world.sh(&joins, "test $$ != 1 && ps | grep -c 'sleep 100[0]'").await.ok();
        assert_eq!(
            seen, "1",
            "it sees the first container and itself, not the one with processes of its own"
        );
        for id in [first, own] {
            world.engine.delete(&id).await.unwrap();
        }
        // The namespace went with its first process.
        let late = world.run(&joins).await;
        assert!(late.is_err(), "nothing can be started in it any more");
    });
}

#[test]
fn a_container_that_asks_for_no_namespace_of_a_kind_is_not_given_the_pods() {
    with_world(|world| async move {
        let pod = PodNamespaces::new().unwrap();
        let mut spec = spec();
        spec["hostname"] = json!(null);
        spec["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}]);
        let (id, _exit) = world.sleeper_in(Some(&pod), "c", &spec).await;
        let guest = std::fs::read_link("/proc/self/ns/uts").unwrap();
        let seen = world.exec_sh(&id, "readlink /proc/self/ns/uts").await.ok();
        assert_eq!(seen, guest.to_str().unwrap());
        world.engine.delete(&id).await.unwrap();
    });
}

#[test]
fn a_new_network_has_its_loopback_up() {
    with_world(|world| async move {
        let mut spec = spec();
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "network"}));
        spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "77"});
        let script = "cat /sys/class/net/lo/flags; ls /sys/class/net; cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
        let text = world.sh(&spec, script).await.ok();
        assert_eq!(text, "0x9\nlo\n77");
    });
}

#[test]
fn ipc_parameters_are_the_containers_own() {
    with_world(|world| async move {
        let before = std::fs::read_to_string("/proc/sys/kernel/msgmax").unwrap();
        let mut spec = spec();
        spec["linux"]["sysctl"] = json!({"kernel.msgmax": "4242"});
        assert_eq!(world.sh(&spec, "cat /proc/sys/kernel/msgmax").await.ok(), "4242");
        assert_eq!(std::fs::read_to_string("/proc/sys/kernel/msgmax").unwrap(), before);
    });
}
