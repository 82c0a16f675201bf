//! Every verb of `kata-ctl` that looks into pods or the host, against a live pod.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use kata_testkit::containerd::{Containerd, Version};
use kata_testkit::driver::Driver;
use kata_testkit::host::{Host, stderr, stdout, wait_for};
use serde_json::Value;

fn detached(host: &Host, options: &[&str], name: &str, script: &str) {
    let image = host.image();
    let words = ["run", "-d", "--name", name].into_iter().chain(options.iter().copied());
    let output = host.output(words.chain([image.as_str(), "sh", "-c", script]));
    assert!(output.status.success(), "{}", stderr(&output));
}

fn remove(host: &Host, name: &str) {
    let output = host.output(["rm", "-f", name]);
    assert!(output.status.success(), "{}", stderr(&output));
}

fn done(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    stdout(output)
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&done(output)).unwrap()
}

/// One document a line.
fn lines(output: &Output) -> Vec<Value> {
    done(output).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

const BUSY: &str = "echo begun; while :; do :; done";

#[test]
fn list_and_inspect_tell_what_a_pod_is() {
    let Some(host) = Host::new() else { return };
    detached(&host, &[], "web", "exec sleep 1000");
    let pods = json(&host.output(["list", "--json"]));
    assert_eq!((&pods[0]["name"], &pods[0]["state"]), (&"web".into(), &"running".into()));
    assert_eq!((&pods[0]["namespace"], &pods[0]["containers"]), (&Value::Null, &1.into()));
    assert!(done(&host.output(["list"])).contains("kata-ctl"));

    let pod = json(&host.output(["inspect", "web"]));
    assert_eq!(
        (&pod["id"], &pod["state"], &pod["owner_lives"]),
        (&"web".into(), &"ready".into(), &true.into())
    );
    assert_eq!(pod["containers"][0]["args"][0], "sh");
    assert_eq!(pod["config"]["hypervisor"]["qemu"]["default_memory"], 2048);
    assert!(Path::new(pod["paths"]["owner_log"].as_str().unwrap()).exists());
    assert!(
        pod["made_on_host"]
            .as_array()
            .unwrap()
            .iter()
            .any(|it| it["process"]["name"] == Driver::under_test().process()),
        "{pod}"
    );
    assert!(pod["timeline"].as_array().unwrap().len() > 5);

    assert!(host.output(["kill", "web"]).status.success());
    // The owner writes down the end before it goes.
    let pod = host.wait_for("the pod's end", || {
        let pod = json(&host.output(["inspect", "web"]));
        (pod["state"] == "stopped" && pod["owner_lives"] == false).then_some(pod)
    });
    assert_eq!((&pod["owner_lives"], &pod["containers"][0]["exit_code"]), (&false.into(), &137.into()));
    remove(&host, "web");
}

#[test]
fn what_asks_for_an_unknown_pod_exits_with_3() {
    let Some(host) = Host::new() else { return };
    for verb in [
        &["inspect"][..],
        &["ps"],
        &["top", "--once"],
        &["stats", "--once"],
        &["logs"],
        &["events"],
        &["console"],
        &["evidence"],
        &["kill"],
    ] {
        let output = host.output(verb.iter().chain(&["nobody"]));
        assert_eq!(output.status.code(), Some(3), "{verb:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("nobody"), "{verb:?}");
    }
    assert_eq!(host.output(["cp", "nobody:/x", "/tmp/x"]).status.code(), Some(3));
    assert_eq!(host.output(["inspect"]).status.code(), Some(2));
    assert_eq!(host.output(["--color", "never", "exec", "--no-such-option"]).status.code(), Some(125));
}

#[test]
fn evidence_of_an_ordinary_pod_is_refused_for_want_of_hardware() {
    let Some(host) = Host::new() else { return };
    detached(&host, &[], "plain", "exec sleep 1000");
    let output = host.output(["evidence", "plain", "--json"]);
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(1), ""));
    assert!(stderr(&output).contains("the guest has no hardware that reports"), "{}", stderr(&output));
    let output = host.output(["evidence", "plain", "--nonce", &"00".repeat(65)]);
    assert!(stderr(&output).contains("a report has room for 64"), "{}", stderr(&output));
    remove(&host, "plain");
}

#[test]
fn ps_and_top_show_the_processes_of_the_guest() {
    let Some(host) = Host::new() else { return };
    detached(&host, &[], "busy", BUSY);
    let found = json(&host.output(["ps", "--json", "busy"]));
    let own = &found[0];
    assert_eq!((&own["container"], &own["container_pid"]), (&"busy".into(), &1.into()), "{found}");
    assert_eq!(own["command"][2], BUSY);
    assert!(found.as_array().unwrap().iter().all(|process| process["container"] == "busy"));
    let all = json(&host.output(["ps", "--json", "-a", "busy"]));
    assert!(
        all.as_array().unwrap().iter().any(|process| process["pid"] == 1 && process["container"].is_null())
    );

    let top = json(&host.output(["top", "--once", "--json", "busy"]));
    assert_eq!(top[0]["container"], "busy", "the busiest comes first: {top}");
    assert!(top[0]["cpu_percent"].as_f64().unwrap() > 5.0, "an idle one has none: {top}");
    assert!(done(&host.output(["top", "--once", "busy"])).contains("while :"));
    assert_eq!(host.output(["ps", "busy", "-c", "nope"]).status.code(), Some(3));
    remove(&host, "busy");
}

#[test]
fn stats_tell_what_a_container_uses() {
    let Some(host) = Host::new() else { return };
    detached(&host, &[], "busy", BUSY);
    let rows = json(&host.output(["stats", "--once", "--json"]));
    let row = &rows[0];
    assert_eq!((&row["pod"], &row["container"]), (&"busy".into(), &"busy".into()));
    assert!(row["cpu_percent"].as_f64().unwrap() > 5.0, "an idle one has none: {rows}");
    assert!(row["memory_usage_bytes"].as_u64().unwrap() > 100_000, "{rows}");
    assert!(row["host_memory_bytes"].as_u64().unwrap() > 10 << 20, "{rows}");
    assert_eq!(row["processes"], 1, "{rows}");
    let table = done(&host.output(["stats", "--once", "busy"]));
    assert!(table.starts_with("POD") && table.contains("busy"), "{table}");
    remove(&host, "busy");
}

#[test]
fn a_table_that_is_drawn_again_ends_with_its_reader() {
    let Some(host) = Host::new() else { return };
    detached(&host, &[], "box", "exec sleep 1000");
    let mut child = host.ctl(["stats", "--interval", "0.2"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 200];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let status = wait_for("the end", Duration::from_secs(10), || child.try_wait().unwrap());
    assert!(status.success(), "{status}");
    remove(&host, "box");
}

#[test]
fn events_tell_the_past_and_go_on_to_the_end() {
    let Some(host) = Host::new() else { return };
    detached(&host, &[], "brief", "trap 'exit 7' USR1; echo armed; while :; do sleep 0.1; done");
    host.wait_for("the trap", || (stdout(&host.output(["logs", "brief"])) == "armed\n").then_some(()));
    let kinds = |events: &[Value]| -> Vec<String> {
        events.iter().map(|event| event["kind"].as_str().unwrap().to_owned()).collect()
    };
    let past = lines(&host.output(["events", "--once", "--json", "brief"]));
    assert_eq!(kinds(&past), ["created", "started"]);
    assert_eq!(kinds(&lines(&host.output(["events", "--once", "--json"]))), ["created", "started"]);

    let mut child = host.ctl(["events", "--json", "brief"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut told = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut event = || told.next().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    // Who has told the past is there for what comes.
    let mut events = vec![event().unwrap(), event().unwrap()];
    assert!(host.output(["exec", "brief", "true"]).status.success());
    assert!(host.output(["kill", "-s", "USR1", "brief"]).status.success());
    events.extend(std::iter::from_fn(event));
    assert!(child.wait().unwrap().success());
    let exec: Vec<&Value> = events.iter().filter(|event| event["exec"].is_string()).collect();
    assert!(exec.iter().any(|event| event["kind"] == "exited" && event["exit_code"] == 0), "{events:?}");
    let last: Vec<String> = kinds(&events).into_iter().rev().take(2).collect();
    assert_eq!(last, ["stopped", "exited"], "{events:?}");
    assert_eq!(events[events.len() - 2]["exit_code"], 7);
    remove(&host, "brief");
}

#[test]
fn logs_of_all_parts_come_in_the_order_of_time() {
    let Some(host) = Host::new() else { return };
    host.configure("[hypervisor.qemu]\nenable_debug = true\n");
    detached(&host, &[], "web", "echo from the container; exec sleep 1000");
    // Each part's words come on a connection of its own.
    let all = host.wait_for("words of all parts", || {
        let all = lines(&host.output(["logs", "--source", "all", "--json", "web"]));
        let said = |source: &&str| all.iter().any(|line| line["source"] == **source);
        ["owner", "agent", "console"].iter().all(said).then_some(all)
    });
    let times: Vec<&str> = all.iter().map(|line| line["time"].as_str().unwrap()).collect();
    assert!(times.is_sorted(), "{times:?}");
    let agent = lines(&host.output(["logs", "--source", "agent", "--json", "web"]));
    assert!(!agent.is_empty() && agent.iter().all(|line| line["source"] == "agent"));
    assert!(done(&host.output(["logs", "--source", "shim,guest", "web"])).contains("console  INFO"));
    let console = done(&host.output(["console", "web"]));
    assert!(console.contains("Linux version"), "{console}");
    host.wait_for("the container's words", || {
        (done(&host.output(["logs", "web"])) == "from the container\n").then_some(())
    });

    let follower = host.ctl(["logs", "-f", "-s", "owner", "web"]).stdout(Stdio::piped()).spawn().unwrap();
    assert!(host.output(["kill", "web"]).status.success());
    let text = done(&follower.wait_with_output().unwrap());
    assert!(text.contains("to=\"stopped\""), "{text}");
    remove(&host, "web");
}

#[test]
fn files_are_copied_in_and_out() {
    let Some(host) = Host::new() else { return };
    detached(&host, &[], "box", "exec sleep 1000");
    let place = host.scratch("cp");
    std::fs::create_dir_all(place.join("tree/below")).unwrap();
    let big: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(place.join("tree/below/big"), &big).unwrap();
    std::os::unix::fs::symlink("big", place.join("tree/below/link")).unwrap();
    let path = |name: &str| place.join(name).display().to_string();

    done(&host.output(["cp", &path("tree"), "box:/tmp"]));
    let listed =
        done(&host.output(["exec", "box", "sh", "-c", "cd /tmp/tree/below; wc -c <big; readlink link"]));
    assert_eq!(listed, format!("{}\nbig\n", big.len()));
    done(&host.output(["cp", "box:/tmp/tree", &path("back")]));
    assert_eq!(std::fs::read(place.join("back/below/big")).unwrap(), big);
    assert_eq!(std::fs::read_link(place.join("back/below/link")).unwrap(), Path::new("big"));

    std::fs::write(place.join("one"), "1").unwrap();
    done(&host.output(["cp", &path("one"), "box:/tmp/renamed"]));
    assert_eq!(done(&host.output(["exec", "box", "cat", "/tmp/renamed"])), "1");
    done(&host.output(["cp", "box:/tmp/renamed", &path("back")]));
    assert_eq!(std::fs::read_to_string(place.join("back/renamed")).unwrap(), "1");

    // More than a pipe holds, to a tar that cannot go on.
    let full = host.output(["cp", &path("tree"), "box:/proc/"]);
    assert_eq!(full.status.code(), Some(1), "{}", stderr(&full));
    let refused = host.output(["cp", "box:/tmp/no-such-file", &path("x")]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("no-such-file"), "{}", stderr(&refused));
    assert_eq!(host.output(["cp", &path("one"), &path("two")]).status.code(), Some(2));
    remove(&host, "box");
}

#[test]
fn a_container_that_sends_what_was_not_asked_for_writes_nothing() {
    let Some(host) = Host::new() else { return };
    detached(&host, &[], "evil", "exec sleep 1000");
    // A tar of the container's own making, which escapes.
    let script = "mkdir /t && cd /t && echo x >/tmp/evil && tar -cf /t/out /tmp/evil 2>/dev/null; \
        rm /bin/tar; printf '#!/bin/sh\\nexec cat /t/out\\n' >/bin/tar; chmod 755 /bin/tar";
    done(&host.output(["exec", "evil", "sh", "-c", script]));
    let place = host.scratch("evil/to");
    let output = host.output(["cp", "evil:/etc/passwd", &place.display().to_string()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("tmp/evil"), "{}", stderr(&output));
    assert_eq!(std::fs::read_dir(place.parent().unwrap()).unwrap().count(), 0);
    remove(&host, "evil");
}

/// The guest's image, with busybox in it: what a debug console needs.
fn image_with_a_shell(host: &Host) -> PathBuf {
    detached(host, &[], "donor", "exec sleep 1000");
    let busybox = host.scratch("shell/busybox");
    done(&host.output(["cp", "donor:/bin/busybox", &busybox.display().to_string()]));
    remove(host, "donor");
    let mut archive = std::fs::read(host.program("guest-image/initrd.cpio")).unwrap();
    // A second archive, which the kernel unpacks over the first.
    for (name, mode, content) in [
        ("bin", 0o040_755, Vec::new()),
        ("bin/sh", 0o100_755, std::fs::read(&busybox).unwrap()),
        ("bin/uname", 0o120_777, b"sh".to_vec()),
        ("bin/stty", 0o120_777, b"sh".to_vec()),
        ("TRAILER!!!", 0, Vec::new()),
    ] {
        let fields = [0, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        let mut entry = b"070701".to_vec();
        fields.iter().for_each(|field| write!(entry, "{field:08x}").unwrap());
        entry.extend(name.bytes().chain([0]));
        entry.resize(entry.len().next_multiple_of(4), 0);
        entry.extend(content);
        entry.resize(entry.len().next_multiple_of(4), 0);
        archive.extend(entry);
    }
    let path = host.scratch("shell/initrd");
    std::fs::write(&path, archive).unwrap();
    path
}

#[test]
fn the_debug_console_is_a_shell_in_the_guest() {
    let Some(host) = Host::new() else { return };
    let initrd = image_with_a_shell(&host);
    let settings = [
        format!("hypervisor.qemu.initrd={}", initrd.display()),
        "agent.kata.debug_console_enabled=true".to_owned(),
    ];
    detached(&host, &["--set", &settings[0], "--set", &settings[1]], "box", "exec sleep 1000");

    let inside = done(&host.output(["exec", "box", "readlink", "/proc/1/exe"]));
    let output = host.output(["exec", "--vm", "box", "sh", "-c", "echo out; readlink /proc/1/exe; exit 5"]);
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(text.starts_with("out\n") && text.contains("/init") && !text.contains(inside.trim()), "{text:?}");
    assert_eq!(host.output(["exec", "--vm", "box", "no-such-command"]).status.code(), Some(127));

    let mut child =
        host.ctl(["exec", "--vm", "box"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"echo sum $((40 + 2))\n").unwrap();
    let text = done(&child.wait_with_output().unwrap());
    assert!(text.contains("sum 42"), "{text}");
    remove(&host, "box");
}

#[test]
fn without_a_debug_console_one_is_told_how_to_get_it() {
    let Some(host) = Host::new() else { return };
    detached(&host, &[], "off", "exec sleep 1000");
    let output = host.output(["exec", "--vm", "off", "ls"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("agent.kata.debug_console_enabled"), "{}", stderr(&output));
    remove(&host, "off");
    detached(&host, &["--set", "agent.kata.debug_console_enabled=true"], "lean", "exec sleep 1000");
    let output = host.output(["exec", "--vm", "lean", "ls"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("no shell"), "{}", stderr(&output));
    remove(&host, "lean");
}

#[test]
fn orphans_are_reaped_and_the_living_are_not() {
    let Some(host) = Host::new() else { return };
    detached(&host, &[], "alive", "exec sleep 1000");
    detached(&host, &[], "orphan", "exec sleep 1000");
    let pid = json(&host.output(["inspect", "orphan"]))["owner_pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    host.wait_for("the owner's death", || {
        (json(&host.output(["inspect", "orphan"]))["owner_lives"] == false).then_some(())
    });
    let told = json(&host.output(["kill", "--reap-orphans", "--dry-run", "--json"]));
    assert_eq!(
        (&told["orphans"][0]["pod"], &told["orphans"][0]["reaped"]),
        (&"orphan".into(), &false.into())
    );
    assert!(host.run_dir().join("orphan").exists());
    let text = done(&host.output(["kill", "--reap-orphans"]));
    assert!(text.starts_with("orphan: reaped"), "{text}");
    assert!(!host.run_dir().join("orphan").exists());
    assert_eq!(done(&host.output(["kill", "--reap-orphans"])), "no orphans\n");
    assert!(host.output(["exec", "alive", "true"]).status.success());
    remove(&host, "alive");
}

#[test]
fn check_tells_everything_about_the_host_and_can_be_strict() {
    let Some(host) = Host::new() else { return };
    let report = json(&host.output(["check", "--json"]));
    let findings = report["findings"].as_array().unwrap();
    let whats: Vec<&str> = findings.iter().map(|finding| finding["what"].as_str().unwrap()).collect();
    for what in [
        "/dev/kvm",
        "nested",
        "tun",
        "vhost-net",
        "cgroups",
        "hugepages",
        "IOMMU",
        "TEE",
        "access control",
        "state",
        "kernel",
        "QEMU",
        "known bad",
    ] {
        assert!(whats.contains(&what), "{what} is not among {whats:?}");
    }
    for finding in findings.iter().filter(|finding| finding["verdict"] != "ok") {
        assert!(finding["cost"].is_string() && finding["remedy"].is_string(), "{finding}");
    }
    let warned = report["warnings"].as_u64().unwrap() > 0;
    let strict = host.output(["check", "--strict"]);
    assert_eq!(strict.status.code(), Some(i32::from(warned)), "{}", stdout(&strict));
    let jetson = json(&host.output(["check", "--json", "--profile", "jetson"]));
    assert!(jetson["findings"].as_array().unwrap().iter().any(|finding| finding["what"] == "Jetson"));
}

#[test]
fn check_compares_versions_with_a_list_that_somebody_trusted_has_signed() {
    let Some(host) = Host::new() else { return };
    let signed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kata-ctl/src/command/check/known_bad/test");
    let path = |name: &str| signed.join(name).display().to_string();
    let check = |list: &str, key: &str| {
        let report = json(&host.output(["check", "--json", "--known-bad", list, "--known-bad-key", key]));
        let findings = report["findings"].as_array().unwrap().clone();
        findings.into_iter().filter(|finding| finding["what"] == "known bad").collect::<Vec<_>>()
    };
    let found = check(&path("list.toml"), &path("key.pub"));
    assert!(found.iter().any(|finding| finding["found"].as_str().unwrap().contains("TEST-1")), "{found:?}");
    let changed = host.scratch("list.toml");
    let text = std::fs::read_to_string(path("list.toml")).unwrap();
    std::fs::write(&changed, text + "\n# changed\n").unwrap();
    std::fs::copy(path("list.toml.minisig"), format!("{}.minisig", changed.display())).unwrap();
    let found = check(&changed.display().to_string(), &path("key.pub"));
    assert!(found[0]["found"].as_str().unwrap().contains("not signed by the key"), "{found:?}");
    assert_eq!(found[0]["verdict"], "warning");
}

#[test]
fn env_and_version_tell_what_a_pod_is_made_of() {
    let Some(host) = Host::new() else { return };
    let env = json(&host.output(["env", "--json"]));
    assert_eq!(env["config"]["file"], host.config().display().to_string());
    assert_eq!(env["directories"]["run"], host.run_dir().display().to_string());
    assert!(
        env["host"]["memory_mib"].as_u64().unwrap() > 0
            && env["vmm"]["driver"] == Driver::under_test().name(),
        "{env}"
    );
    assert!(done(&host.output(["env"])).contains("host.kernel"));

    let parts = json(&host.output(["version", "--all", "--json"]));
    for name in ["kata-ctl", "owner", "kata-vmm", "kata-virtiofsd", "QEMU", "agent", "guest kernel"] {
        let part = parts.as_array().unwrap().iter().find(|part| part["name"] == name).unwrap();
        assert!(part["version"].is_string(), "{part}");
    }
    assert!(done(&host.output(["version"])).starts_with("kata-ctl "));
}

#[test]
fn a_bundle_holds_what_a_report_needs_and_no_planted_secret() {
    let Some(host) = Host::new() else { return };
    const SECRET: &str = "planted-0123-secret";
    host.configure(&format!("[hypervisor.qemu]\nkernel_params = \"example.token={SECRET}\"\n"));
    let variable = format!("INNOCENT={SECRET}");
    let script = format!("echo {SECRET}; exec sleep 1000");
    detached(&host, &["-e", &variable], "box", &script);
    let path = host.scratch("bundle.tar.gz");
    let told = done(&host.output(["bundle", "box", "-o", &path.display().to_string()]));
    assert_eq!(told.trim(), path.display().to_string());
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);

    let dir = host.scratch("unpacked");
    std::fs::create_dir_all(&dir).unwrap();
    let tar = std::process::Command::new("tar").arg("-xzf").arg(&path).arg("-C").arg(&dir).status().unwrap();
    assert!(tar.success());
    let mut files = Vec::new();
    let mut dirs = vec![dir.clone()];
    while let Some(next) = dirs.pop() {
        for entry in std::fs::read_dir(next).unwrap().flatten() {
            if entry.path().is_dir() { dirs.push(entry.path()) } else { files.push(entry.path()) }
        }
    }
    let has = |end: &str| files.iter().any(|file| file.to_string_lossy().ends_with(end));
    for end in [
        "/README.txt",
        "/env.json",
        "/check.json",
        "/config/effective.toml",
        "/configuration.toml",
        "/pods/box/inspect.json",
        "/pods/box/owner.log",
        "/pods/box/events.json",
        "/pods/box/containers/box/config.json",
        "/host/proc/meminfo",
    ] {
        assert!(has(end), "{end} is not among {files:?}");
    }
    for file in &files {
        let text = std::fs::read_to_string(file).unwrap();
        assert!(!text.contains(SECRET), "{} holds the secret", file.display());
    }
    let spec = files.iter().find(|file| file.ends_with("containers/box/config.json")).unwrap();
    assert!(std::fs::read_to_string(spec).unwrap().contains("INNOCENT=[redacted]"));
    remove(&host, "box");
}

#[test]
fn completions_and_manual_pages_are_made() {
    let Some(host) = Host::new() else { return };
    for shell in ["bash", "zsh", "fish"] {
        assert!(done(&host.output(["completion", shell])).contains("reap-orphans"), "{shell}");
    }
    let dir = host.scratch("man");
    done(&host.output(["man", &dir.display().to_string()]));
    let page = std::fs::read_to_string(dir.join("kata-ctl-exec.1")).unwrap();
    assert!(page.contains("debug_console_enabled"), "{page}");
    assert!(done(&host.output(["man"])).starts_with(".ie"));
    let help = done(&host.output(["--help"]));
    assert!((24..=40).contains(&help.lines().count()), "{help}");
    assert!(!help.contains('\x1b') && done(&host.output(["check", "--color", "always"])).contains('\x1b'));
}

#[test]
fn pods_of_containerd_are_looked_into_like_any_other() {
    let Some(rig) = Containerd::new(Version::V1) else { return };
    if !rig.has_machines() {
        return;
    }
    let id = "ab".repeat(32);
    rig.detached(&[], &id, BUSY);
    let host = rig.host();
    let pods = json(&host.output(["list", "--json"]));
    assert_eq!((&pods[0]["name"], &pods[0]["state"]), (&id.as_str().into(), &"running".into()));
    assert_eq!(pods[0]["namespace"], "default");
    assert!(done(&host.output(["list"])).contains("abababababab  running"));

    // The first digits will do.
    let pod = json(&host.output(["inspect", "abab"]));
    assert_eq!(pod["id"], id.as_str());
    assert!(pod["containers"][0]["bundle"].as_str().unwrap().ends_with(&id));
    assert_eq!(json(&host.output(["ps", "--json", "abab"]))[0]["container"], id.as_str());
    assert!(
        json(&host.output(["stats", "--once", "--json", "abab"]))[0]["cpu_percent"].as_f64().unwrap() > 1.0
    );
    assert_eq!(lines(&host.output(["events", "--once", "--json", "abab"])).len(), 2);
    assert!(done(&host.output(["logs", "-s", "all", "abab"])).contains("agent"));
    let output = host.output(["exec", "-u", "nobody", "abab", "sh", "-c", "id -u; exit 4"]);
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("65534\n", Some(4)), "{}", stderr(&output));
    let place = host.scratch("passwd");
    done(&host.output(["cp", "abab:/etc/passwd", &place.display().to_string()]));
    assert!(std::fs::read_to_string(&place).unwrap().starts_with("root:"));
    let refused = host.output(["logs", "abab"]);
    assert!(stderr(&refused).contains("--source"), "{}", stderr(&refused));
    rig.remove(&id);
}

#[test]
fn image_is_described_and_a_changed_file_of_it_is_found() {
    let Some(host) = Host::new() else { return };
    let told = json(&host.output(["image", "inspect", "--json"]));
    let dir = PathBuf::from(told["directory"].as_str().unwrap());
    assert!(done(&host.output(["image", "inspect"])).contains(told["kernel"]["release"].as_str().unwrap()));
    let verified = json(&host.output(["image", "verify", "--json"]));
    assert_eq!((&verified["sound"], &verified["files"][0]["fault"]), (&true.into(), &Value::Null));

    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(&dir).unwrap().flatten().filter(|entry| entry.path().is_file()) {
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    let kernel = copy.path().join(told["kernel"]["path"].as_str().unwrap());
    std::fs::OpenOptions::new().append(true).open(&kernel).unwrap().write_all(b"x").unwrap();
    let output = host.output(["image", "verify", copy.path().to_str().unwrap()]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(text.contains("CHANGED") && text.contains(kernel.to_str().unwrap()), "{text}");
    assert_eq!(text.lines().filter(|line| line.contains("  ok")).count(), 1, "{text}");
}
