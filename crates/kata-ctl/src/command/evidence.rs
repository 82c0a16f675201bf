//! `evidence`: what the hardware says of a pod's machine.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use kata_api::control::EvidenceResponse;
use kata_evidence::{DATA_MAX, Fields};
use kata_image::manifest::hex;
use rustix::rand::{GetRandomFlags, getrandom};
use serde_json::{Value, json};

use super::guest::content;
use super::{Outcome, named};
use crate::cli::EvidenceArgs;
use crate::failure::Failure;
use crate::pod::Client;
use crate::{output, table};

/// Bytes of a nonce that is made up.
const NONCE: usize = 32;

/// Why there is no evidence.
#[derive(Debug, thiserror::Error)]
enum EvidenceVerbError {
    #[error("{0:?} is no nonce: it takes pairs of the digits 0 to 9 and a to f")]
    Hex(String),
    #[error("the nonce has {0} bytes, and a report has room for {DATA_MAX}")]
    TooLong(usize),
    #[error("no nonce can be made up")]
    Random(#[source] rustix::io::Errno),
    #[error("what came is no evidence: the report of {provider} is for another nonce")]
    OtherNonce { provider: String },
    #[error("cannot write {}", .path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// Asks, and shows or keeps what is answered.
pub async fn run(args: &EvidenceArgs) -> Outcome {
    let nonce = nonce(args)?;
    let client = Client::connect(&named(&args.pod)?).await?;
    let found = client.evidence(nonce.clone()).await?;
    check(&found, &nonce)?;
    if let Some(path) = &args.output {
        keep(path, &found)?;
    } else if args.json {
        output::document(&document(&found, &nonce))?;
    } else {
        output::print(&as_table(&found, &nonce))?;
    }
    Ok(0)
}

fn nonce(args: &EvidenceArgs) -> Result<Vec<u8>, Failure> {
    let nonce = match (&args.nonce, &args.nonce_file) {
        (Some(text), _) => from_hex(text).ok_or_else(|| EvidenceVerbError::Hex(text.clone()))?,
        (None, Some(file)) => content(file)?,
        (None, None) => {
            let mut nonce = vec![0; NONCE];
            // So few bytes come whole.
            getrandom(&mut nonce, GetRandomFlags::empty()).map_err(EvidenceVerbError::Random)?;
            nonce
        }
    };
    if nonce.len() > DATA_MAX {
        return Err(EvidenceVerbError::TooLong(nonce.len()).into());
    }
    Ok(nonce)
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|c| c.to_digit(16).and_then(|it| u8::try_from(it).ok())).collect();
    let digits = digits.filter(|digits| !digits.is_empty() && digits.len() % 2 == 0)?;
    Some(digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect())
}

/// A guest may answer anything; what it says of the nonce can be told here already.
fn check(found: &EvidenceResponse, nonce: &[u8]) -> Result<(), EvidenceVerbError> {
    let Some(fields) = Fields::of(&found.provider, &found.report) else { return Ok(()) };
    let (said, rest) = fields.report_data.split_at_checked(nonce.len()).unwrap_or_default();
    if said == nonce && rest.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    Err(EvidenceVerbError::OtherNonce { provider: found.provider.clone() })
}

/// The report in `path`, and certificates beside it.
fn keep(path: &Path, found: &EvidenceResponse) -> Result<(), EvidenceVerbError> {
    let write = |path: &Path, bytes: &[u8]| {
        std::fs::write(path, bytes)
            .map_err(|source| EvidenceVerbError::Write { path: path.to_owned(), source })
    };
    write(path, &found.report)?;
    if found.certificates.is_empty() {
        return Ok(());
    }
    let mut beside = OsString::from(path);
    beside.push(".certs");
    write(Path::new(&beside), &found.certificates)
}

fn document(found: &EvidenceResponse, nonce: &[u8]) -> Value {
    let fields = Fields::of(&found.provider, &found.report);
    json!({
        "provider": found.provider,
        "nonce": hex(nonce),
        "measurement": fields.map(|fields| hex(fields.measurement)),
        "host_data": fields.map(|fields| hex(fields.host_data)),
        "report": hex(&found.report),
        "certificates": (!found.certificates.is_empty()).then(|| hex(&found.certificates)),
    })
}

fn as_table(found: &EvidenceResponse, nonce: &[u8]) -> String {
    let mut rows = vec![["provider", &found.provider].map(str::to_owned), ["nonce".to_owned(), hex(nonce)]];
    if let Some(fields) = Fields::of(&found.provider, &found.report) {
        rows.push(["measurement".to_owned(), hex(fields.measurement)]);
        rows.push(["host data".to_owned(), hex(fields.host_data)]);
    }
    for (name, bytes) in [("report", &found.report), ("certificates", &found.certificates)] {
        rows.push([name.to_owned(), table::bytes(bytes.len() as u64)]);
    }
    table::columns(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::chain;

    fn args(nonce: Option<&str>, nonce_file: Option<PathBuf>) -> EvidenceArgs {
        let nonce = nonce.map(str::to_owned);
        EvidenceArgs { pod: "p".to_owned(), nonce, nonce_file, json: false, output: None }
    }

    fn refusal(args: &EvidenceArgs) -> String {
        chain(&*nonce(args).unwrap_err().error.unwrap())
    }

    fn answer(report_data: &[u8]) -> EvidenceResponse {
        let mut report = vec![0; 0x4a0];
        report[0x50..0x50 + report_data.len()].copy_from_slice(report_data);
        report[0x90] = 0xaa;
        report[0xc0] = 0xbb;
        EvidenceResponse { provider: "sev_guest".to_owned(), report, ..EvidenceResponse::default() }
    }

    #[test]
    fn nonce_is_hexadecimal_or_a_file_or_made_up() {
        assert_eq!(nonce(&args(Some("00fFa1"), None)).unwrap(), [0, 0xff, 0xa1]);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "raw").unwrap();
        assert_eq!(nonce(&args(None, Some(file.path().to_owned()))).unwrap(), b"raw");
        let made = || nonce(&args(None, None)).unwrap();
        assert!(made().len() == NONCE && made() != made());
    }

    #[test]
    fn nonce_that_is_none_and_one_that_is_too_long_are_refused() {
        for text in ["", "abc", "zz", "0x00"] {
            assert!(refusal(&args(Some(text), None)).contains("is no nonce"), "{text:?}");
        }
        let text = "00".repeat(65);
        assert_eq!(refusal(&args(Some(&text), None)), "the nonce has 65 bytes, and a report has room for 64");
    }

    #[test]
    fn report_for_another_nonce_is_no_evidence() {
        assert!(check(&answer(b"nonce"), b"nonce").is_ok());
        for other in [b"other".as_slice(), b"nonce and more", b""] {
            assert!(check(&answer(other), b"nonce").is_err());
        }
        // Of hardware that is not known here nothing is claimed.
        let unknown = EvidenceResponse { provider: "new_guest".to_owned(), ..answer(b"other") };
        assert!(check(&unknown, b"nonce").is_ok());
        assert_eq!(document(&unknown, b"nonce")["measurement"], Value::Null);
    }

    #[test]
    fn what_a_report_holds_is_shown_and_the_report_is_kept_as_it_is() {
        let found = EvidenceResponse { certificates: b"certs".to_vec(), ..answer(b"nonce") };
        let told = document(&found, b"nonce");
        assert_eq!(told["measurement"], format!("aa{}", "00".repeat(47)));
        assert_eq!(told["host_data"], format!("bb{}", "00".repeat(31)));
        assert_eq!(told["certificates"], hex(b"certs"));
        assert!(as_table(&found, b"nonce").contains(&hex(b"nonce")));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report");
        keep(&path, &answer(b"nonce")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), found.report);
        assert!(!dir.path().join("report.certs").exists());
        keep(&path, &found).unwrap();
        assert_eq!(std::fs::read(dir.path().join("report.certs")).unwrap(), b"certs");
    }
}
