//! Standard streams between real FIFOs and the fake agent.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod rig;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kata_sandbox::{ErrorKind, ProcessId, Sandbox, Stdio};
use rig::{Rig, init, process, soon};

fn pattern(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

fn read_all(path: &Path) -> tokio::task::JoinHandle<Vec<u8>> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || {
        let mut data = Vec::new();
        std::fs::File::open(path).unwrap().read_to_end(&mut data).unwrap();
        data
    })
}

/// Writes all of `data`, then tells the pod that no more will come.
async fn feed(pod: &Sandbox, id: &ProcessId, path: PathBuf, data: Vec<u8>) {
    tokio::task::spawn_blocking(move || {
        std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all(&data).unwrap();
    })
    .await
    .unwrap();
    pod.close_stdin(id).await.unwrap();
}

async fn echo(rig: &Rig, length: usize) {
    let pod = rig.pod().await;
    let (stdin, stdout) = (rig.fifo("stdin"), rig.fifo("stdout"));
    let stdio = Stdio { stdin: Some(stdin.clone()), stdout: Some(stdout.clone()), ..Default::default() };
    pod.create_container(rig.container("c", &["cat"], stdio)).await.unwrap();
    let output = read_all(&stdout);
    pod.start(&init()).await.unwrap();
    feed(&pod, &init(), stdin, pattern(length)).await;
    assert_eq!(soon(pod.wait(&init())).await.unwrap().code, 0);
    pod.delete(&init()).await.unwrap();
    assert!(soon(output).await.unwrap() == pattern(length), "not the same bytes");
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn ten_megabytes_come_back_byte_for_byte() {
    let Some(rig) = Rig::new().await else { return };
    echo(&rig, 10 << 20).await;
    assert!(!rig.agent.calls().contains(&"ReadStdout".to_owned()));
}

#[tokio::test]
async fn guest_without_stream_port_is_served_by_calls() {
    let Some(rig) = Rig::new().await else { return };
    let rig = rig.without_streams();
    echo(&rig, 1 << 20).await;
    assert!(rig.agent.calls().contains(&"CloseStdin".to_owned()));
}

#[tokio::test]
async fn client_that_vanishes_does_not_block_the_process() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let stdout = rig.fifo("stdout");
    let stdio = Stdio { stdout: Some(stdout.clone()), ..Default::default() };
    pod.create_container(rig.container("c", &["flood", "8000000"], stdio)).await.unwrap();
    let client = tokio::task::spawn_blocking(move || {
        let mut some = vec![0; 1000];
        std::fs::File::open(stdout).unwrap().read_exact(&mut some).unwrap();
        some
    });
    pod.start(&init()).await.unwrap();
    assert_eq!(soon(client).await.unwrap(), pattern(1000));
    assert_eq!(soon(pod.wait(&init())).await.unwrap().code, 0);
    soon(pod.delete(&init())).await.unwrap();
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn client_that_removes_its_fifo_unread_does_not_block_the_process() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let stdout = rig.fifo("stdout");
    let stdio = Stdio { stdout: Some(stdout.clone()), ..Default::default() };
    pod.create_container(rig.container("c", &["flood", "8000000"], stdio)).await.unwrap();
    std::fs::remove_file(stdout).unwrap();
    pod.start(&init()).await.unwrap();
    assert_eq!(soon(pod.wait(&init())).await.unwrap().code, 0);
    soon(pod.delivered(&init())).await.unwrap();
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn reader_that_comes_late_loses_nothing() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let stdout = rig.fifo("stdout");
    let stdio = Stdio { stdout: Some(stdout.clone()), ..Default::default() };
    pod.create_container(rig.container("c", &["print", "early bird"], stdio)).await.unwrap();
    pod.start(&init()).await.unwrap();
    soon(pod.wait(&init())).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(soon(read_all(&stdout)).await.unwrap(), b"early bird");
    pod.shutdown().await.unwrap();
}

#[tokio::test]
async fn second_reader_gets_what_comes_then() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let (stdin, stdout) = (rig.fifo("stdin"), rig.fifo("stdout"));
    let stdio = Stdio { stdin: Some(stdin.clone()), stdout: Some(stdout.clone()), ..Default::default() };
    pod.create_container(rig.container("c", &["cat"], stdio)).await.unwrap();
    pod.start(&init()).await.unwrap();
    for text in ["one", "two"] {
        let (stdin, stdout) = (stdin.clone(), stdout.clone());
        let client = tokio::task::spawn_blocking(move || {
            // A client that detaches: both of its ends are closed between the rounds.
            let mut output = std::fs::File::open(stdout).unwrap();
            std::fs::OpenOptions::new().write(true).open(stdin).unwrap().write_all(text.as_bytes()).unwrap();
            let mut data = vec![0; text.len()];
            output.read_exact(&mut data).unwrap();
            data
        });
        // The first reader's end is seen at the next output only: that may be lost.
        match tokio::time::timeout(Duration::from_secs(20), client).await {
            Ok(data) => assert_eq!(data.unwrap(), text.as_bytes()),
            Err(_) => panic!("nothing came in round {text:?}"),
        }
    }
    pod.kill(&init(), 9, false).await.unwrap();
    soon(pod.wait(&init())).await.unwrap();
    soon(pod.shutdown()).await.unwrap();
}

#[tokio::test]
async fn files_are_appended_to() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let log = rig.dir.path().join("log");
    std::fs::write(&log, "before ").unwrap();
    let uri = PathBuf::from(format!("file://{}", log.display()));
    let stdio = |stdout| Stdio { stdout: Some(stdout), ..Default::default() };
    pod.create_container(rig.container("c", &["print", "one "], stdio(uri))).await.unwrap();
    pod.start(&init()).await.unwrap();
    soon(pod.wait(&init())).await.unwrap();
    soon(pod.delete(&init())).await.unwrap();
    pod.create_container(rig.container("c", &["print", "two"], stdio(log.clone()))).await.unwrap();
    pod.start(&init()).await.unwrap();
    soon(pod.wait(&init())).await.unwrap();
    soon(pod.shutdown()).await.unwrap();
    assert_eq!(std::fs::read_to_string(log).unwrap(), "before one two");
}

#[tokio::test]
async fn input_that_is_a_file_ends_where_it_ends() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let (stdin, stdout) = (rig.dir.path().join("in"), rig.dir.path().join("out"));
    std::fs::write(&stdin, "words").unwrap();
    let stdio = Stdio { stdin: Some(stdin), stdout: Some(stdout.clone()), ..Default::default() };
    pod.create_container(rig.container("c", &["cat"], stdio)).await.unwrap();
    pod.start(&init()).await.unwrap();
    assert_eq!(soon(pod.wait(&init())).await.unwrap().code, 0);
    soon(pod.delete(&init())).await.unwrap();
    assert_eq!(std::fs::read_to_string(stdout).unwrap(), "words");
    pod.shutdown().await.unwrap();
}

#[tokio::test]
async fn input_closed_before_an_exec_starts_stays_closed() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    pod.create_container(rig.container("c", &["sleep"], Stdio::default())).await.unwrap();
    pod.start(&init()).await.unwrap();
    let (exec, stdin, stdout) = (ProcessId::exec("c", "e"), rig.fifo("stdin"), rig.fifo("stdout"));
    let stdio = Stdio { stdin: Some(stdin), stdout: Some(stdout.clone()), ..Default::default() };
    pod.exec("c", "e", process(&["cat"]), stdio).await.unwrap();
    pod.close_stdin(&exec).await.unwrap();
    let output = read_all(&stdout);
    pod.start(&exec).await.unwrap();
    assert_eq!(soon(pod.wait(&exec)).await.unwrap().code, 0);
    soon(pod.delete(&exec)).await.unwrap();
    assert_eq!(soon(output).await.unwrap(), b"");
    pod.shutdown().await.unwrap();
}

#[tokio::test]
async fn other_uris_are_unimplemented() {
    let Some(rig) = Rig::new().await else { return };
    let pod = rig.pod().await;
    let stdio = Stdio { stdout: Some("binary:///usr/bin/logger".into()), ..Default::default() };
    let error = pod.create_container(rig.container("c", &["exit", "0"], stdio)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unimplemented);
    pod.shutdown().await.unwrap();
    rig.assert_clean().await;
}
