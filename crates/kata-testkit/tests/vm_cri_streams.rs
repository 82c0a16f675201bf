//! `kubectl exec`, `attach`, `cp` and `port-forward`: streams of the CRI, against both containerds.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use kata_testkit::cri::Cri;
use kata_testkit::with_each_cri;

with_each_cri!(processes_have_streams_terminals_and_sizes, ports_of_the_pods_loopback_are_forwarded);

const STDOUT: usize = 1;
const STDERR: usize = 2;

fn processes_have_streams_terminals_and_sizes(cri: &mut Cri) {
    let pod = cri.pod("streams").run();
    let main = pod.container("main").stdin().sh("while read -r line; do echo \"got $line\"; done").start();

    // exec -i: input, both outputs, the exit code.
    let mut exec =
        main.exec_stream(&["sh", "-c", "read -r word; echo out $word; echo err >&2; exit 5"], false);
    exec.send("hello\n");
    let end = exec.wait();
    assert_eq!((exec.received(STDOUT), exec.received(STDERR)), ("out hello\n".into(), "err\n".into()));
    assert_eq!(end["reason"], "NonZeroExitCode", "{end}");
    assert_eq!(end["details"]["causes"][0]["message"], "5", "{end}");
    let mut exec = main.exec_stream(&["true"], false);
    assert_eq!(exec.wait()["status"], "Success");

    // exec -it: a terminal that knows its size, and the keys that end a command.
    let mut shell = main.exec_stream(&["sh"], true);
    shell.resize(33, 111);
    // The size goes its own way, and may come after the words.
    shell.send("until stty size 2>/dev/null | grep 33; do sleep 0.1; done; echo mark$((1+1))\n");
    let said = shell.wait_for(STDOUT, "mark2");
    assert!(said.contains("33 111"), "{said}");
    // The one that says so must be the one that is to be interrupted: between two commands the key ends none.
    shell.send("sh -c 'echo go$((1+1)); exec sleep 1000'\n");
    shell.wait_for(STDOUT, "go2");
    shell.send("\u{3}");
    shell.send("exit 4\n");
    assert_eq!(shell.wait()["details"]["causes"][0]["message"], "4");

    // attach: to the container's own process, and again after the client went away.
    for word in ["one", "two"] {
        let mut attached = main.attach(false);
        attached.repeat(&format!("{word}\n"), STDOUT, &format!("got {word}\n"));
        attached.close();
    }
    main.wait_for_log("got two\n");

    // cp, as kubectl does it: a tar through an exec.
    let content = "0123456789abcdef".repeat(40_000);
    let mut put =
        main.exec_stream(&["sh", "-c", &format!("head -c {} > /copy; wc -c < /copy", content.len())], false);
    for part in content.as_bytes().chunks(16_000) {
        put.send_to(0, part);
    }
    put.wait_for(STDOUT, &format!("{}\n", content.len()));
    let mut get = main.exec_stream(&["tar", "cf", "-", "-C", "/", "copy"], false);
    assert_eq!(get.wait()["status"], "Success");
    assert!(get.received(STDOUT).contains(&content));

    let terminal = pod
        .container("terminal")
        .terminal()
        .sh("while read -r word; do echo got $word; [ $word = end ] && break; done")
        .start();
    let mut attached = terminal.attach(true);
    attached.repeat("typed\n", STDOUT, "got typed");
    attached.send("end\n");
    assert_eq!(terminal.wait().exit_code, 0);
    pod.remove();
}

fn ports_of_the_pods_loopback_are_forwarded(cri: &mut Cri) {
    if !cri.containerd().has_machines() {
        return;
    }
    let pod = cri.pod("ports").run();
    // Only on its loopback, which nobody outside of the machine has.
    let script = "mkdir /www; head -c 300000 /dev/zero | tr '\\0' x > /www/index.html; exec httpd -f -p 127.0.0.1:80 -h /www";
    let server = pod.container("server").sh(script).start();
    server.until("wget -q -O /dev/null http://127.0.0.1/");
    for _ in 0..2 {
        let mut client = pod.forward(80);
        client.send("GET / HTTP/1.0\r\n\r\n");
        client.wait_for(0, &"x".repeat(300_000));
        client.close();
    }
    // Where nobody listens the connection ends, and the next one is none the worse for it.
    let mut nobody = pod.forward(81);
    nobody.send("anybody?");
    nobody.wait();
    let mut client = pod.forward(80);
    client.send("GET /missing HTTP/1.0\r\n\r\n");
    client.wait_for(0, "404");
    client.close();
    pod.remove();
}
