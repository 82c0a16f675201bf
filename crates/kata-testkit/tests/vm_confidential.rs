//! Machines whose memory their host cannot read, where the host has the hardware for it.
//!
//! `KATA_TEST_SERVICES` is the directory of a guest image with systemd, `KATA_TEST_BZIMAGE` its kernel as a bzImage,
//! `KATA_TEST_SNP_FIRMWARE` and `KATA_TEST_TDX_FIRMWARE` are OVMF as it is built for each.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Output;

use kata_testkit::containerd::{Containerd, Version};
use kata_testkit::host::{stderr, stdout};
use serde_json::Value;

/// What a host says that has such hardware, and what the configuration has to.
struct Hardware {
    parameter: &'static str,
    firmware: &'static str,
    is_snp: bool,
}

const SNP: Hardware = Hardware {
    parameter: "/sys/module/kvm_amd/parameters/sev_snp",
    firmware: "KATA_TEST_SNP_FIRMWARE",
    is_snp: true,
};
const TDX: Hardware = Hardware {
    parameter: "/sys/module/kvm_intel/parameters/tdx",
    firmware: "KATA_TEST_TDX_FIRMWARE",
    is_snp: false,
};

/// A file that the environment names; says (and counts) if it names none.
fn named(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.exists());
    if path.is_none() {
        kata_testkit::skip(&format!("{variable} names nothing that is there"));
    }
    path
}

/// A world whose pods are confidential, on a host that can do it.
fn rig(hardware: &Hardware) -> Option<Containerd> {
    let says = std::fs::read_to_string(hardware.parameter).unwrap_or_default();
    if !matches!(says.trim(), "Y" | "1") {
        kata_testkit::skip(&format!("{} does not say Y: this host has no such hardware", hardware.parameter));
        return None;
    }
    let [image, kernel, firmware] = ["KATA_TEST_SERVICES", "KATA_TEST_BZIMAGE", hardware.firmware].map(named);
    let config = format!(
        "[hypervisor.qemu]\nconfidential_guest = true\nsev_snp_guest = {}\nfirmware = {:?}\nkernel = {:?}\nimage = {:?}\n\
         shared_fs = \"none\"\ndefault_vcpus = 1\nenable_annotations = [\"cc_init_data\"]\n\
         [runtime]\nhypervisor_name = \"qemu\"\nstatic_sandbox_resource_mgmt = true\n",
        hardware.is_snp, firmware?, kernel?, image?
    );
    let rig = Containerd::new(Version::V2)?;
    rig.host().configure(&config);
    rig.has_machines().then_some(rig)
}

#[track_caller]
fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_str(&stdout(output)).unwrap()
}

/// Runs a pod that is bound to a policy, and gives what `initdata create` says of the document and `evidence` of the machine.
fn bound_and_reported(rig: &Containerd) -> (Value, Value) {
    let host = rig.host();
    let policy = host.scratch("policy.rego");
    std::fs::write(&policy, "package agent_policy\ndefault AllowRequestsFailingPolicy := true\n").unwrap();
    let bound = json(&host.output(["initdata", "create", "--json", "--file", text(&policy)]));
    let annotation =
        format!("io.katacontainers.config.hypervisor.cc_init_data={}", bound["annotation"].as_str().unwrap());
    let options = ["--snapshotter", "erofs", "--read-only", "--annotation", &annotation];
    rig.detached(&options, "box", "exec sleep 1000");
    // What is asked for is in the report, or the command says that it is not.
    let nonce = "0123456789abcdef".repeat(8);
    let reported = json(&host.output(["evidence", "box", "--json", "--nonce", &nonce]));
    rig.remove("box");
    (bound, reported)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn report_of_snp_binds_the_initdata_and_has_the_launch_digest_that_measure_computes() {
    let Some(rig) = rig(&SNP) else { return };
    let (bound, reported) = bound_and_reported(&rig);
    assert_eq!(reported["provider"], "sev_guest");
    assert_eq!(reported["host_data"], bound["snp_host_data"], "HOST_DATA, bytes 0xc0 to 0xdf");
    let measured = json(&rig.host().output(["measure", "--json"]));
    assert_eq!(reported["measurement"], measured["launch_digest"], "MEASUREMENT, bytes 0x90 to 0xbf");
}

#[test]
fn report_of_tdx_binds_the_initdata_and_has_the_mrtd_that_measure_computes() {
    let Some(rig) = rig(&TDX) else { return };
    let (bound, reported) = bound_and_reported(&rig);
    assert_eq!(reported["provider"], "tdx_guest");
    assert_eq!(reported["host_data"], bound["tdx_mrconfigid"], "MRCONFIGID");
    let measured = json(&rig.host().output(["measure", "--json"]));
    assert_eq!(reported["measurement"], measured["mrtd"], "MRTD");
}
