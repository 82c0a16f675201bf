use std::path::{Path, PathBuf};
use std::process::Command;

use super::firmware::guid;
use super::*;

const TABLE: u128 = 0x96b5_82de_1fb2_45f7_baea_a366_c55a_082d;
const HASHES: u128 = 0x7255_371f_3a3b_4b04_927b_1da6_efa8_d454;
const RESET: u128 = 0x00f7_71de_1a7e_4fcb_890e_68c7_7e2f_b44e;
const METADATA: u128 = 0xdc88_6566_984a_4798_a75e_5585_a7bf_67cc;
/// Where metadata begins, before the end.
pub(super) const BACK: u32 = 0x800;
/// Sections as OVMF's AmdSev build has them, in kind.
const SECTIONS: [(u32, u32, u32); 5] = [
    (0x80_0000, 0x9000, 1),
    (0x80_9000, 0x2000, 4),
    (0x80_d000, 0x1000, 2),
    (0x80_e000, 0x1000, 3),
    (0x80_f000, 0x1000, 0x10),
];

/// An image with a table of these entries, metadata that begins `BACK` bytes before the end, and otherwise noise.
pub(super) fn image_of(pages: usize, entries: &[(u32, u128)], metadata: &[u8]) -> Vec<u8> {
    let mut image: Vec<u8> = (0..pages * PAGE).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect();
    let entry =
        |(number, of): &(u32, u128)| [&number.to_le_bytes()[..], &22_u16.to_le_bytes(), &guid(*of)].concat();
    let entries: Vec<u8> = entries.iter().flat_map(entry).collect();
    let length = u16::try_from(entries.len() + 18).unwrap();
    let table = [&entries[..], &length.to_le_bytes(), &guid(TABLE)].concat();
    let (end, size) = (image.len() - 32, image.len());
    image[end - table.len()..end].copy_from_slice(&table);
    let start = size - BACK as usize;
    image[start..start + metadata.len()].copy_from_slice(metadata);
    image
}

/// An image with OVMF's tables for SEV-SNP.
fn image(pages: usize, sections: &[(u32, u32, u32)]) -> Vec<u8> {
    let count = u32::try_from(sections.len()).unwrap();
    let mut metadata = b"ASEV".to_vec();
    metadata.extend([16 + 12 * count, 1, count].into_iter().flat_map(u32::to_le_bytes));
    metadata.extend(sections.iter().flat_map(|(a, b, c)| [*a, *b, *c]).flat_map(u32::to_le_bytes));
    image_of(pages, &[(0x80_f400, HASHES), (0x80_b004, RESET), (BACK, METADATA)], &metadata)
}

fn machine(vcpus: u32, cpu: &str) -> Machine {
    Machine {
        firmware: Firmware::parse(image(4, &SECTIONS)).unwrap(),
        hashes: Hashes::of(b"kernel", b"initrd", "console=ttyS0 reboot=t"),
        vcpus,
        signature: Model::named(cpu).unwrap().signature(),
    }
}

fn hex_of(machine: &Machine) -> String {
    kata_image::manifest::hex(&launch_digest(machine).unwrap())
}

/// Computed once by sev-snp-measure 0.0.13, see the test below.
const KNOWN: &str =
    "a0cd15fd9d841bd2f377087a4c3249478c4d95cfe8fb3dc789030225e37e01378c1579648689301093f905db7035612b";

#[test]
fn digest_is_the_one_that_others_compute() {
    assert_eq!(hex_of(&machine(2, "EPYC-v4")), KNOWN);
}

#[test]
fn everything_that_decides_what_runs_changes_the_digest() {
    let known = hex_of(&machine(2, "EPYC-v4"));
    let other = |change: fn(&mut Machine)| {
        let mut machine = machine(2, "EPYC-v4");
        change(&mut machine);
        hex_of(&machine)
    };
    let changes: [fn(&mut Machine); 6] = [
        |machine| machine.vcpus = 1,
        |machine| machine.signature = Model::named("EPYC-Milan").unwrap().signature(),
        |machine| machine.hashes = Hashes::of(b"Kernel", b"initrd", "console=ttyS0 reboot=t"),
        |machine| machine.hashes = Hashes::of(b"kernel", b"", "console=ttyS0 reboot=t"),
        |machine| machine.hashes = Hashes::of(b"kernel", b"initrd", "console=ttyS0  reboot=t"),
        |machine| machine.firmware = Firmware::parse(image(5, &SECTIONS)).unwrap(),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        assert_ne!(other(change), known, "{number}");
    }
}

#[test]
fn firmware_that_cannot_be_measured_says_what_it_lacks() {
    let fault = |bytes: Vec<u8>| Firmware::parse(bytes).unwrap_err().to_string();
    assert!(fault(vec![0; 100]).starts_with("100 bytes are no firmware"));
    assert_eq!(fault(vec![0; PAGE]), "it has no table of OVMF's");
    assert!(fault(image(2, &[(0, 0, 0x77)])).ends_with("kind 0x77, which is not known"));
    let mut without = image(2, &SECTIONS);
    let at = without.windows(16).rposition(|bytes| bytes == guid(METADATA)).unwrap();
    without[at] ^= 1;
    assert_eq!(fault(without), "its table has no SEV metadata: it is not built for SEV-SNP");
    let mut far = image(2, &SECTIONS);
    let at = far.windows(16).rposition(|bytes| bytes == guid(METADATA)).unwrap();
    far[at - 6..at - 2].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(fault(far), "its table is damaged: its metadata is before its beginning");

    let mut bare = machine(1, "EPYC-v4");
    bare.firmware = Firmware::parse(image(2, &SECTIONS[..3])).unwrap();
    assert!(matches!(launch_digest(&bare), Err(MeasureError::NoHashes)));
    bare.firmware = Firmware::parse(image(2, &[(0x80_f001, 0x1000, 1)])).unwrap();
    assert!(matches!(launch_digest(&bare), Err(MeasureError::Section(0x80_f001))));
}

#[test]
fn whatever_firmware_holds_is_taken_or_refused() {
    let good = image(1, &SECTIONS);
    // Each byte of the tables, turned over.
    for at in PAGE - 0x800..PAGE {
        for flip in [0x01, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            if let Ok(firmware) = Firmware::parse(bytes) {
                let machine = Machine { firmware, ..machine(1, "EPYC-v4") };
                // A section of gigabytes is taken at its word, which takes its time.
                if machine.firmware.sections().iter().all(|section| section.size < 1 << 20) {
                    let _ = launch_digest(&machine);
                }
            }
        }
    }
}

#[test]
fn signature_of_a_model_is_what_its_processor_says() {
    let signature = |name| Model::named(name).unwrap().signature();
    assert_eq!(
        (signature("EPYC-v4"), signature("EPYC-Milan"), signature("EPYC-Rome")),
        (0x80_0f12, 0xa0_0f11, 0x83_0f10)
    );
    assert!(Model::named("host").is_none());
}

/// The program of others: `KATA_SEV_SNP_MEASURE`, or one in `target/tools/snp/bin` or on the path.
fn other_program() -> Option<PathBuf> {
    let named = std::env::var_os("KATA_SEV_SNP_MEASURE").map(PathBuf::from);
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/snp/bin/sev-snp-measure");
    let found = named.into_iter().chain([beside, "sev-snp-measure".into()]);
    found
        .into_iter()
        .find(|program| Command::new(program).arg("--version").output().is_ok_and(|it| it.status.success()))
}

#[test]
fn digest_is_compared_with_that_of_another_program() {
    let Some(program) = other_program() else {
        kata_testkit::skip(
            "no sev-snp-measure: `make test` fetches it from PyPI, or KATA_SEV_SNP_MEASURE names one",
        );
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let firmware = write("firmware", &image(4, &SECTIONS));
    let (kernel, initrd) = (write("kernel", b"kernel"), write("initrd", b"initrd"));
    for (vcpus, cpu) in [(1, "EPYC-v4"), (2, "EPYC-v4"), (3, "EPYC-Milan"), (1, "EPYC-Genoa")] {
        let mut command = Command::new(&program);
        command.args(["--mode", "snp", "--vcpus", &vcpus.to_string(), "--vcpu-type", cpu]);
        command.arg("--ovmf").arg(&firmware).arg("--kernel").arg(&kernel).arg("--initrd").arg(&initrd);
        let output = command.args(["--append", "console=ttyS0 reboot=t"]).output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        assert_eq!(
            hex_of(&machine(vcpus, cpu)),
            told,
            "{vcpus} {cpu}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
