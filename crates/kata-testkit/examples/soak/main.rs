//! Starts, loads, kills and deletes pods at random, several at once, and reports what is left of them and what has grown.
//!
//! ```text
//!  warm-up rounds ──▶ figures ──▶ rounds, until they or the time are over ──▶ figures, leaks ──▶ report
//!     each: a pod, containers ▸ load ▸ death of a container, a part or the owner ▸ deletion
//!     beside them all: one pod that is never deleted, in which commands run all the time
//! ```
//!
//! `soak SECONDS ROUNDS SEED PODS` ends with 1 when anything went wrong. With the same seed each round does the same; what
//! happens at once differs. An even seed is for the older containerd, an odd one for the newer. Programs and image are named
//! by the variables of the tests.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a round fails by panicking, which is caught"
)]

mod figures;
mod round;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use figures::Figures;
use kata_testkit::containerd::Version;
use kata_testkit::cri::{Container, Cri};
use round::Round;

/// Pods need little: several have to fit beside each other. What hangs has to be noticed while a round waits.
const CONFIG: &str = "[hypervisor.qemu]\ndefault_memory = 128\n\n[agent.kata]\nhealth_timeout_ms = 12000\n";
/// Rounds of each worker before anything is measured: the first ones open what stays.
const WARM_UP: u64 = 2;

/// What went wrong, from all workers.
#[derive(Default)]
struct Findings(Mutex<Vec<String>>);

impl Findings {
    fn add(&self, what: String) {
        eprintln!("soak: {what}");
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }
}

/// How much is done.
struct Plan {
    time: Duration,
    rounds: u64,
    seed: u64,
    pods: u64,
}

impl Plan {
    fn read() -> Self {
        let numbers: Vec<u64> =
            std::env::args().skip(1).map(|word| word.parse().expect("arguments are numbers")).collect();
        let [time, rounds, seed, pods] = numbers.try_into().expect("soak SECONDS ROUNDS SEED PODS");
        Self { time: Duration::from_secs(time), rounds, seed, pods: pods.max(1) }
    }

    fn version(&self) -> Version {
        if self.seed.is_multiple_of(2) { Version::V1 } else { Version::V2 }
    }
}

/// Does rounds by as many workers as there may be pods, as long as `more` says so of a round's number.
fn rounds(cri: &Cri, plan: &Plan, next: &AtomicU64, findings: &Findings, more: impl Fn(u64) -> bool + Sync) {
    std::thread::scope(|scope| {
        for _ in 0..plan.pods {
            scope.spawn(|| {
                loop {
                    let number = next.load(Ordering::Relaxed);
                    if !more(number) {
                        break;
                    }
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let mut round = Round::new(cri, plan.seed, number);
                    let begin = Instant::now();
                    let done = catch_unwind(AssertUnwindSafe(|| round.run()));
                    eprintln!("soak: {:>5.1} s, {round}", begin.elapsed().as_secs_f64());
                    if let Err(panic) = done {
                        findings.add(format!("{round}: {}", words(&*panic)));
                        round.give_up();
                    }
                }
            });
        }
    });
}

/// What a panic said.
fn words(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked")
}

/// Runs commands in one container until it is told to stop; answers how many.
fn keep_busy(keeper: &Container<'_>, stop: &AtomicBool, findings: &Findings) -> u64 {
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let word = format!("word {count}");
        match keeper.try_exec(&["echo", &word], 60) {
            Ok(ran) if ran.stdout.trim_end() == word => {}
            other => findings.add(format!("command {count} in the pod that stays: {other:?}")),
        }
        count += 1;
        std::thread::sleep(Duration::from_millis(100));
    }
    count
}

fn main() {
    let plan = Plan::read();
    eprintln!("soak: seed {}, {:?}, {} rounds at most", plan.seed, plan.version(), plan.rounds);
    let cri = Cri::new(plan.version()).expect("the variables of the tests are set");
    cri.host().configure(CONFIG);
    let (findings, next) = (Findings::default(), AtomicU64::new(0));
    let begin = Instant::now();
    let stays = cri.pod("stays").run();
    let keeper = stays.container("main").idle().start();
    let measure = || Figures::now(&cri, stays.id());

    let warm = WARM_UP * plan.pods;
    rounds(&cri, &plan, &next, &findings, |number| number < warm);
    for n in 0..20 {
        assert_eq!(keeper.exec(&["echo", &n.to_string()]).text(), format!("{n}\n"));
    }
    let settled = measure();
    let stop = AtomicBool::new(false);
    let commands = std::thread::scope(|scope| {
        let busy = scope.spawn(|| keep_busy(&keeper, &stop, &findings));
        rounds(&cri, &plan, &next, &findings, |number| number < plan.rounds && begin.elapsed() < plan.time);
        stop.store(true, Ordering::Relaxed);
        busy.join().unwrap()
    });
    let last = measure();
    eprintln!("soak: figures were {settled}");
    eprintln!("soak: figures are  {last}");
    for grown in last.growth_since(&settled) {
        findings.add(grown);
    }
    stays.remove();
    for left in figures::left(&cri) {
        findings.add(format!("left: {left}"));
    }
    let findings = findings.0.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (rounds, took) = (next.into_inner(), begin.elapsed().as_secs());
    println!(
        "seed {}: {rounds} pods came and went within {took} s, {commands} commands in the one that stayed; {} findings",
        plan.seed,
        findings.len()
    );
    for finding in &findings {
        println!("  {finding}");
    }
    if !findings.is_empty() {
        println!("again: cargo xtask soak --seed {} --time {took}s --pods {}", plan.seed, plan.pods);
        std::process::exit(1);
    }
}
