use super::*;

#[test]
fn a_key_below_a_removed_section_is_found() {
    let item = find(Surface::ConfigKey, "hypervisor.stratovirt.path").unwrap();
    assert_eq!((&*item.id, &*item.title), ("D0001", "StratoVirt"));
    assert!(find(Surface::ConfigKey, "hypervisor.stratovirt2").is_none());
    assert!(find(Surface::Annotation, "hypervisor.stratovirt").is_none());
}
