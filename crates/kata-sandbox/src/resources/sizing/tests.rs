use proptest::prelude::*;

use super::*;

const GIB: u64 = 1 << 30;

fn demand(cpu: u64, memory: u64) -> Demand {
    let some = |value: u64| (value > 0).then_some(value);
    Demand { cpu_limit: some(cpu), memory_limit: some(memory), ..Demand::default() }
}

fn bounds(qemu: &Qemu) -> Bounds<'_> {
    Bounds { qemu, host_cpus: 8, host_memory_mib: 32 << 10 }
}

fn size(qemu: &Qemu, demand: Demand) -> Size {
    bounds(qemu).size(&demand).unwrap()
}

/// Pods as they are seen in clusters, by their limits in thousandths of a CPU and MiB (0 is none).
#[test]
fn twenty_pods_have_what_they_were_promised_and_little_more() {
    let expected = [
        // CPU, MiB ▶ CPUs, MiB
        (0, 0, 1, 2048),
        (100, 0, 1, 2048),
        (0, 64, 1, 184),
        (100, 16, 1, 134),
        (250, 64, 1, 184),
        (500, 128, 1, 251),
        (500, 256, 1, 384),
        (1000, 128, 1, 251),
        (1000, 512, 1, 652),
        (1001, 512, 2, 652),
        (1000, 1024, 1, 1186),
        (1500, 1024, 2, 1186),
        (2000, 2048, 2, 2254),
        (2000, 6144, 2, 6528),
        (2500, 4096, 3, 4391),
        (4000, 8192, 4, 8666),
        (7900, 16384, 8, 17214),
        (8000, 24576, 8, 25762),
        (16000, 2048, 8, 2254),
        (0, 30000, 1, 31422),
    ];
    let qemu = Qemu::default();
    for (cpu, mib, vcpus, memory_mib) in expected {
        assert_eq!(size(&qemu, demand(cpu, mib << 20)), Size { vcpus, memory_mib }, "{cpu} {mib}");
    }
}

#[test]
fn the_overhead_of_cpus_is_added_before_it_is_rounded_up() {
    let qemu = Qemu { overhead_vcpus: 0.2, ..Qemu::default() };
    assert_eq!(size(&qemu, demand(2000, 0)).vcpus, 3);
    assert_eq!(size(&qemu, demand(1800, 0)).vcpus, 2);
    // Not beyond what can run at once.
    assert_eq!(size(&qemu, demand(8000, 0)).vcpus, 8);
}

#[test]
fn a_request_without_a_limit_is_a_promise_as_well() {
    let qemu = Qemu::default();
    let requested = |milli| Demand { cpu_request: Some(milli), ..Demand::default() };
    assert_eq!(size(&qemu, requested(3500)).vcpus, 4);
    assert_eq!(size(&qemu, requested(2)).vcpus, 1);
}

#[test]
fn containers_without_a_limit_have_the_defaults_beside_those_with_one() {
    let qemu = Qemu { default_vcpus: 3.0, ..Qemu::default() };
    let open = Demand { cpu_open: true, memory_open: true, ..demand(1000, 64 << 20) };
    assert_eq!(size(&qemu, open), Size { vcpus: 3, memory_mib: 184 + 2048 });
}

#[test]
fn what_exceeds_the_bounds_is_refused_by_the_key() {
    let refused = |qemu: &Qemu, demand| bounds(qemu).size(&demand).unwrap_err().to_string();
    let small = Qemu { default_maxvcpus: 2, default_maxmemory: 1024, ..Qemu::default() };
    assert!(refused(&small, demand(4000, 0)).contains("default_maxvcpus is 2"));
    assert!(refused(&small, demand(0, GIB)).contains("default_maxmemory"));
    let text = refused(&Qemu::default(), demand(0, 32 * GIB));
    assert!(text.contains("32768 MiB is the most: the host has no more"), "{text}");
    assert!(text.contains("overhead_memory"), "{text}");
}

proptest! {
    #[test]
    fn no_pod_has_less_than_it_was_promised(
        cpu in 1..8000_u64,
        mib in 1..28_000_u64,
        overhead in 0..512_u64,
        parts in 0.0..2.0_f64,
    ) {
        let qemu = Qemu { overhead_memory: overhead, overhead_vcpus: parts, ..Qemu::default() };
        let size = size(&qemu, demand(cpu, mib << 20));
        prop_assert!(u64::from(size.vcpus) * 1000 >= cpu);
        // What the kernel takes is what was measured, or less.
        let kernel = 69 + size.memory_mib * 4 / 100;
        prop_assert!(size.memory_mib >= mib + overhead + kernel, "{size:?}");
        // And little is wasted.
        prop_assert!(size.memory_mib <= mib + overhead + 90 + mib / 16 + overhead / 16, "{size:?}");
    }

    #[test]
    fn more_promised_is_never_a_smaller_machine(cpu in 1..8000_u64, mib in 1..20_000_u64, more in 0..5000_u64) {
        let qemu = Qemu::default();
        let (small, large) = (size(&qemu, demand(cpu, mib << 20)), size(&qemu, demand(cpu + more, (mib + more) << 20)));
        prop_assert!(large.vcpus >= small.vcpus && large.memory_mib >= small.memory_mib);
    }

    #[test]
    fn any_demand_is_answered(cpu: Option<u64>, request: Option<u64>, memory: Option<u64>, open: bool) {
        let qemu = Qemu::default();
        let demand = Demand {
            cpu_limit: cpu,
            cpu_request: request,
            memory_limit: memory,
            cpu_open: open,
            memory_open: open,
        };
        if let Ok(size) = bounds(&qemu).size(&demand) {
            prop_assert!((1..=8).contains(&size.vcpus) && size.memory_mib <= 32 << 10);
        }
    }
}

#[test]
fn machines_of_huge_pages_have_whole_ones() {
    let qemu = Qemu { enable_hugepages: true, default_memory: 2047, ..Qemu::default() };
    assert_eq!(size(&qemu, demand(0, 0)).memory_mib, 2048);
    // 251 MiB otherwise.
    assert_eq!(size(&qemu, demand(0, 128 << 20)).memory_mib, 252);
}
