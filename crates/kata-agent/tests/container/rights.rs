//! Users, capabilities, limits, seccomp.

use kata_agent::container::{EngineError, Fault};
use serde_json::{Value, json};

use crate::world::{spec, with_world};

fn with_process(key: &str, value: Value) -> Value {
    let mut spec = spec();
    spec["process"][key] = value;
    spec
}

#[test]
fn the_process_has_the_user_and_groups_it_is_given_and_no_other() {
    with_world(|world| async move {
        let spec = with_process(
            "user",
            json!({"uid": 1000, "gid": 1000, "additionalGids": [10, 20], "umask": 0o27}),
        );
        let script = "id -u; id -g; id -G; umask; echo $HOME; touch /tmp/x 2>&1 | wc -l";
        assert_eq!(world.sh(&spec, script).await.ok(), "1000\n1000\n1000 10 20\n0027\n/home/app\n1");
        let text = world.sh(&spec_without_groups(), "grep ^Groups /proc/self/status; umask").await.ok();
        assert_eq!(text.replace([' ', '\t'], ""), "Groups:\n0022");
    });
}

fn spec_without_groups() -> Value {
    with_process("user", json!({"uid": 0, "gid": 0}))
}

#[test]
fn all_five_capability_sets_are_as_asked() {
    with_world(|world| async move {
        let mut spec = with_process(
            "capabilities",
            json!({"bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"], "permitted": ["CAP_CHOWN", "CAP_KILL"],
                "effective": ["CAP_CHOWN"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]}),
        );
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["args"] = json!(["grep", "^Cap", "/proc/self/status"]);
        // Over execve a user that is not root keeps the ambient set alone.
        let wanted = "CapInh:\t0000000000000020\nCapPrm:\t0000000000000020\nCapEff:\t0000000000000020\n\
            CapBnd:\t0000000000002021\nCapAmb:\t0000000000000020";
        assert_eq!(world.run(&spec).await.unwrap().ok(), wanted);
        // Root gets what the bounding set leaves.
        spec["process"]["user"] = json!({"uid": 0, "gid": 0});
        let text = world.run(&spec).await.unwrap().ok();
        assert!(
            text.contains("CapEff:\t0000000000002021") && text.contains("CapBnd:\t0000000000002021"),
            "{text}"
        );
        spec["process"]["capabilities"] = json!(null);
        let text = world.run(&spec).await.unwrap().ok();
        assert_eq!(text.matches("0000000000000000").count(), 5, "{text}");
    });
}

#[test]
fn no_new_privs_is_set_or_not_as_asked() {
    with_world(|world| async move {
        for (asked, seen) in [(true, "1"), (false, "0")] {
            let spec = with_process("noNewPrivileges", json!(asked));
            assert_eq!(world.sh(&spec, "grep NoNewPrivs /proc/self/status | tr -dc 01").await.ok(), seen);
        }
    });
}

#[test]
fn resource_limits_and_the_oom_score_are_set() {
    with_world(|world| async move {
        let mut spec = with_process(
            "rlimits",
            json!([{"type": "RLIMIT_NOFILE", "soft": 55, "hard": 66}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]),
        );
        spec["process"]["oomScoreAdj"] = json!(321);
        let text =
            world.sh(&spec, "ulimit -Sn; ulimit -Hn; ulimit -c; cat /proc/self/oom_score_adj").await.ok();
        assert_eq!(text, "55\n66\n0\n321");
    });
}

#[test]
fn the_working_directory_is_made_and_may_belong_to_the_user_alone() {
    with_world(|world| async move {
        assert_eq!(world.sh(&with_process("cwd", json!("/new/dir")), "pwd").await.ok(), "/new/dir");
        let private = world.root().join("home/app");
        std::os::unix::fs::chown(&private, Some(1000), Some(1000)).unwrap();
        std::fs::set_permissions(&private, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let mut spec = with_process("cwd", json!("/home/app"));
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        assert_eq!(world.sh(&spec, "pwd; touch mine; ls").await.ok(), "/home/app\nmine");
    });
}

#[test]
fn the_lookup_has_the_rights_of_the_user() {
    with_world(|world| async move {
        let private = world.root().join("private");
        std::fs::create_dir(&private).unwrap();
        std::fs::copy("/bin/busybox", private.join("tool")).unwrap();
        std::fs::set_permissions(&private, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let mut spec = with_process("args", json!(["tool"]));
        spec["process"]["env"] = json!(["PATH=/private"]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let error = world.run(&spec).await.unwrap_err();
        assert_eq!(error.fault(), Fault::NotExecutable, "{error:?}");
    });
}

#[test]
fn a_user_that_is_not_root_can_open_its_own_streams() {
    with_world(|world| async move {
        let spec = with_process("user", json!({"uid": 1000, "gid": 1000}));
        let outcome = world.sh(&spec, "echo out > /dev/stdout; echo err > /proc/self/fd/2").await;
        assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\n", "err\n"));
    });
}

fn profile(default: &str, rules: &Value) -> Value {
    let mut spec = spec();
    spec["linux"]["seccomp"] = json!({"defaultAction": default, "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": rules});
    spec
}

#[test]
fn a_seccomp_profile_is_enforced_with_and_without_no_new_privs() {
    with_world(|world| async move {
        for no_new_privileges in [true, false] {
            for uid in [0, 1000] {
                let mut spec = profile(
                    "SCMP_ACT_ALLOW",
                    &json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 27},
                        {"names": ["sethostname"], "action": "SCMP_ACT_KILL_PROCESS"}]),
                );
                spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
                spec["process"]["user"] = json!({"uid": uid, "gid": 0});
                let outcome = world
                    .sh(&spec, "mkdir /tmp/x; hostname other; echo $?; grep Seccomp: /proc/self/status")
                    .await;
                assert!(outcome.stderr.contains("File too large"), "{outcome:?}");
                assert_eq!(outcome.stdout, "159\nSeccomp:\t2\n", "128 + SIGSYS, and the shell goes on");
            }
        }
    });
}

#[test]
fn an_allow_list_that_is_just_enough_is_enough() {
    with_world(|world| async move {
        // What busybox's `true` needs, and execve; nothing for the engine but capset, prctl where they come after.
        let mut spec = profile(
            "SCMP_ACT_ERRNO",
            &json!([{"names": ["execve", "exit_group", "exit", "brk", "arch_prctl", "set_tid_address", "set_robust_list",
                "rseq", "prlimit64", "readlink", "readlinkat", "getrandom", "mprotect", "mmap", "munmap", "getuid", "setuid",
                "setgid", "getgid", "write"], "action": "SCMP_ACT_ALLOW"}]),
        );
        assert_eq!(world.run(&spec).await.unwrap().code, 0);
        spec["process"]["noNewPrivileges"] = json!(false);
        let error = world.run(&spec).await.unwrap_err();
        assert!(
            error.to_string().contains("set the capabilities"),
            "refused, not run with more rights: {error}"
        );
    });
}

#[test]
fn a_profile_that_cannot_be_enforced_is_refused() {
    with_world(|world| async move {
        let spec = profile("SCMP_ACT_ALLOW", &json!([{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]));
        let error = world.run(&spec).await.unwrap_err();
        assert!(matches!(error, EngineError::Unsupported { .. }), "{error:?}");
    });
}

#[test]
fn a_right_that_the_agent_does_not_have_itself_is_an_error() {
    with_world(|world| async move {
        let bounding = std::fs::read_to_string("/proc/self/status").unwrap();
        let mask = bounding.lines().find_map(|line| line.strip_prefix("CapBnd:\t")).unwrap();
        if u64::from_str_radix(mask, 16).unwrap() & (1 << 24) != 0 {
            eprintln!("skipped: this process has CAP_SYS_RESOURCE to give");
            return;
        }
        let all = json!(["CAP_SYS_RESOURCE"]);
        let spec = with_process("capabilities", json!({"bounding": all, "permitted": all, "effective": all}));
        let error = world.run(&spec).await.unwrap_err();
        assert!(error.to_string().contains("capabilities"), "{error}");
    });
}
