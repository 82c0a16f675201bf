//! `kata-ctl run` in the foreground, on real machines.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use kata_testkit::driver::Driver;
use kata_testkit::host::{Host, patience, stderr, stdout};
use rustix::process::{Pid, Signal, kill_process};

/// Bytes without a pattern that a lossy path might keep by luck, the same each time.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}

#[test]
fn output_streams_and_exit_status_are_the_containers() {
    let Some(host) = Host::new() else { return };
    let output = host.sh(&[], "echo out; echo err >&2; exit 7");
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    assert_eq!(stdout(&output), "out\n");
    assert_eq!(stderr(&output), "err\n");
}

#[test]
fn container_runs_on_a_kernel_of_its_own() {
    let Some(host) = Host::new() else { return };
    let output = host.sh(&[], "cat /proc/version");
    let here = std::fs::read_to_string("/proc/version").unwrap();
    assert!(stdout(&output).starts_with("Linux version"), "{}", stderr(&output));
    assert_ne!(stdout(&output), here);
}

#[test]
fn input_comes_back_byte_for_byte() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let mut child = host
        .ctl(["run", "--rm", "-i", &image, "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let sent = noise(5_000_000);
    let mut stdin = child.stdin.take().unwrap();
    let copy = sent.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&copy).unwrap());
    let mut received = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut received).unwrap();
    writer.join().unwrap();
    assert!(child.wait().unwrap().success());
    assert!(sent == received, "sent {} bytes, got {}", sent.len(), received.len());
}

#[test]
fn without_interactive_the_container_reads_nothing() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let mut child = host
        .ctl(["run", "--rm", &image, "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut received = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut received).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(received.is_empty());
}

#[test]
fn environment_directory_user_and_hostname_are_as_asked() {
    let Some(host) = Host::new() else { return };
    let output = host.sh(
        &["-e", "GREETING=good day", "-w", "/tmp/deep/er", "-u", "1234:4321", "--name", "named"],
        "echo \"$GREETING\"; pwd; id -u; id -g; hostname",
    );
    assert_eq!(stdout(&output), "good day\n/tmp/deep/er\n1234\n4321\nnamed\n", "{}", stderr(&output));
}

#[test]
fn user_is_found_by_name_in_the_image() {
    let Some(host) = Host::new() else { return };
    let output = host.sh(&["-u", "nobody"], "id -u; echo $HOME");
    assert_eq!(stdout(&output), "65534\n/\n", "{}", stderr(&output));
}

#[test]
fn volumes_are_shared_both_ways_and_read_only_ones_are_not_written() {
    let Some(host) = Host::new() else { return };
    let (open, closed) = (host.scratch("open"), host.scratch("closed"));
    for dir in [&open, &closed] {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("from-host"), "hello guest").unwrap();
    }
    let output = host.sh(
        &["-v", &format!("{}:/open", open.display()), "-v", &format!("{}:/closed:ro", closed.display())],
        "cat /open/from-host /closed/from-host; echo -n hello host > /open/from-guest; touch /closed/x || echo refused",
    );
    assert_eq!(stdout(&output), "hello guesthello guestrefused\n", "{}", stderr(&output));
    assert_eq!(std::fs::read_to_string(open.join("from-guest")).unwrap(), "hello host");
    assert!(!closed.join("x").exists());
}

#[test]
fn file_changed_on_the_host_is_seen_anew_within_two_seconds() {
    let Some(host) = Host::new() else { return };
    let dir = host.scratch("changing");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("file"), "one").unwrap();
    let image = host.image();
    let volume = format!("{}:/changing", dir.display());
    let script = "cat /changing/file; echo; touch /changing/read; while ! [ -e /changing/changed ]; do sleep 0.1; done; \
                  sleep 2; cat /changing/file";
    let child = host
        .ctl(["run", "--rm", "-v", &volume, &image, "sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    host.wait_for("the first reading", || dir.join("read").exists().then_some(()));
    std::fs::write(dir.join("file"), "two").unwrap();
    std::fs::write(dir.join("changed"), "").unwrap();
    assert_eq!(stdout(&child.wait_with_output().unwrap()), "one\ntwo");
}

#[test]
fn a_single_file_can_be_a_volume() {
    let Some(host) = Host::new() else { return };
    let file = host.scratch("motd");
    std::fs::write(&file, "one file").unwrap();
    let output = host.sh(&["-v", &format!("{}:/etc/motd:ro", file.display())], "cat /etc/motd");
    assert_eq!(stdout(&output), "one file", "{}", stderr(&output));
}

#[test]
fn read_only_root_refuses_writes_but_tmp_mounts_take_them() {
    let Some(host) = Host::new() else { return };
    let output =
        host.sh(&["--read-only"], "touch /x 2>/dev/null || echo refused; touch /dev/shm/x && echo kept");
    assert_eq!(stdout(&output), "refused\nkept\n", "{}", stderr(&output));
}

#[test]
fn rootfs_directory_runs_without_an_image() {
    let Some(host) = Host::new() else { return };
    let root = host.scratch("root");
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let output =
        host.output(["run", "--rm", "--rootfs", root.to_str().unwrap(), "/bin/busybox", "echo", "bare"]);
    assert_eq!(stdout(&output), "bare\n", "{}", stderr(&output));
}

#[test]
fn writes_do_not_reach_the_image() {
    let Some(host) = Host::new() else { return };
    assert!(host.sh(&[], "echo spoilt > /etc/passwd").status.success());
    let output = host.sh(&[], "head -n 1 /etc/passwd");
    assert_eq!(stdout(&output), "root:x:0:0:root:/root:/bin/sh\n", "{}", stderr(&output));
}

#[test]
fn machine_has_the_memory_and_processors_asked_for() {
    let Some(host) = Host::new() else { return };
    let output = host
        .sh(&["--memory", "384M", "--cpus", "2"], "grep MemTotal /proc/meminfo | tr -dc 0-9; echo; nproc");
    let text = stdout(&output);
    let mut lines = text.lines();
    let mem_kib: u64 = lines.next().unwrap_or_default().parse().unwrap_or(0);
    assert!((300_000..384 * 1024).contains(&mem_kib), "{text}{}", stderr(&output));
    // No more than the host has.
    let processors = std::thread::available_parallelism().unwrap().get().min(2);
    assert_eq!(lines.next(), Some(processors.to_string().as_str()));
}

#[test]
fn unknown_command_ends_with_127_and_names_the_places() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let output = host.output(["run", "--rm", &image, "no-such-command"]);
    assert_eq!(output.status.code(), Some(127), "{}", stderr(&output));
    assert!(stderr(&output).contains("no-such-command"), "{}", stderr(&output));
    assert!(stderr(&output).contains("/bin/no-such-command"), "{}", stderr(&output));
}

#[test]
fn file_that_is_no_program_ends_with_126() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let output = host.output(["run", "--rm", &image, "/etc/passwd"]);
    assert_eq!(output.status.code(), Some(126), "{}", stderr(&output));
    assert!(stderr(&output).contains("/etc/passwd"), "{}", stderr(&output));
}

#[test]
fn container_has_few_privileges_and_a_filter() {
    let Some(host) = Host::new() else { return };
    let output = host.sh(
        &[],
        "grep -E '^(CapEff|Seccomp):' /proc/self/status | tr -d '\\t'; mount -t tmpfs x /tmp 2>/dev/null || echo no-mount; \
         mknod /tmp/mem c 1 1 2>/dev/null && cat /tmp/mem 2>&1 | head -c 1 | wc -c; ls /dev/kmsg 2>/dev/null; \
         cat /proc/kcore 2>/dev/null | head -c 1 | wc -c",
    );
    let text = stdout(&output);
    assert!(text.contains("Seccomp:2"), "{text}{}", stderr(&output));
    assert!(text.contains("CapEff:00000000a80425fb"), "{text}");
    assert!(text.contains("no-mount"), "{text}");
    assert!(!text.contains('1') || !text.lines().any(|line| line.trim() == "1"), "{text}");
}

#[test]
fn terminal_has_a_size_and_a_name() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let run = format!(
        "stty rows 33 cols 111; {} run --rm -it {image} sh -c 'tty; stty size; test -t 0 && echo terminal'",
        host.program("kata-ctl").display()
    );
    let text = host.on_terminal(&run);
    assert!(text.contains("/dev/pts/0"), "{text}");
    assert!(text.contains("33 111"), "{text}");
    assert!(text.contains("terminal"), "{text}");
}

#[test]
fn termination_signal_reaches_the_process() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let mut child =
        host.ctl(["run", "--rm", &image, "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut ready = [0; 6];
    stdout.read_exact(&mut ready).unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5));
    assert_eq!(rest, "caught\n");
}

#[test]
fn interrupt_ends_a_process_that_has_no_handler_and_leaves_nothing() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    // Not a shell: one catches the interrupt and raises it again, and the kernel spares an init that.
    let mut child = host.ctl(["run", "--rm", &image, "sleep", "1000"]).spawn().unwrap();
    host.wait_for("the container", || stdout(&host.output(["ps"])).contains("running").then_some(()));
    let begin = Instant::now();
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(begin.elapsed() < patience(Duration::from_secs(5)));
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
fn third_interrupt_ends_a_process_that_ignores_it() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let script = "trap 'echo caught' INT; echo ready; while :; do sleep 0.1; done";
    let mut child =
        host.ctl(["run", "--rm", &image, "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "ready");
    // Two that come at once are one: the next is sent when the last has arrived.
    for _ in 0..2 {
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        assert_eq!(said.next().unwrap().unwrap(), "caught");
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(137));
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
fn interrupt_while_the_machine_boots_leaves_nothing() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let mut child = host.ctl(["run", "--rm", &image, "sleep", "1000"]).spawn().unwrap();
    host.wait_for("the machine", || (!host.pids_of(Driver::under_test().program()).is_empty()).then_some(()));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert!(!child.wait().unwrap().success());
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
fn much_output_is_complete_when_the_process_ends_at_once() {
    let Some(host) = Host::new() else { return };
    let output = host.sh(&[], "dd if=/dev/zero bs=1M count=20 2>/dev/null; echo end >&2");
    assert_eq!(output.stdout.len(), 20 << 20);
    assert_eq!(stderr(&output), "end\n");
}

/// A guest whose kernel trips over a process that leaves its root file system behind says nothing of its end.
#[test]
fn ends_of_containers_that_end_at_once_are_told() {
    let Some(host) = Host::new() else { return };
    for _ in 0..6 {
        let output = host.sh(&[], "exit 3");
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    }
}

#[test]
fn timing_names_the_stages_and_the_choice() {
    let Some(host) = Host::new() else { return };
    let output = host.sh(&["--timing"], "true");
    let text = stderr(&output);
    for word in [Driver::under_test().name(), "kernel", "agent", "container"] {
        assert!(text.contains(word), "no {word} in {text}");
    }
}

#[test]
fn microvm_machine_runs_a_container_too() {
    let Some(host) = Host::new() else { return };
    let output =
        host.sh(&["--hypervisor", "qemu", "--set", "hypervisor.qemu.machine_type=microvm"], "echo small");
    assert_eq!(stdout(&output), "small\n", "{}", stderr(&output));
}

#[test]
fn newer_qemu_runs_a_container_on_both_machines() {
    let Some(host) = Host::new() else { return };
    let Some(qemu) = std::env::var_os("KATA_TEST_NEWER_QEMU") else {
        return kata_testkit::skip(
            "KATA_TEST_NEWER_QEMU is not set: the backported QEMU could not be unpacked",
        );
    };
    let path = format!("hypervisor.qemu.path={}", qemu.display());
    for machine in ["q35", "microvm"] {
        let machine = format!("hypervisor.qemu.machine_type={machine}");
        let output = host.sh(&["--hypervisor", "qemu", "--set", &path, "--set", &machine], "echo new");
        assert_eq!(stdout(&output), "new\n", "{}", stderr(&output));
    }
}
