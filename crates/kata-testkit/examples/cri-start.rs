//! What pods take to start under the CRI, each with a network of CNI plugins, with our runtime and with runc.
//!
//! `cri-start COUNT PODS…` prints one JSON object with milliseconds: `kata` and `runc` are starts of a pod with one container,
//! from the first call until the container is started; `parallel` has for each of PODS, in order, the time until the last
//! of so many pods started at once has its container started, of `kata` and of `runc`. Programs and image are named by the
//! variables of the tests.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement fails by panicking")]

use std::time::Instant;

use kata_testkit::containerd::Version;
use kata_testkit::cri::{Cri, Pod};

const HANDLERS: [&str; 2] = ["kata", "runc"];

fn start<'a>(cri: &'a Cri, handler: &str, name: &str) -> Pod<'a> {
    let pod = cri.pod(name).handler(handler).run();
    pod.container("main").idle().start();
    pod
}

/// Milliseconds until a pod's container is started.
fn one(cri: &Cri, handler: &str, round: usize) -> f64 {
    let begin = Instant::now();
    let pod = start(cri, handler, &format!("{handler}-{round}"));
    let time = begin.elapsed();
    pod.remove();
    time.as_secs_f64() * 1e3
}

/// Milliseconds until all of `count` pods, started at once, have their container started.
fn at_once(cri: &Cri, handler: &str, count: usize) -> f64 {
    let begin = Instant::now();
    let (pods, time) = std::thread::scope(|scope| {
        let starts: Vec<_> = (0..count)
            .map(|number| scope.spawn(move || start(cri, handler, &format!("{handler}-{count}-{number}"))))
            .collect();
        let pods: Vec<Pod<'_>> = starts.into_iter().map(|start| start.join().unwrap()).collect();
        (pods, begin.elapsed())
    });
    pods.iter().for_each(Pod::remove);
    time.as_secs_f64() * 1e3
}

fn main() {
    let mut numbers = std::env::args().skip(1).map(|word| word.parse().expect("arguments are numbers"));
    let count: usize = numbers.next().expect("the first argument is the number of runs");
    let cri = Cri::new(Version::V1).expect("the variables of the tests are set");
    cri.host().configure("[hypervisor.qemu]\ndefault_memory = 256\n");
    let mut figures = serde_json::Map::new();
    for handler in HANDLERS {
        // One to warm the page cache.
        let times: Vec<f64> = (0..=count).map(|round| one(&cri, handler, round)).skip(1).collect();
        figures.insert(handler.to_owned(), times.into());
    }
    let parallel: Vec<_> = numbers
        .map(|pods| HANDLERS.map(|handler| at_once(&cri, handler, pods)))
        .map(|[kata, runc]| serde_json::json!({ "kata": kata, "runc": runc }))
        .collect();
    figures.insert("parallel".to_owned(), parallel.into());
    println!("{}", serde_json::Value::Object(figures));
}
