//! Pods as a kubelet makes them, through the CRI of both containerds: what is in a pod, and what is shared in it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test fails by panicking")]

use kata_testkit::containerd::Version;
use kata_testkit::cri::{Code, Cri, api};
use kata_testkit::with_each_cri;

with_each_cri!(
    pod_is_run_entered_and_removed,
    containers_of_a_pod_come_and_go,
    containers_share_ipc_and_host_name_and_their_processes_when_asked,
);

fn v2(test: fn(&mut Cri)) {
    kata_testkit::cri::with(Version::V2, test);
}

fn pod_is_run_entered_and_removed(cri: &mut Cri) {
    let pod = cri.pod("web").hostname("www").label("app", "web").annotation("example.org/a", "b").run();
    assert!(pod.is_ready());
    assert!(pod.address().starts_with("10.89.0."), "{}", pod.address());
    let status = pod.status();
    assert_eq!((&status.labels["app"], &status.annotations["example.org/a"]), (&"web".into(), &"b".into()));
    let main = pod.container("main").label("tier", "front").env("GREETING", "hello");
    let main = main.sh("echo $GREETING; echo trouble >&2; exec sleep 1000").start();
    // Both streams go their own ways into the log.
    main.wait_for_log("trouble\n");
    main.wait_for_log("hello\n");
    assert_eq!((main.log_of("stdout"), main.log_of("stderr")), ("hello\n".into(), "trouble\n".into()));
    assert_eq!(main.status().labels["tier"], "front");
    assert_eq!(main.sh("hostname").text(), "www\n");
    assert_eq!(main.sh("exit 3").code, 3);
    let machine = main.sh("cat /proc/sys/kernel/random/boot_id").text();
    assert_ne!(machine, std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap());
    for gateway in ["10.89.0.1", "fd00:89::1"] {
        main.until(&format!("ping -c 1 -W 10 {gateway}"));
    }
    pod.stop();
    assert!(!pod.is_ready());
    assert_eq!(main.status().exit_code, 137);
    pod.remove();
}

fn containers_of_a_pod_come_and_go(cri: &mut Cri) {
    let pod = cri.pod("pod").run();
    // Init containers: one after the other, with what they leave in a volume of the pod.
    let volume = cri.host().scratch("empty-dir");
    std::fs::create_dir(&volume).unwrap();
    for step in ["one", "two"] {
        let script = format!("echo {step} >> /work/steps; echo {step} done");
        let ran = pod.container(&format!("init-{step}")).mount(&volume, "/work").sh(&script).run();
        assert_eq!((ran.stdout, ran.code), (format!("{step} done\n"), 0));
    }
    let main = pod.container("main").mount(&volume, "/work").sh("cat /work/steps; exec sleep 1000").start();
    main.wait_for_log("one\ntwo\n");
    let side = pod.container("side").mount(&volume, "/work").idle().start();
    side.sh("echo three >> /work/steps");
    main.until("grep three /work/steps");

    // One that fails is started again, as another attempt; the other is not disturbed.
    let machine = main.sh("cat /proc/sys/kernel/random/boot_id").text();
    let failing = pod.container("failing").sh("exit 7").start();
    assert_eq!(failing.wait().exit_code, 7);
    let again = pod.container("failing").attempt(1).sh("exit 8").start();
    let status = again.wait();
    assert_eq!((status.exit_code, status.reason.as_str(), status.metadata.attempt), (8, "Error", 1));
    failing.remove();
    again.remove();
    // The last one goes, and the pod waits for the next.
    main.stop(0);
    main.remove();
    side.stop(0);
    side.remove();
    assert!(pod.is_ready() && cri.containers().is_empty());
    let next = pod.container("main").attempt(1).mount(&volume, "/work").idle().start();
    assert_eq!(next.sh("cat /proc/sys/kernel/random/boot_id").text(), machine, "the same machine");
    pod.remove();
    assert_eq!(std::fs::read_to_string(volume.join("steps")).unwrap(), "one\ntwo\nthree\n");
}

fn containers_share_ipc_and_host_name_and_their_processes_when_asked(cri: &mut Cri) {
    let pod = cri.pod("apart").run();
    let (one, other) = (pod.container("one").idle().start(), pod.container("other").idle().start());
    one.sh("echo seen > /dev/shm/file");
    assert_eq!(other.sh("cat /dev/shm/file").text(), "seen\n");
    for (kind, shared) in [("ipc", true), ("uts", true), ("net", true), ("pid", false), ("mnt", false)] {
        let look = format!("readlink /proc/self/ns/{kind}");
        assert_eq!(one.sh(&look).text() == other.sh(&look).text(), shared, "{kind}");
    }
    assert_eq!(one.sh("ps | grep -c '[s]leep 1000'").text(), "1\n");
    // A debugger is put beside one container; with two there is no telling which is meant.
    let target = |options: &mut api::NamespaceOption, id: &str| {
        options.pid = api::NamespaceMode::NAMESPACE_TARGET.into();
        id.clone_into(&mut options.target_id);
    };
    let debugger = |id: &str| {
        let id = id.to_owned();
        let plan = pod.container("debugger").idle();
        plan.security(|security| target(security.namespace_options.mut_or_insert_default(), &id)).try_start()
    };
    let refused = debugger(one.id()).err().unwrap();
    assert!(refused.message().contains("shareProcessNamespace"), "{}", refused.message());
    other.stop(0);
    other.remove();
    let beside = debugger(one.id()).unwrap_or_else(|status| panic!("{}", status.message()));
    assert_eq!(
        beside.sh("readlink /proc/1/cmdline || cat /proc/1/cmdline | tr '\\0' ' '").text(),
        "sleep 1000 "
    );
    assert_eq!(beside.sh("readlink /proc/self/ns/pid").text(), one.sh("readlink /proc/self/ns/pid").text());
    pod.remove();

    let pod = cri.pod("together").shared_pids().run();
    let script = "sleep 2000 & sleep 2001 & exec sleep 2002";
    let (one, other) = (pod.container("one").sh(script).start(), pod.container("other").idle().start());
    assert_eq!(other.until("ps | grep -c '[s]leep 200'  | grep 3"), "3\n");
    assert_ne!(other.sh("echo $$").text(), "1\n");
    // With the process of a container go all that it has left.
    other.sh("kill -9 $(ps | awk '/[s]leep 2002/ {print $1}')");
    assert_eq!(one.wait().exit_code, 137);
    other.until("! ps | grep '[s]leep 200'");
    let again = pod.container("one").attempt(1).idle().start();
    assert_eq!(again.sh("ps | grep -c '[s]leep 1000'").text(), "2\n");
    pod.remove();
}

#[test]
fn namespaces_of_the_host_are_refused_with_what_to_change() {
    v2(|cri| {
        type Options = fn(&mut api::NamespaceOption);
        let cases: [(&str, Options); 3] = [
            ("hostNetwork", |options| options.network = api::NamespaceMode::NAMESPACE_NODE.into()),
            ("hostPID", |options| options.pid = api::NamespaceMode::NAMESPACE_NODE.into()),
            ("hostIPC", |options| options.ipc = api::NamespaceMode::NAMESPACE_NODE.into()),
        ];
        for (field, ask) in cases {
            let refused = cri.pod("host").namespaces(ask).try_run().err().unwrap();
            assert!(refused.message().contains(field), "{field}: {}", refused.message());
            assert_ne!(refused.code(), Code::DeadlineExceeded);
        }
        assert!(cri.pods().is_empty());
    });
}

#[test]
fn pod_has_the_settings_that_it_asks_for() {
    v2(|cri| {
        let files = cri.host().scratch("kubelet");
        std::fs::create_dir(&files).unwrap();
        let file = |name: &str, text: &str| {
            let path = files.join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let pod = cri
            .pod("set")
            .sysctl("net.ipv4.ip_local_port_range", "2000 3000")
            .sysctl("net.ipv4.tcp_syncookies", "0")
            .sysctl("kernel.shm_rmid_forced", "1")
            .sysctl("kernel.msgmax", "16384")
            .with(|config| {
                let dns = config.dns_config.mut_or_insert_default();
                dns.servers = vec!["192.0.2.53".to_owned()];
                dns.searches = vec!["default.svc.example".to_owned(), "example".to_owned()];
                dns.options = vec!["ndots:5".to_owned()];
            })
            .run();
        let mut plan = pod.container("main").idle();
        for n in 0..500 {
            plan = plan.env(&format!("VARIABLE_{n}"), &"x".repeat(40));
        }
        // As a kubelet does: hosts, termination log, the account's token in a read-only volume.
        let log = file("termination-log", "");
        let main = plan
            .mount(file("hosts", "127.0.0.1 localhost\n203.0.113.7 elsewhere\n"), "/etc/hosts")
            .mount(&log, "/dev/termination-log")
            .mount_read_only(file("token", "secret"), "/var/run/secrets/token")
            .start();
        let sysctls = "cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/net/ipv4/tcp_syncookies \
                       /proc/sys/kernel/shm_rmid_forced /proc/sys/kernel/msgmax | tr '\\t' ' '";
        assert_eq!(main.sh(sysctls).text(), "2000 3000\n0\n1\n16384\n");
        let resolver = main.sh("cat /etc/resolv.conf").text();
        for line in ["nameserver 192.0.2.53", "search default.svc.example example", "options ndots:5"] {
            assert!(resolver.contains(line), "{resolver}");
        }
        assert_eq!(main.sh("env | grep -c ^VARIABLE_").text(), "500\n");
        assert_eq!(main.sh("grep -c elsewhere /etc/hosts; cat /etc/hostname").text(), "1\nset\n");
        assert_eq!(main.sh("cat /var/run/secrets/token").text(), "secret");
        assert_ne!(main.sh("echo x > /var/run/secrets/token").code, 0);
        main.sh("printf 'why it ended' > /dev/termination-log");
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "why it ended");
        pod.remove();
    });
}

#[test]
fn privileged_container_has_all_rights_in_its_machine_and_no_device_of_the_host() {
    v2(|cri| {
        let pod = cri.pod("privileged").with(|config| {
            config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
        });
        let pod =
            pod.namespaces(|options| options.pid = api::NamespaceMode::NAMESPACE_CONTAINER.into()).run();
        let (all, usual) =
            (pod.container("all").privileged().idle().start(), pod.container("usual").idle().start());
        let rights = "grep CapEff /proc/self/status";
        assert_ne!(all.sh(rights).text(), usual.sh(rights).text());
        all.sh("mkdir /mnt && mount -t tmpfs none /mnt && umount /mnt").text();
        assert_ne!(usual.sh("mkdir -p /mnt && mount -t tmpfs none /mnt").code, 0);
        // A parameter of the guest's kernel: the host's own stays as it is.
        let before = std::fs::read_to_string("/proc/sys/vm/swappiness").unwrap();
        all.sh("echo 17 > /proc/sys/vm/swappiness; mount -o remount,rw /proc/sys 2>/dev/null; true").text();
        assert_eq!(std::fs::read_to_string("/proc/sys/vm/swappiness").unwrap(), before);
        assert_eq!(all.sh("ls /dev/kvm /dev/net/tun /dev/loop-control 2>/dev/null | wc -l").text(), "0\n");
        pod.remove();
    });
}
