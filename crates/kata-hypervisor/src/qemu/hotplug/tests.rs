//! Against a QEMU that the test plays. What a real one makes of it is in [`crate::qemu::tests`].

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroU64;

use super::*;
use crate::qemu::qmp::tests::{BOUND, Peer, pair};

fn disk(file: &tempfile::NamedTempFile, id: &str, readonly: bool) -> Disk {
    Disk { id: id.to_owned(), path: file.path().to_owned(), readonly }
}

fn file() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"contents").unwrap();
    file
}

fn nic(id: &str, queues: usize) -> Nic {
    let tap = || File::open("/dev/null").unwrap().into();
    let queues = std::iter::repeat_with(tap).take(queues).collect();
    Nic { id: id.to_owned(), mac: [2, 0, 0, 0, 0, 0xa], mtu: 1450, queues, vhost: Vec::new() }
}

/// Agrees to so many commands. What it has heard, and the descriptors that came along.
async fn agree(peer: &mut Peer, count: usize) -> (Vec<Value>, Vec<OwnedFd>) {
    let (mut commands, mut fds) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let (heard, mut with) = peer.hear_with_fds().await;
        peer.agree(&heard).await;
        commands.push(json!({ heard["execute"].as_str().unwrap(): heard["arguments"] }));
        fds.append(&mut with);
    }
    (commands, fds)
}

async fn refuse(peer: &mut Peer, class: &str) -> Value {
    let (heard, _) = peer.hear_with_fds().await;
    let id = &heard["id"];
    peer.say(&format!("{{\"error\": {{\"class\": \"{class}\", \"desc\": \"no\"}}, \"id\": {id}}}\n")).await;
    heard["execute"].clone()
}

async fn say_deleted(peer: &mut Peer, device: &str) {
    peer.say(&format!("{{\"event\": \"DEVICE_DELETED\", \"data\": {{\"device\": \"{device}\"}}}}\n")).await;
}

fn names(commands: &[Value]) -> Vec<&str> {
    commands.iter().flat_map(|command| command.as_object().unwrap().keys().map(String::as_str)).collect()
}

#[tokio::test]
async fn disk_is_handed_over_open_and_plugged_into_the_first_slot() {
    let (qmp, _events, mut peer) = pair().await;
    let (file, mut plugged) = (file(), Plugged::default());
    let disk = disk(&file, "0123456789abcdef0123456789abcdef", true);
    let (added, (commands, fds)) = tokio::join!(plugged.add_disk(&qmp, &disk), agree(&mut peer, 3));
    assert_eq!(added.unwrap().0, "10/01");
    insta::assert_json_snapshot!(commands);

    let mut fds = fds.into_iter();
    let mut handed = File::from(fds.next().unwrap());
    assert!(fds.next().is_none());
    let mut text = String::new();
    handed.read_to_string(&mut text).unwrap();
    assert_eq!(text, "contents");
    assert!(handed.write(b"x").is_err(), "a read-only disk is handed over to be read alone");
}

#[tokio::test]
async fn disk_to_be_written_is_handed_over_for_it() {
    let (qmp, _events, mut peer) = pair().await;
    let (file, mut plugged) = (file(), Plugged::default());
    let disk = disk(&file, "a", false);
    let (added, (commands, fds)) = tokio::join!(plugged.add_disk(&qmp, &disk), agree(&mut peer, 3));
    added.unwrap();
    assert_eq!(commands[1]["blockdev-add"]["read-only"], json!(false));
    let mut handed = File::from(fds.into_iter().next().unwrap());
    handed.write_all(b"CONTENTS").unwrap();
    assert_eq!(std::fs::read(file.path()).unwrap(), b"CONTENTS");
}

#[tokio::test]
async fn network_interface_has_a_descriptor_a_queue() {
    let (qmp, _events, mut peer) = pair().await;
    let mut plugged = Plugged::default();
    let (added, (commands, fds)) = tokio::join!(plugged.add_nic(&qmp, nic("eth0", 2)), agree(&mut peer, 4));
    assert_eq!((added.unwrap().0.as_str(), fds.len()), ("10/01", 2));
    insta::assert_json_snapshot!(commands);
}

#[tokio::test]
async fn network_interface_whose_packets_the_kernel_moves_has_two_descriptors_a_queue() {
    let (qmp, _events, mut peer) = pair().await;
    let mut plugged = Plugged::default();
    let nic = Nic { vhost: nic("", 2).queues, ..nic("eth0", 2) };
    let (added, (commands, fds)) = tokio::join!(plugged.add_nic(&qmp, nic), agree(&mut peer, 6));
    assert_eq!((added.unwrap().0.as_str(), fds.len()), ("10/01", 4));
    insta::assert_json_snapshot!(commands);
}

#[tokio::test]
async fn network_interface_with_another_number_of_descriptors_of_vhost_is_refused() {
    let (qmp, _events, _peer) = pair().await;
    let nic = Nic { vhost: nic("", 1).queues, ..nic("eth0", 2) };
    let error = Plugged::default().add_nic(&qmp, nic).await.unwrap_err();
    assert!(matches!(&error, HypervisorError::InvalidDevice { reason, .. } if reason.contains("vhost-net")));
}

#[tokio::test]
async fn disk_is_held_to_its_limits_until_it_goes() {
    let (qmp, _events, mut peer) = pair().await;
    let limits = DiskLimits { bytes_per_second: NonZeroU64::new(1 << 20), requests_per_second: None };
    let (file, mut plugged) = (file(), Plugged::new(limits));
    let disk = disk(&file, "a", false);
    let (added, (commands, _)) = tokio::join!(plugged.add_disk(&qmp, &disk), agree(&mut peer, 4));
    added.unwrap();
    insta::assert_json_snapshot!(commands);
    let play = async {
        agree(&mut peer, 1).await;
        say_deleted(&mut peer, "disk1").await;
        agree(&mut peer, 3).await.0
    };
    let (removed, undone) = tokio::join!(plugged.remove(&qmp, "a", BOUND), play);
    removed.unwrap();
    assert_eq!(names(&undone), ["blockdev-del", "object-del", "remove-fd"]);
}

#[tokio::test]
async fn network_interface_without_a_tap_is_refused_before_qemu_hears_of_it() {
    let (qmp, _events, _peer) = pair().await;
    let error = Plugged::default().add_nic(&qmp, nic("eth0", 0)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"device "eth0" cannot be added: it is a network interface without a tap"#
    );
}

#[tokio::test]
async fn failure_half_way_is_undone_and_the_slot_is_free_again() {
    let (qmp, _events, mut peer) = pair().await;
    let (file, mut plugged) = (file(), Plugged::default());
    let disk = disk(&file, "a", true);
    let play = async {
        agree(&mut peer, 2).await;
        assert_eq!(refuse(&mut peer, "GenericError").await, json!("device_add"));
        agree(&mut peer, 2).await.0
    };
    let (added, undone) = tokio::join!(plugged.add_disk(&qmp, &disk), play);
    assert!(
        matches!(added.unwrap_err(), HypervisorError::Qmp(QmpError::Refused { command, .. }) if command == "device_add")
    );
    assert_eq!(names(&undone), ["blockdev-del", "remove-fd"]);

    let (again, _) = tokio::join!(plugged.add_disk(&qmp, &disk), agree(&mut peer, 3));
    assert_eq!(again.unwrap().0, "10/01");
}

#[tokio::test]
async fn taps_of_a_network_interface_that_is_refused_are_closed() {
    let (qmp, _events, mut peer) = pair().await;
    let mut plugged = Plugged::default();
    let play = async {
        agree(&mut peer, 2).await;
        assert_eq!(refuse(&mut peer, "GenericError").await, json!("netdev_add"));
        // QEMU took the second before it failed.
        assert_eq!(refuse(&mut peer, "GenericError").await, json!("closefd"));
        agree(&mut peer, 1).await.0
    };
    let (added, undone) = tokio::join!(plugged.add_nic(&qmp, nic("eth0", 2)), play);
    assert!(added.is_err());
    assert_eq!(undone, [json!({ "closefd": { "fdname": "plugged-nic1-tap0" } })]);
    assert!(matches!(
        plugged.remove(&qmp, "eth0", BOUND).await.unwrap_err(),
        HypervisorError::UnknownDevice { .. }
    ));
}

/// A machine with the disk `a`.
async fn with_disk() -> (Qmp, Peer, Plugged) {
    let (qmp, _events, mut peer) = pair().await;
    let (file, mut plugged) = (file(), Plugged::default());
    let disk = disk(&file, "a", true);
    let (added, _) = tokio::join!(plugged.add_disk(&qmp, &disk), agree(&mut peer, 3));
    added.unwrap();
    (qmp, peer, plugged)
}

#[tokio::test]
async fn removal_waits_until_the_guest_has_let_go_of_this_device() {
    let (qmp, mut peer, mut plugged) = with_disk().await;
    let play = async {
        agree(&mut peer, 1).await;
        say_deleted(&mut peer, "disk2").await;
        let early = tokio::time::timeout(Duration::from_millis(50), peer.hear_with_fds()).await;
        assert!(early.is_err(), "another device's end is not this one's");
        say_deleted(&mut peer, "disk1").await;
        agree(&mut peer, 2).await.0
    };
    let (removed, undone) = tokio::join!(plugged.remove(&qmp, "a", BOUND), play);
    removed.unwrap();
    assert_eq!(names(&undone), ["blockdev-del", "remove-fd"]);
    let error = plugged.remove(&qmp, "a", BOUND).await.unwrap_err();
    assert!(matches!(error, HypervisorError::UnknownDevice { id } if id == "a"));
}

#[tokio::test]
async fn guest_that_does_not_let_go_is_named_and_the_removal_can_be_tried_again() {
    let (qmp, mut peer, mut plugged) = with_disk().await;
    let bound = Duration::from_millis(50);
    let (held, _) = tokio::join!(plugged.remove(&qmp, "a", bound), agree(&mut peer, 1));
    let error = held.unwrap_err();
    assert!(matches!(error, HypervisorError::DeviceHeld { .. }));
    assert!(error.to_string().contains("the guest did not let go"), "{error}");

    let play = async {
        assert_eq!(refuse(&mut peer, "DeviceNotFound").await, json!("device_del"));
        agree(&mut peer, 2).await
    };
    let (removed, _) = tokio::join!(plugged.remove(&qmp, "a", BOUND), play);
    removed.unwrap();
}

#[tokio::test]
async fn end_of_the_machine_ends_a_removal() {
    let (qmp, mut peer, mut plugged) = with_disk().await;
    let play = async {
        agree(&mut peer, 1).await;
        drop(peer);
    };
    let (removed, ()) = tokio::join!(plugged.remove(&qmp, "a", BOUND), play);
    assert!(matches!(removed.unwrap_err(), HypervisorError::Qmp(QmpError::Closed { .. })));
}

#[tokio::test]
async fn device_of_a_caller_that_gave_up_can_be_removed() {
    let (qmp, _events, mut peer) = pair().await;
    let (file, mut plugged) = (file(), Plugged::default());
    let disk = disk(&file, "a", true);
    tokio::select! {
        _ = plugged.add_disk(&qmp, &disk) => unreachable!("blockdev-add is not answered"),
        _ = async { agree(&mut peer, 1).await; peer.hear_with_fds().await } => {}
    }
    let (removed, undone) = tokio::join!(plugged.remove(&qmp, "a", BOUND), agree(&mut peer, 2));
    removed.unwrap();
    assert_eq!(names(&undone.0), ["blockdev-del", "remove-fd"]);
}
