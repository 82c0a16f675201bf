//! Documents that are bound to a test's machines.

use crate::host::{Host, stderr, stdout};

/// The annotation that `enable_annotations` lists as `cc_init_data`.
const ANNOTATION: &str = "io.katacontainers.config.hypervisor.cc_init_data";

/// What `kata-ctl` makes of files by name: the value of `hypervisor.qemu.initdata`.
#[track_caller]
pub fn value(host: &Host, files: &[(&str, &str)]) -> String {
    let mut words = vec!["initdata".to_owned(), "create".to_owned()];
    for (name, text) in files {
        let path = host.scratch("initdata").with_extension(name);
        std::fs::write(&path, text).unwrap();
        words.extend(["--file".to_owned(), format!("{name}={}", path.display())]);
    }
    let output = host.output(words);
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output).trim().to_owned()
}

/// The same as an annotation of a pod, `KEY=VALUE`.
#[track_caller]
pub fn annotation(host: &Host, files: &[(&str, &str)]) -> String {
    format!("{ANNOTATION}={}", value(host, files))
}
