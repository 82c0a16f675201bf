//! Over a plain directory in which a thread does what the kernel would.

use std::fs;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{CWD, FileType, mknodat};

use super::*;
use crate::tests::{guest, guest_of};

/// A request as the kernel lays it out, for which it answers once for each of `writes`: how many writes it has counted since
/// the last time. What it read from `inblob` each time is what the thread ends with.
struct Played {
    dir: tempfile::TempDir,
    kernel: JoinHandle<Vec<Vec<u8>>>,
}

fn played(writes: &'static [u64], outblob: Vec<u8>) -> Played {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (name, text) in
        [("provider", "sev_guest\n"), ("generation", "7\n"), ("inblob", ""), ("auxblob", "certs")]
    {
        fs::write(at(name), text).unwrap();
    }
    mknodat(CWD, at("outblob"), FileType::Fifo, 0o600.into(), 0).unwrap();
    let files = ["inblob", "generation", "outblob"].map(at);
    let kernel = std::thread::spawn(move || {
        let [inblob, generation, report] = files;
        let mut count = 7;
        let answer = |more: &u64| {
            while fs::metadata(&inblob).unwrap().len() == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            let asked = fs::read(&inblob).unwrap();
            fs::write(&inblob, "").unwrap();
            count += more;
            fs::write(&generation, format!("{count}\n")).unwrap();
            // Whoever has read enough breaks off.
            let _ = OpenOptions::new().write(true).open(&report).unwrap().write_all(&outblob);
            asked
        };
        writes.iter().map(answer).collect()
    });
    Played { dir, kernel }
}

impl Played {
    fn ask(self) -> (Result<Evidence, EvidenceError>, Vec<Vec<u8>>) {
        let answer = Request(self.dir.path().to_owned()).answer(&[5; DATA_MAX]);
        (answer, self.kernel.join().unwrap())
    }
}

#[test]
fn report_is_the_one_for_what_was_asked() {
    let (answer, asked) = played(&[1], b"a report".to_vec()).ask();
    let wanted = Evidence {
        provider: "sev_guest".to_owned(),
        report: b"a report".to_vec(),
        certificates: b"certs".to_vec(),
    };
    assert_eq!(answer.unwrap(), wanted);
    assert_eq!(asked, [vec![5; 64]]);
}

#[test]
fn hardware_without_certificates_has_none() {
    let played = played(&[1], b"a report".to_vec());
    fs::remove_file(played.dir.path().join("auxblob")).unwrap();
    assert!(played.ask().0.unwrap().certificates.is_empty());
}

#[test]
fn report_that_somebody_else_wrote_into_is_asked_for_again() {
    let (answer, asked) = played(&[2, 1], b"a report".to_vec()).ask();
    assert_eq!((answer.unwrap().report.as_slice(), asked.len()), (b"a report".as_slice(), 2));
}

#[test]
fn write_that_the_kernel_did_not_take_is_no_report() {
    assert!(matches!(played(&[0, 0, 0], Vec::new()).ask().0, Err(EvidenceError::Disturbed)));
}

#[test]
fn who_is_disturbed_each_time_gives_up() {
    let (answer, asked) = played(&[2, 3, 2], b"a report".to_vec()).ask();
    assert!(matches!(answer, Err(EvidenceError::Disturbed)), "{answer:?}");
    assert_eq!(asked.len(), ATTEMPTS);
}

#[test]
fn report_of_any_size_is_read_to_its_bound_alone() {
    let most = usize::try_from(BLOB_MAX).unwrap();
    assert_eq!(played(&[1], vec![1; most]).ask().0.unwrap().report.len(), most);
    let error = played(&[1], vec![1; most + 1]).ask().0.unwrap_err();
    assert!(matches!(&error, EvidenceError::TooLarge(path) if path.ends_with("outblob")), "{error}");
}

#[test]
fn data_that_a_report_has_no_room_for_is_refused_and_nothing_asked() {
    // There is not even a root to ask in.
    assert!(matches!(ask(Path::new("/none"), &[0; 65]), Err(EvidenceError::TooLong(65))));
}

#[test]
fn ordinary_guest_is_told_that_it_has_no_such_hardware() {
    let error = ask(guest(false, "svm vmx").path(), b"nonce").unwrap_err();
    assert!(matches!(error, EvidenceError::NoHardware), "{error}");
}

#[test]
fn kernel_without_reports_is_named_with_the_driver_that_it_needs() {
    for (hardware, words) in
        [(Hardware::Snp, ["SEV-SNP", "sev_guest"]), (Hardware::Tdx, ["TDX", "tdx_guest"])]
    {
        let text = ask(guest_of(hardware).path(), b"nonce").unwrap_err().to_string();
        assert!(words.iter().all(|word| text.contains(word)) && text.contains("/tsm/report"), "{text}");
    }
    let refused =
        |source: Errno| EvidenceError::File { what: "making", path: "x".into(), source: source.into() };
    let text = explained(guest_of(Hardware::Snp).path(), refused(Errno::NXIO)).to_string();
    assert!(text.contains("nobody has registered for them"), "{text}");
    let ordinary = guest(false, "");
    assert!(matches!(explained(ordinary.path(), refused(Errno::NXIO)), EvidenceError::NoHardware));
    assert!(matches!(explained(ordinary.path(), refused(Errno::PERM)), EvidenceError::File { .. }));
    assert!(matches!(explained(Path::new("/none"), refused(Errno::NXIO)), EvidenceError::Unknown(_)));
}

#[test]
fn of_a_request_that_fails_nothing_is_left() {
    let guest = guest_of(Hardware::Snp);
    let reports = guest.path().join(REPORTS);
    fs::create_dir_all(&reports).unwrap();
    // Nobody fills the directory here.
    let error = ask(guest.path(), b"nonce").unwrap_err();
    assert!(matches!(&error, EvidenceError::File { path, .. } if path.ends_with("provider")), "{error}");
    assert_eq!(fs::read_dir(&reports).unwrap().count(), 0);
}
