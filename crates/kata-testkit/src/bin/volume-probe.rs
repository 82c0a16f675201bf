//! What the image's shell cannot do with a volume, for tests to run in a container.
//!
//! | command | what it does |
//! |---|---|
//! | `watch DIR FILE` | says `ready`, waits for FILE to read otherwise than now, says what inotify told of DIR by then |
//! | `lock FILE` | locks FILE (flock and fcntl), says `locked` or `busy`, and holds it for ever |
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's program fails by panicking")]

use std::fs::{File, TryLockError};
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::fs::{FlockOperation, fcntl_lock};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["watch", dir, file] => watch(dir, file),
        ["lock", file] => lock(file),
        other => panic!("{other:?}"),
    }
}

fn watch(dir: &str, file: &str) {
    let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
    inotify::add_watch(&events, dir, WatchFlags::CREATE | WatchFlags::MOVE | WatchFlags::DELETE).unwrap();
    let before = std::fs::read(file).unwrap();
    println!("ready");
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(&events, &mut buffer);
    let mut told = Vec::new();
    let begin = Instant::now();
    // The last thing that happens to a volume is that its old version goes.
    while begin.elapsed() < Duration::from_secs(30)
        && !told.iter().any(|it: &String| it.starts_with("DELETE"))
    {
        match reader.next() {
            Ok(event) => {
                let name = event.file_name().map(|name| name.to_string_lossy().into_owned());
                told.push(format!("{:?} {}", event.events(), name.unwrap_or_default()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    let after = std::fs::read(file).unwrap();
    assert_ne!(before, after);
    println!("{}\n{}", String::from_utf8_lossy(&after), told.join("\n"));
}

fn lock(file: &str) {
    let file = File::options().read(true).write(true).open(file).unwrap();
    let flock = match file.try_lock() {
        Ok(()) => true,
        Err(TryLockError::WouldBlock) => false,
        Err(error) => panic!("{error}"),
    };
    let fcntl = fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
    println!(
        "{}",
        if flock && fcntl {
            "locked"
        } else if flock || fcntl {
            "half"
        } else {
            "busy"
        }
    );
    if flock {
        loop {
            std::thread::park();
        }
    }
}
