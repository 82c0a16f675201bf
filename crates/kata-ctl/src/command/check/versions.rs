//! The versions that are in use, against the list of those known to be bad.

use serde_json::Value;

use super::Finding;
use super::known_bad::{Component, KnownBad, KnownBadError, kernel_version};
use crate::cli::CheckArgs;
use crate::command::version;

pub fn findings(answer: Option<&Value>, args: &CheckArgs) -> Vec<Finding> {
    let list = match list(args) {
        Ok(list) => list,
        Err(error) => {
            return vec![Finding::warning(
                "known bad",
                crate::failure::chain(&error),
                "versions were not compared with any list",
                "fetch list and signature anew, name the right key with --known-bad-key, or leave out --known-bad",
            )];
        }
    };
    let mut found = Vec::new();
    let uname = rustix::system::uname();
    let signature = std::fs::read_to_string("/proc/version_signature").ok();
    let (release, built) = (uname.release().to_string_lossy(), uname.version().to_string_lossy());
    let kernel = kernel_version(&release, &built, signature.as_deref());
    let qemu =
        answer.and_then(|answer| answer.pointer("/host/qemu/path")?.as_str()).and_then(version::of_program);
    let mut compared = Vec::new();
    for (component, name, version) in
        [(Component::Kernel, "kernel", &kernel), (Component::Qemu, "QEMU", &qemu)]
    {
        if let Some(version) = version {
            compared.push(format!("{name} {version}"));
            found.extend(list.findings(component, version));
        }
    }
    if kernel.is_none() {
        found.push(Finding::ok(
            "known bad",
            format!("kernel {release} does not tell which stable version it is: not compared"),
        ));
    }
    if found.iter().all(|finding| finding.cost.is_none()) {
        let against = format!("{} entries of {}", list.len(), list.updated);
        found.push(Finding::ok("known bad", format!("{}: not among the {against}", compared.join(", "))));
    }
    found
}

fn list(args: &CheckArgs) -> Result<KnownBad, KnownBadError> {
    match &args.known_bad {
        Some(path) => KnownBad::signed(path, args.known_bad_key.as_deref()),
        None => KnownBad::built_in(),
    }
}
