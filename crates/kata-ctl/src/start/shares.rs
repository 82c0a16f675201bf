//! Which layer the time of a start belongs to.

use super::{LAYERS, Start};

/// A layer's part of a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// The layer; `other` is time that no stage covers.
    pub layer: String,
    /// Microseconds that are this layer's alone.
    pub own_us: u64,
}

/// The whole start, divided among the layers: each moment belongs to the stage that began last among those under way, so that
/// the shares add up to the total.
pub fn shares(start: &Start) -> Vec<Share> {
    let mut moments: Vec<u64> =
        start.timeline.iter().flat_map(|stage| [stage.start_us, stage.end_us()]).chain([0]).collect();
    moments.sort_unstable();
    moments.dedup();
    let names = LAYERS.iter().map(|(layer, _)| *layer).chain(["other"]);
    let mut shares: Vec<Share> = names.map(|layer| Share { layer: layer.to_owned(), own_us: 0 }).collect();
    for (from, to) in moments.iter().zip(moments.iter().skip(1)) {
        let under_way =
            start.timeline.iter().filter(|stage| stage.start_us <= *from && stage.end_us() >= *to);
        let layer =
            under_way.max_by_key(|stage| stage.start_us).map_or("other", |stage| stage.layer.as_str());
        let known = shares.iter().position(|share| share.layer == layer).unwrap_or(LAYERS.len());
        if let Some(share) = shares.get_mut(known) {
            share.own_us += to - from;
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::super::{Stage, samples};
    use super::*;

    #[test]
    fn shares_add_up_to_the_whole() {
        let start = samples::start("web");
        let shares = shares(&start);
        let of = |layer: &str| shares.iter().find(|share| share.layer == layer).unwrap().own_us;
        assert_eq!((of("host"), of("vmm"), of("kernel"), of("agent")), (12_000, 287_000, 500_000, 40_000));
        assert_eq!((of("container"), of("other")), (150_000, 11_000));
        assert_eq!(shares.iter().map(|share| share.own_us).sum::<u64>(), start.total_us());
    }

    #[test]
    fn a_moment_of_two_stages_belongs_to_the_later() {
        let stage = |layer: &str, start_us, duration_us| Stage {
            layer: layer.to_owned(),
            start_us,
            duration_us,
            ..Stage::default()
        };
        let start = Start { timeline: vec![stage("host", 0, 100), stage("vmm", 20, 30)], ..Start::default() };
        let shares = shares(&start);
        assert_eq!((shares[0].own_us, shares[1].own_us), (70, 30));
        assert!(super::shares(&Start::default()).iter().all(|share| share.own_us == 0));
    }
}
