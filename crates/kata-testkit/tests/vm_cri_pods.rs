//! Pods as a kubelet makes them, through the CRI of both containerds.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use kata_testkit::cri::Cri;
use kata_testkit::with_each_cri;

with_each_cri!(pod_is_run_entered_and_removed);

fn pod_is_run_entered_and_removed(cri: &mut Cri) {
    let pod = cri.pod("web").hostname("www").label("app", "web").run();
    assert!(pod.is_ready());
    assert!(pod.address().starts_with("10.89.0."), "{}", pod.address());
    let main = pod.container("main").env("GREETING", "hello").sh("echo $GREETING; exec sleep 1000").start();
    main.wait_for_log("hello\n");
    assert_eq!(main.sh("hostname").text(), "www\n");
    assert_eq!(main.sh("exit 3").code, 3);
    let machine = main.sh("cat /proc/sys/kernel/random/boot_id").text();
    assert_ne!(machine, std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap());
    let ping = main.sh("ping -c 1 -W 10 10.89.0.1");
    assert_eq!(ping.code, 0, "{ping:?}");
    pod.remove();
}
