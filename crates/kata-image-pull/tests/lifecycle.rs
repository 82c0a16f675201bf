//! Sockets, bundles, restarts.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use support::liar::image;
use support::{Code, Made, Running, Service, can_run, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_kata-image-pull");

fn config(dir: &std::path::Path) -> std::path::PathBuf {
    let path = dir.join("config.toml");
    let text = format!("work_dir = \"{}/work\"\n[signatures]\ndefault = \"accept\"\n", dir.display());
    fs::write(&path, text).unwrap();
    path
}

#[test]
fn a_bundle_is_made_once_and_only_where_bundles_are() {
    if !can_run(&["unshare"]) {
        return;
    }
    let registry = image(Made::file("f"), |_| None);
    let service = Service::start(&registry.insecure());
    let name = registry.name("app:v1");
    service.pull(&name, "one").unwrap();
    assert_eq!(service.pull(&name, "one").unwrap_err().0, Code::ALREADY_EXISTS);
    let bundles = service.dir.path().join("bundles");
    symlink("/etc", bundles.join("link")).unwrap();
    for bad in ["relative".to_owned(), "/etc/x".to_owned(), format!("{}/../x", bundles.display())] {
        assert_eq!(service.pull_at(&name, &bad).unwrap_err().0, Code::INVALID_ARGUMENT, "{bad}");
    }
}

#[test]
fn a_writable_layer_goes_when_its_bundle_is_unmounted() {
    if !can_run(&["unshare", "nsenter"]) {
        return;
    }
    let registry = image(Made::file("f"), |_| None);
    let mut service = Service::start(&registry.insecure());
    let name = registry.name("app:v1");
    service.pull(&name, "one").unwrap();
    service.pull(&name, "two").unwrap();
    assert_eq!(service.names("roots").len(), 2);
    service.unmount("one");
    service.pull(&name, "three").unwrap();
    assert_eq!(service.names("roots").len(), 2, "the first one's is gone");
    service.pull(&name, "one").unwrap();
    assert_eq!(fs::read_to_string(service.bundle("one").join("rootfs/file")).unwrap(), "f");
    // Its namespace, and so its mounts, end with the killed service.
    fs::create_dir(service.dir.path().join("work/images/layers/x.partial")).unwrap();
    service.restart();
    // It listens before it has tidied up.
    wait_for("the end of what nobody needs", || service.names("roots").is_empty());
    assert_eq!(service.names("images/layers").len(), 1, "{:?}", service.names("images/layers"));
}

#[test]
fn many_layers_are_mounted() {
    if !can_run(&["unshare"]) {
        return;
    }
    let layers: Vec<_> = (0..120).map(|n| support::layer(&[(format!("f{n}").as_str(), "x")])).collect();
    let registry = image(Made::of(&layers), |_| None);
    let service = Service::start(&registry.insecure());
    service.pull(&registry.name("app:v1"), "one").unwrap();
    assert_eq!(fs::read_dir(service.bundle("one").join("rootfs")).unwrap().count(), 120);
}

#[test]
fn systemd_hands_over_the_socket_and_is_told_when_it_is_served() {
    if !can_run(&["sh"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, notify) = (dir.path().join("activated"), dir.path().join("notify"));
    let listener = UnixListener::bind(&path).unwrap();
    let told = UnixDatagram::bind(&notify).unwrap();
    told.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let script = "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"";
    let process = Command::new("sh")
        .args(["-c", script, "sh", PROGRAM, "--config"])
        .arg(config(dir.path()))
        .env("NOTIFY_SOCKET", &notify)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut process = Running(process);
    let mut words = [0; 64];
    let length = told.recv(&mut words).unwrap();
    assert_eq!(&words[..length], b"READY=1\n");
    UnixStream::connect(&path).unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(process.0.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let length = told.recv(&mut words).unwrap();
    assert_eq!(&words[..length], b"STOPPING=1\n");
    assert!(process.0.wait().unwrap().success());
}

fn fails(dir: &std::path::Path, socket: &std::path::Path) -> Output {
    Command::new(PROGRAM).arg("--config").arg(config(dir)).arg("--socket").arg(socket).output().unwrap()
}

#[test]
fn a_socket_that_is_a_file_or_in_use_is_left_alone_and_a_dead_one_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    let output = fails(dir.path(), &file);
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && words.contains("is no socket"), "{words}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    let used = dir.path().join("used");
    let listener = UnixListener::bind(&used).unwrap();
    let output = fails(dir.path(), &used);
    assert!(String::from_utf8_lossy(&output.stderr).contains("in use"), "{output:?}");
    drop(listener);
    let process = Command::new(PROGRAM)
        .arg("--config")
        .arg(config(dir.path()))
        .arg("--socket")
        .arg(&used)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _process = Running(process);
    wait_for("the service", || UnixStream::connect(&used).is_ok());
    assert_eq!(fs::metadata(&used).unwrap().mode() & 0o777, 0o600, "for root alone");
}

#[test]
fn a_configuration_with_a_mistake_is_told_before_anything_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    fs::write(&path, "mirors = []\n[signatures]\ndefault = \"accept\"\n").unwrap();
    let output = Command::new(PROGRAM).arg("--check").arg("--config").arg(&path).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && words.contains("mirors"), "{words}");
    let output =
        Command::new(PROGRAM).arg("--check").arg("--config").arg(config(dir.path())).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
