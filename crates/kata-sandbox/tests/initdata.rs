//! Pods with initdata, over a fake machine and a fake agent.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod rig;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::write::GzEncoder;
use kata_initdata::{Initdata, read_image};
use kata_sandbox::ErrorKind;
use rig::{Rig, soon};

const TEXT: &str =
    "version = \"0.1.0\"\nalgorithm = \"sha384\"\n[data]\n\"policy.rego\" = 'package agent_policy'\n";

fn packed(text: &[u8]) -> String {
    let mut writer = GzEncoder::new(Vec::new(), Compression::fast());
    writer.write_all(text).unwrap();
    STANDARD.encode(writer.finish().unwrap())
}

/// A pod with this value of the annotation, on an image whose guests read it.
async fn rig(value: &str) -> Option<Rig> {
    let mut rig = Rig::new().await?;
    rig.capabilities = vec!["initdata", "policy"];
    rig.config.hypervisor.qemu.initdata = value.to_owned();
    Some(rig)
}

/// Why such a pod is refused. Nothing of it is there then.
async fn refusal(rig: &Rig) -> (ErrorKind, String) {
    let error = rig.launch().await.unwrap_err();
    rig.assert_clean().await;
    assert!(rig.vm.with_spec(|_| ()).is_none(), "no machine was booted");
    (error.kind(), error.chain())
}

async fn refused(value: &str) -> Option<String> {
    let (kind, text) = refusal(&rig(value).await?).await;
    assert_eq!(kind, ErrorKind::InvalidArgument, "{text}");
    assert!(text.contains("hypervisor.qemu.initdata") && text.contains("cc_init_data"), "{text}");
    Some(text)
}

#[tokio::test]
async fn machine_has_a_disk_that_holds_the_document_and_that_goes_with_the_pod() {
    let Some(rig) = rig(&packed(TEXT.as_bytes())).await else { return };
    let pod = rig.pod().await;
    let disks = rig.vm.with_spec(|spec| spec.disks.clone()).unwrap();
    assert_eq!((disks.len(), disks[0].id.as_str(), disks[0].readonly), (1, "initdata", true));
    assert!(disks[0].path.starts_with(rig.run_dir()));
    assert_eq!(std::fs::metadata(&disks[0].path).unwrap().permissions().mode() & 0o777, 0o600);
    let read = read_image(std::fs::File::open(&disks[0].path).unwrap()).unwrap();
    assert_eq!(read, Initdata::parse(TEXT.into()).unwrap());
    soon(pod.shutdown()).await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn pod_without_initdata_has_no_such_disk() {
    let Some(rig) = rig("").await else { return };
    let pod = rig.pod().await;
    assert_eq!(rig.vm.with_spec(|spec| spec.disks.len()), Some(0));
    soon(pod.shutdown()).await.unwrap();
}

#[tokio::test]
async fn what_is_no_initdata_is_refused_before_the_machine_starts() {
    let Some(text) = refused("no base64!").await else { return };
    assert!(text.contains("is not base64"), "{text}");
    let cases = [
        (STANDARD.encode(TEXT), "is not gzip, or is damaged"),
        (packed(&vec![b'#'; 16 << 20]), "is larger than 8388608 bytes unpacked"),
        (packed(TEXT.replace("policy.rego", "../etc/passwd").as_bytes()), "can be no file name"),
        (packed(TEXT.replace("policy.rego", "a/b").as_bytes()), "can be no file name"),
        (packed(TEXT.replace("sha384", "sha-384").as_bytes()), "unknown variant `sha-384`"),
        (packed(TEXT.replace("0.1.0", "9.9").as_bytes()), "has version \"9.9\""),
        (packed(b"\xff"), "is not UTF-8"),
    ];
    for (value, why) in cases {
        let text = refused(&value).await.unwrap();
        assert!(text.contains(why), "{why}: {text}");
    }
}

#[tokio::test]
async fn image_whose_guests_do_not_read_initdata_is_refused_by_the_name_of_what_it_lacks() {
    let Some(mut rig) = rig(&packed(TEXT.as_bytes())).await else { return };
    rig.capabilities = vec!["virtio-blk"];
    let (kind, text) = refusal(&rig).await;
    assert_eq!(kind, ErrorKind::Unimplemented);
    assert!(text.contains("no initdata") && text.contains("--flavour services"), "{text}");
    // One that the configuration names is looked at as well.
    rig.config.hypervisor.qemu.image = Some(rig.dir.path().join("image"));
    assert_eq!(refusal(&rig).await.0, ErrorKind::Unimplemented);
}

#[tokio::test]
async fn policy_is_refused_where_the_agent_would_not_ask_it_and_other_files_are_not() {
    let Some(mut rig) = rig(&packed(TEXT.as_bytes())).await else { return };
    rig.capabilities = vec!["initdata"];
    let (kind, text) = refusal(&rig).await;
    assert_eq!(kind, ErrorKind::Unimplemented);
    assert!(text.contains("no policy") && text.contains("policy.rego in hypervisor.qemu.initdata"), "{text}");
    rig.config.hypervisor.qemu.initdata = packed(TEXT.replace("policy.rego", "aa.toml").as_bytes());
    soon(rig.pod().await.shutdown()).await.unwrap();
}

#[tokio::test]
async fn root_of_the_users_own_is_taken_at_its_word() {
    let Some(mut rig) = rig(&packed(TEXT.as_bytes())).await else { return };
    rig.capabilities.clear();
    rig.config.hypervisor.qemu.initrd = Some(rig.dir.path().join("image/initrd"));
    let pod = rig.launch().await.unwrap();
    // Nothing says whether its agent announces itself, so it is dialled.
    soon(pod.ready()).await.unwrap();
    assert_eq!(rig.vm.with_spec(|spec| spec.disks.len()), Some(1));
    soon(pod.shutdown()).await.unwrap();
}

#[tokio::test]
async fn digest_is_bound_to_the_hardware_of_a_confidential_machine() {
    let document = Initdata::parse(TEXT.into()).unwrap();
    for (snp, size) in [(true, 32), (false, 48)] {
        let Some(mut rig) = rig(&packed(TEXT.as_bytes())).await else { return };
        let qemu = &mut rig.config.hypervisor.qemu;
        (qemu.confidential_guest, qemu.sev_snp_guest) = (true, snp);
        qemu.firmware = Some("/firmware".into());
        let pod = rig.pod().await;
        let (confidential, firmware) =
            rig.vm.with_spec(|spec| (spec.confidential.clone(), spec.firmware.clone())).unwrap();
        let host_data = confidential.and_then(|confidential| confidential.host_data);
        assert_eq!(host_data, Some(document.host_data(size)));
        assert_eq!(firmware, Some("/firmware".into()));
        soon(pod.shutdown()).await.unwrap();
    }
}
