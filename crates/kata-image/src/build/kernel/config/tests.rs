use std::io::Write;

use super::*;

#[test]
fn lost_lines_are_listed_with_what_became_of_them() {
    let wanted = KernelConfig::parse("# why\nCONFIG_A=y\nCONFIG_B=240\nCONFIG_C=n\nCONFIG_D=y\n");
    let made = KernelConfig::parse("CONFIG_A=y\nCONFIG_B=64\n# CONFIG_D is not set\n");
    assert_eq!(made.lost(&wanted), ["CONFIG_B=240 is 64", "CONFIG_D=y is n"]);
}

#[test]
fn module_counts_only_if_the_image_has_it() {
    let config = KernelConfig::parse("CONFIG_VIRTIO_FS=y\nCONFIG_EROFS_FS=m\nCONFIG_SECCOMP_FILTER=y\n");
    let capabilities = config.capabilities(&Plan::default());
    assert_eq!(capabilities, [cap::SECCOMP, cap::VIRTIO_FS].map(str::to_owned).into());
}

#[test]
fn embedded_configuration_is_found() {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(b"CONFIG_VIRTIO_VSOCKETS=y\n").unwrap();
    let packed = encoder.finish().unwrap();
    let kernel = [b"IKCFG_ST is a word, too; IKCFG_ST".as_slice(), &packed, b"IKCFG_ED"].concat();
    let config = KernelConfig::embedded(&kernel).unwrap().unwrap();
    assert!(config.capabilities(&Plan::default()).contains(cap::VSOCK));
    assert!(KernelConfig::embedded(&kernel[..20]).unwrap().is_none());
    assert!(KernelConfig::embedded(&kernel[..50]).is_err());
}
