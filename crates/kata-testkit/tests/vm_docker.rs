//! Docker runs pods through containerd: run, exec, logs, stop, volumes, networks and published ports.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use kata_testkit::containerd::Docker;
use kata_testkit::host::{patience, stderr, stdout};

#[test]
fn container_has_output_exit_code_environment_and_volume() {
    let Some(docker) = Docker::new() else { return };
    let volume = docker.containerd().host().scratch("volume/file");
    let volume = volume.parent().unwrap().to_owned();
    std::fs::create_dir_all(&volume).unwrap();
    let bind = format!("{}:/volume", volume.display());
    let script = "echo out; echo err >&2; echo $A; pwd; hostname; echo kept > /volume/new; exit 3";
    let options = ["--rm", "-e", "A=b c", "-w", "/tmp", "-v", &bind, "--hostname", "named", "busybox"];
    let output = docker.run(&[&options[..], &["sh", "-c", script]].concat());
    assert_eq!(
        (stdout(&output).as_str(), stderr(&output).as_str(), output.status.code()),
        ("out\nb c\n/tmp\nnamed\n", "err\n", Some(3))
    );
    assert_eq!(std::fs::read_to_string(volume.join("new")).unwrap(), "kept\n");
    assert_eq!(docker.ok(["ps", "-aq"]), "", "--rm removes it");
}

#[test]
fn daemon_may_have_machines_by_default() {
    let Some(docker) = Docker::configured(r#"{"default-runtime": "io.containerd.kata.v2"}"#) else { return };
    let kernel = docker.ok(["run", "--rm", "busybox", "uname", "-r"]);
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(kernel, host);
}

#[test]
fn user_limits_and_mounts_are_as_asked() {
    let Some(docker) = Docker::new() else { return };
    let script = "id -u; id -g; touch /x; touch /fresh/x && echo temporary; ulimit -n; \
                  df -k /dev/shm | awk 'END { print $2 }'; cat /proc/1/comm";
    let options = ["-u", "7:8", "--read-only", "--tmpfs", "/fresh:mode=1777", "--ulimit", "nofile=99:99"];
    let more = ["--shm-size", "3m", "--init", "busybox", "sh", "-c", script];
    let output = docker.run(&[&["--rm"], &options[..], &more].concat());
    assert_eq!(stdout(&output), "7\n8\ntemporary\n99\n3072\ndocker-init\n", "{}", stderr(&output));
    assert!(stderr(&output).contains("/x: Read-only file system"), "{}", stderr(&output));
}

#[test]
fn names_that_docker_makes_are_known_in_the_container() {
    let Some(docker) = Docker::new() else { return };
    let script = "cat /etc/resolv.conf /etc/hostname; grep -w -e named -e other /etc/hosts";
    let options = ["--hostname", "named", "--dns", "192.0.2.53", "--add-host", "other:192.0.2.7"];
    let output = docker.run(&[&["--rm"], &options[..], &["busybox", "sh", "-c", script]].concat());
    let text = stdout(&output);
    let lines: Vec<&str> = text.lines().collect();
    for line in ["nameserver 192.0.2.53", "named", "192.0.2.7\tother"] {
        assert!(lines.contains(&line), "no `{line}` in: {text}{}", stderr(&output));
    }
    assert!(lines.iter().any(|line| line.starts_with("172.17.") && line.ends_with("named")), "{text}");
}

#[test]
fn terminal_has_the_clients_size_and_the_exit_code_is_told() {
    let Some(docker) = Docker::new() else { return };
    // The client sends its size after the start.
    let script = "tty; for n in $(seq 1000); do test \"$(stty size)\" = \"27 93\" && break; sleep 0.05; done; \
                  stty size; exit 6";
    let run = format!("run --rm -it --runtime {} busybox sh -c '{script}'", docker.containerd().runtime());
    let command = format!("stty rows 27 cols 93; {} {run}; echo ended with $?", docker.client());
    let text = docker.containerd().host().on_terminal(&command);
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    assert!(lines.iter().any(|line| line.starts_with("/dev/pts/") || *line == "/dev/console"), "{text}");
    assert!(lines.contains(&"27 93") && lines.contains(&"ended with 6"), "{text}");
}

#[test]
fn unknown_command_is_127_and_named() {
    let Some(docker) = Docker::new() else { return };
    let output = docker.run(&["--rm", "busybox", "no-such-command"]);
    assert_eq!(output.status.code(), Some(127), "{}", stderr(&output));
    assert!(stderr(&output).contains("no-such-command"), "{}", stderr(&output));
}

#[test]
fn what_cannot_be_executed_is_126_and_what_has_no_interpreter_127() {
    let Some(docker) = Docker::new() else { return };
    let refused = docker.run(&["--rm", "busybox", "/etc/passwd"]);
    let text = stderr(&refused);
    assert_eq!(refused.status.code(), Some(126), "{text}");
    assert!(text.contains("/etc/passwd") && text.contains("permission denied"), "{text}");

    let script = "echo '#!/no/such/interpreter' > /script; chmod +x /script; echo ready; exec sleep 1000";
    docker.detached(&[], "box", script);
    docker.wait_for_log("box", "ready\n");
    for (command, code) in [("/etc/passwd", 126), ("/etc", 126), ("/script", 127), ("no-such-command", 127)] {
        let output = docker.output(["exec", "box", command]);
        let text = stdout(&output) + &stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(command), "{text}");
    }
    assert_eq!(docker.inspect("box", "State.Status"), "running");
    docker.ok(["rm", "--force", "box"]);
}

#[test]
fn container_in_the_background_is_logged_entered_stopped_and_started_again() {
    let Some(docker) = Docker::new() else { return };
    let script = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done";
    docker.detached(&[], "box", script);
    docker.wait_for_log("box", "up\n");

    let entered =
        docker.output(["exec", "-e", "A=b", "-u", "7:8", "box", "sh", "-c", "echo $A; id -u; exit 4"]);
    assert_eq!((stdout(&entered).as_str(), entered.status.code()), ("b\n7\n", Some(4)));

    docker.ok(["stop", "--time", "60", "box"]);
    let state = || (docker.inspect("box", "State.Status"), docker.inspect("box", "State.ExitCode"));
    assert_eq!(state(), ("exited".to_owned(), "5".to_owned()));
    docker.wait_for_log("box", "up\nbye\n");

    docker.ok(["start", "box"]);
    assert_eq!(docker.inspect("box", "State.Status"), "running");
    docker.ok(["rm", "--force", "box"]);
}

#[test]
fn container_is_listed_measured_paused_and_killed() {
    let Some(docker) = Docker::new() else { return };
    docker.detached(&[], "box", "echo up; exec sleep 1000");
    docker.wait_for_log("box", "up\n");
    assert_eq!(docker.ok(["ps", "--format", "{{.Names}}"]), "box\n");

    // Every process of a pod has the owner's pid.
    let top = docker.ok(["top", "box", "-o", "pid,comm"]);
    let pid = docker.inspect("box", "State.Pid");
    assert!(top.lines().any(|line| line.trim_start().starts_with(&pid)), "{pid} in: {top}");

    let stats = docker.ok(["stats", "--no-stream", "--format", "{{.PIDs}} {{.MemUsage}}", "box"]);
    assert!(stats.starts_with("1 ") && !stats.starts_with("1 0B"), "{stats}");

    docker.ok(["pause", "box"]);
    assert_eq!(docker.inspect("box", "State.Status"), "paused");
    assert!(!docker.output(["exec", "box", "true"]).status.success(), "nothing runs in a paused container");
    docker.ok(["unpause", "box"]);
    assert_eq!(stdout(&docker.output(["exec", "box", "echo", "again"])), "again\n");

    docker.ok(["kill", "box"]);
    assert_eq!(docker.ok(["wait", "box"]), "137\n");
    assert_eq!(docker.inspect("box", "State.Status"), "exited");
    docker.ok(["rm", "box"]);
}

#[test]
fn files_are_copied_into_and_out_of_a_container() {
    let Some(docker) = Docker::new() else { return };
    docker.detached(&[], "box", "echo from the guest > /out; echo up; exec sleep 1000");
    docker.wait_for_log("box", "up\n");
    let file = docker.containerd().host().scratch("copied");
    let file = file.to_str().unwrap();
    docker.ok(["cp", "box:/out", file]);
    assert_eq!(std::fs::read_to_string(file).unwrap(), "from the guest\n");
    std::fs::write(file, "from the host\n").unwrap();
    docker.ok(["cp", file, "box:/in"]);
    assert_eq!(docker.ok(["exec", "box", "cat", "/in"]), "from the host\n");
    docker.ok(["rm", "--force", "box"]);
}

#[test]
fn container_outlives_a_restart_of_docker_that_is_to_restore_it() {
    let Some(mut docker) = Docker::configured(r#"{"live-restore": true}"#) else { return };
    docker.detached(
        &[],
        "box",
        "echo up; while ! test -e /go; do sleep 0.1; done; echo gone on; exec sleep 1000",
    );
    docker.wait_for_log("box", "up\n");
    let pid = docker.inspect("box", "State.Pid");
    docker.restart();
    assert_eq!(docker.inspect("box", "State.Status"), "running");
    assert_eq!(docker.inspect("box", "State.Pid"), pid);
    docker.ok(["exec", "box", "touch", "/go"]);
    docker.wait_for_log("box", "up\ngone on\n");
    docker.ok(["rm", "--force", "box"]);
}

#[test]
fn stop_of_what_does_not_listen_is_bounded() {
    let Some(docker) = Docker::new() else { return };
    docker.detached(&[], "deaf", "trap '' TERM; echo deaf; while :; do sleep 1; done");
    docker.wait_for_log("deaf", "deaf\n");
    let began = Instant::now();
    docker.ok(["stop", "--time", "1", "deaf"]);
    assert!(began.elapsed() < patience(Duration::from_secs(8)), "{:?}", began.elapsed());
    assert_eq!(docker.inspect("deaf", "State.ExitCode"), "137");
    docker.ok(["rm", "deaf"]);
}

#[test]
fn published_port_reaches_the_container_and_containers_reach_each_other() {
    let Some(docker) = Docker::new() else { return };
    let script = "mkdir /www; echo served > /www/index.html; exec httpd -f -p 80 -h /www";
    docker.detached(&["-p", "127.0.0.1:8080:80"], "web", script);
    let fetch = |address: &str| {
        let mut stream = TcpStream::connect(address).ok()?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.ends_with("\r\n\r\nserved\n").then_some(())
    };
    let host = docker.containerd().host();
    host.wait_for("the server", || docker.on_its_host(|| fetch("127.0.0.1:8080")));
    let address = docker.inspect("web", "NetworkSettings.IPAddress");
    docker.on_its_host(|| fetch(&format!("{address}:80"))).expect("the container answers on its own address");

    let script = format!(
        "for n in $(seq 20); do \
           ping -c 1 -W 10 $(ip route | awk '/^default/ {{ print $3 }}') > /dev/null && echo gateway && break; done; \
         wget -q -O - http://{address}/"
    );
    let output = docker.run(&["--rm", "busybox", "sh", "-c", &script]);
    assert_eq!(stdout(&output), "gateway\nserved\n", "{}", stderr(&output));
    docker.ok(["rm", "--force", "web"]);
}

#[test]
fn memory_limit_is_in_force_and_can_be_changed() {
    let Some(docker) = Docker::new() else { return };
    docker.detached(&["--memory", "64m"], "box", "exec sleep 1000");
    // Of the second hierarchy, or the first.
    let files = "cat /sys/fs/cgroup/memory.max || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";
    let limit = || docker.ok(["exec", "box", "sh", "-c", files]).trim().parse::<u64>().unwrap() >> 20;
    assert_eq!(limit(), 64);
    docker.ok(["update", "--memory", "96m", "--memory-swap", "96m", "box"]);
    assert_eq!(limit(), 96);
    docker.ok(["rm", "--force", "box"]);
}

#[test]
fn container_without_a_network_has_only_its_loopback() {
    let Some(docker) = Docker::new() else { return };
    let output = docker.run(&["--rm", "--network", "none", "busybox", "sh", "-c", "ls /sys/class/net"]);
    let text = stdout(&output);
    assert!(text.lines().any(|name| name == "lo") && !text.contains("eth"), "{text}{}", stderr(&output));
}

#[test]
fn namespaces_of_the_host_and_of_other_containers_are_refused_by_name() {
    let Some(docker) = Docker::new().filter(|docker| docker.containerd().has_machines()) else { return };
    docker.detached(&[], "box", "exec sleep 1000");
    for (option, value, named) in [
        ("--network", "host", "the host's network, which a virtual machine cannot share"),
        ("--network", "container:box", "in use by another virtual machine"),
        ("--pid", "container:box", "pid namespace is that of another pod"),
        ("--pid", "host", "the host's processes, which a virtual machine cannot share"),
        ("--ipc", "host", "the host's shared memory"),
    ] {
        let output = docker.run(&["--rm", option, value, "busybox", "true"]);
        assert_eq!(output.status.code(), Some(125), "{option} {value}");
        assert!(stderr(&output).contains(named), "{option} {value}: {}", stderr(&output));
    }
    let gateway = docker.inspect("box", "NetworkSettings.Gateway");
    docker.ok([
        "exec",
        "box",
        "sh",
        "-c",
        &format!("for n in $(seq 20); do ping -c 1 -W 10 {gateway} && exit 0; done; exit 1"),
    ]);
    docker.ok(["rm", "--force", "box"]);
}
