//! The fuzz target: bytes become a state, as a file and as what is in it, and a bus tries to go on from there.

#![allow(clippy::expect_used, reason = "a fuzz target ends at the first surprise")]

use super::{FORMAT, Header, State, open, sum};
use crate::dma::Dma;
use crate::pci::BusState;
use crate::pci::guest::{Guest, WINDOW};
use crate::pci::virtio::BAR_SIZE;
use crate::virtio::balloon::Balloon;
use crate::virtio::rng::Rng;

/// Plays `data`.
pub fn run(data: &[u8]) {
    let _ = open(data);
    // A checksum keeps no bytes away that somebody made one for.
    let length = u64::try_from(data.len()).unwrap_or(0);
    let header = Header { format: FORMAT, build: super::BUILD.to_owned(), length, sum: sum(data) };
    let header = serde_json::to_vec(&header).expect("a header");
    let sealed = [&header, &b"\n"[..], data].concat();
    assert_eq!(open(&sealed).expect("a seal that fits"), data);
    if let Ok(state) = serde_json::from_slice::<State>(data) {
        let _ = state.check();
    }
    if let Ok(state) = serde_json::from_slice::<BusState>(data) {
        go_on(&state);
    }
}

/// A bus with an entropy device and a balloon.
fn bus() -> Guest {
    let guest = Guest::new();
    guest.root.attach("rng", Box::new(Rng::new().expect("a device"))).expect("a slot");
    guest
        .root
        .attach("balloon", Box::new(Balloon::new(Dma::new(guest.memory.clone())).expect("a device")))
        .expect("a slot");
    guest
}

/// Whatever a state says, the bus goes on or does not, and can be written again.
fn go_on(state: &BusState) {
    let guest = bus();
    if guest.root.restore(state).is_err() {
        return;
    }
    let _ = guest.root.resume();
    for slot in 1..4 {
        let base = guest.config_double(slot, 0x10);
        if WINDOW.holds(base, BAR_SIZE) {
            let _ = guest.status(base);
        }
    }
    guest.root.pause();
    guest.root.save().expect("a bus on which nothing came");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pci::guest::{DriverQueue, WRITE};

    /// A bus that has worked.
    fn good() -> Vec<u8> {
        let guest = bus();
        let bar = WINDOW.base;
        guest.map(1, bar);
        guest.set_vectors(1, bar, 1);
        guest.negotiate(bar);
        let mut driver = DriverQueue::new(&guest, bar, 0, 0x1000);
        guest.set_status(bar, 0xf);
        driver.offer(&[(0x8000, 100, WRITE)]);
        assert_eq!(driver.used(), Some(100));
        guest.root.pause();
        serde_json::to_vec(&guest.root.save().unwrap()).unwrap()
    }

    #[test]
    fn bus_that_has_worked_goes_on() {
        let good = good();
        run(&good);
        let state: BusState = serde_json::from_slice(&good).unwrap();
        bus().root.restore(&state).unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn any_bytes_are_survived(data: Vec<u8>) {
            run(&data);
        }

        /// Digits change, so that it stays a state.
        #[test]
        fn any_number_in_a_good_state_is_survived(
            changes in prop::collection::vec((any::<prop::sample::Index>(), 0u8..10), 1..20)
        ) {
            let mut data = good();
            let digits: Vec<usize> =
                (0..data.len()).filter(|at| data.get(*at).is_some_and(u8::is_ascii_digit)).collect();
            for (which, digit) in changes {
                let at = digits[which.index(digits.len())];
                data[at] = b'0' + digit;
            }
            run(&data);
        }
    }

    /// Inputs that once mattered or show what the target can do; the fuzzer starts from the same files.
    #[test]
    fn corpus_is_survived() {
        crate::virtio::driver::corpus("snapshot", run);
    }
}
