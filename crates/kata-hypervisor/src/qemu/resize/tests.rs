//! Against a QEMU that the test plays. What a real one and its guest make of it is a test of whole pods.

use super::*;
use crate::qemu::qmp::tests::{Peer, pair};

const GROWTH: Growth = Growth { vcpus: 3, memory_mib: 1024, slots: 1 };

fn resizer(growth: Option<Growth>) -> Resizer {
    Resizer { base: Size { vcpus: 1, memory_mib: 256 }, growth, ..Resizer::default() }
}

/// Answers the next command with `value`; what it was.
async fn reply(peer: &mut Peer, value: Value) -> Value {
    let (heard, _) = peer.hear_with_fds().await;
    peer.say(&format!("{}\n", json!({ "return": value, "id": heard["id"] }))).await;
    json!({ heard["execute"].as_str().unwrap(): heard["arguments"] })
}

async fn say_taken(peer: &mut Peer, device: &str, status: u32) {
    let info = json!({ "device": device, "slot": "0", "slot-type": "DIMM", "source": 1, "status": status });
    peer.say(&format!("{}\n", json!({ "event": "ACPI_DEVICE_OST", "data": { "info": info } }))).await;
}

fn running(count: u32) -> Value {
    // QEMU tells them in no order.
    (0..count)
        .rev()
        .map(|index| json!({ "cpu-index": index, "thread-id": 100 + index, "target": "x86_64" }))
        .collect()
}

fn sockets() -> Value {
    json!([
        { "type": "max-x86_64-cpu", "vcpus-count": 1, "props": { "socket-id": 0, "core-id": 2, "thread-id": 0 } },
        { "type": "max-x86_64-cpu", "vcpus-count": 1, "props": { "socket-id": 0, "core-id": 1, "thread-id": 0 } },
        { "type": "max-x86_64-cpu", "vcpus-count": 1, "qom-path": "/machine/cpu[0]",
          "props": { "socket-id": 0, "core-id": 0, "thread-id": 0 } },
    ])
}

#[tokio::test]
async fn processors_are_added_in_the_order_of_their_places_and_memory_as_a_module() {
    let (qmp, _events, mut peer) = pair().await;
    let mut resizer = resizer(Some(GROWTH));
    let play = async {
        let mut heard = vec![reply(&mut peer, running(1)).await, reply(&mut peer, sockets()).await];
        for _ in 0..4 {
            let command = reply(&mut peer, json!({})).await;
            if let Some(device) = command["device_add"]["id"].as_str() {
                say_taken(&mut peer, device, 0).await;
            }
            heard.push(command);
        }
        heard.push(reply(&mut peer, running(3)).await);
        heard
    };
    let (layout, heard) = tokio::join!(resizer.resize(&qmp, Size { vcpus: 3, memory_mib: 512 }), play);
    let layout = layout.unwrap();
    assert_eq!(layout.size, Size { vcpus: 3, memory_mib: 512 });
    assert_eq!(layout.vcpu_threads, [100, 101, 102]);
    assert_eq!(
        (&heard[2]["device_add"]["core-id"], &heard[3]["device_add"]["core-id"]),
        (&json!(1), &json!(2))
    );
    assert_eq!(heard[2]["device_add"]["driver"], "max-x86_64-cpu");
    assert_eq!(heard[4]["object-add"]["size"], 256 << 20);
    assert_eq!(heard[5]["device_add"]["memdev"], heard[4]["object-add"]["id"]);
}

#[tokio::test]
async fn the_size_that_is_there_changes_nothing() {
    let (qmp, _events, mut peer) = pair().await;
    let mut resizer = resizer(None);
    let asked = resizer.resize(&qmp, Size { vcpus: 1, memory_mib: 128 });
    let (layout, _) = tokio::join!(asked, reply(&mut peer, running(1)));
    assert_eq!(layout.unwrap(), Layout { size: Size { vcpus: 1, memory_mib: 256 }, vcpu_threads: vec![100] });
}

#[tokio::test]
async fn what_there_is_no_room_for_is_refused_by_the_key_before_anything_is_done() {
    let (qmp, _events, mut peer) = pair().await;
    let mut full = Resizer { modules: vec![128], ..resizer(Some(GROWTH)) };
    for (vcpus, memory_mib, key) in
        [(4, 256, "default_maxvcpus"), (1, 2048, "default_maxmemory"), (1, 1024, "memory_slots")]
    {
        let asked = full.resize(&qmp, Size { vcpus, memory_mib });
        let (refused, _) = tokio::join!(asked, reply(&mut peer, running(1)));
        let text = refused.unwrap_err().to_string();
        assert!(text.contains(key), "{text}");
    }
}

#[tokio::test]
async fn memory_that_the_guest_refuses_is_not_counted_and_goes_before_the_next_try() {
    let (qmp, _events, mut peer) = pair().await;
    let mut resizer = resizer(Some(GROWTH));
    let play = async {
        reply(&mut peer, running(1)).await;
        reply(&mut peer, json!({})).await;
        let module = reply(&mut peer, json!({})).await;
        say_taken(&mut peer, module["device_add"]["id"].as_str().unwrap(), 1).await;
    };
    let (refused, ()) = tokio::join!(resizer.resize(&qmp, Size { vcpus: 1, memory_mib: 512 }), play);
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("the memory") && text.contains("0x1"), "{text}");
    assert_eq!(resizer.memory_mib(), 256);
    let play = async {
        reply(&mut peer, running(1)).await;
        let gone = reply(&mut peer, json!({})).await;
        let device = &gone["device_del"]["id"];
        peer.say(&format!(
            "{}\n",
            json!({ "event": "DEVICE_DELETED", "data": { "device": device, "path": "/" } })
        ))
        .await;
        let dropped = reply(&mut peer, json!({})).await;
        let object = reply(&mut peer, json!({})).await;
        let module = reply(&mut peer, json!({})).await;
        say_taken(&mut peer, module["device_add"]["id"].as_str().unwrap(), 0).await;
        (dropped, object)
    };
    let (taken, (dropped, object)) =
        tokio::join!(resizer.resize(&qmp, Size { vcpus: 1, memory_mib: 512 }), play);
    assert_eq!(taken.unwrap().size.memory_mib, 512);
    assert!(dropped["object-del"].is_object(), "{dropped}");
    assert_eq!(object["object-add"]["size"], 256 << 20);
}

#[tokio::test]
async fn memory_that_cannot_be_plugged_is_given_back() {
    let (qmp, _events, mut peer) = pair().await;
    let mut resizer = resizer(Some(GROWTH));
    let play = async {
        reply(&mut peer, running(1)).await;
        reply(&mut peer, json!({})).await;
        let (heard, _) = peer.hear_with_fds().await;
        let error = json!({ "class": "GenericError", "desc": "no" });
        peer.say(&format!("{}\n", json!({ "error": error, "id": heard["id"] }))).await;
        reply(&mut peer, json!({})).await
    };
    let (refused, last) = tokio::join!(resizer.resize(&qmp, Size { vcpus: 1, memory_mib: 512 }), play);
    assert!(refused.is_err());
    assert!(last["object-del"].is_object(), "{last}");
    assert_eq!(resizer.memory_mib(), 256);
}
