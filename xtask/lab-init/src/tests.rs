#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use super::*;

fn round(frame: &Frame) -> Frame {
    let mut bytes = Vec::new();
    frame.write(&mut bytes).unwrap();
    Frame::read(&mut bytes.as_slice()).unwrap()
}

#[test]
fn every_frame_arrives_as_it_was_sent() {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let start = Start {
        directory: "/a b".to_owned(),
        terminal: Some(Size { rows: 24, columns: 80 }),
        environment: words("A=1 B="),
        command: vec!["sh".to_owned(), String::new(), "x\ny".to_owned()],
    };
    for frame in [
        Frame::Ready,
        Frame::Start(Start { terminal: None, environment: Vec::new(), ..start.clone() }),
        Frame::Start(start),
        Frame::Stdin(vec![0, 255]),
        Frame::StdinEnd,
        Frame::Signal(15),
        Frame::Resize(Size { rows: 300, columns: 1 }),
        Frame::Stdout(Vec::new()),
        Frame::Stderr(vec![7; PIECE]),
        Frame::Exit(255),
        Frame::Fault("no root".to_owned()),
        Frame::Beat,
        Frame::Taken,
    ] {
        assert_eq!(round(&frame), frame);
    }
}

#[test]
fn an_end_in_the_middle_of_a_frame_is_an_error_of_the_channel() {
    let mut bytes = Vec::new();
    Frame::Stdout(b"abc".to_vec()).write(&mut bytes).unwrap();
    for cut in 0..bytes.len() {
        assert!(matches!(Frame::read(&mut &bytes[..cut]), Err(FrameError::Channel(_))), "{cut}");
    }
}

#[test]
fn nonsense_is_refused_by_its_kind() {
    for bytes in [&[99, 0, 0, 0, 0][..], &[8, 0, 0, 0, 0], &[1, 1, 0, 0, 0, 0], &[5, 1, 0, 0, 0, 9]] {
        let error = Frame::read(&mut &*bytes).unwrap_err();
        assert!(matches!(error, FrameError::Malformed { kind } if kind == bytes[0]), "{error}");
    }
    assert!(matches!(Frame::read(&mut &[6, 255, 255, 255, 255][..]), Err(FrameError::TooLong(_))));
}
