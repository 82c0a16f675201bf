use std::collections::BTreeSet;

use super::*;

#[test]
fn no_key_is_there_twice() {
    let mut seen = BTreeSet::new();
    for key in all() {
        assert!(seen.insert(key.path()), "{key:?}");
    }
}

#[test]
fn every_key_has_a_doc_sentence_and_a_default_of_its_type() {
    for key in all() {
        assert!(key.doc().ends_with('.'), "{key:?}: {:?}", key.doc());
        if let Some(default) = key.upstream_default {
            let value = DeValue::parse(default).unwrap_or_else(|error| panic!("{key:?}: {default}: {error}"));
            if let Err(fault) = key.kind.check(value.get_ref()) {
                panic!("{key:?}: {default}: {fault}");
            }
        }
        for value in key.harmless {
            assert!(key.kind.check(DeValue::parse(value).unwrap().get_ref()).is_ok(), "{key:?}: {value}");
        }
    }
}

#[test]
fn the_default_of_a_supported_key_is_what_an_empty_file_gives() {
    let key = |path| lookup(path).unwrap();
    assert_eq!(key("hypervisor.qemu.default_memory").default(), "2048");
    assert_eq!(key("hypervisor.qemu.machine_type").default(), "\"q35\"");
    assert_eq!(key("hypervisor.*.kernel").default(), "the guest image's");
    assert_eq!(key("runtime.uid_range").default(), "\"900000-999999\"");
    for key in all().filter(|key| key.is_supported() && key.unset.is_none()) {
        assert_ne!(key.default(), "unset", "{key:?}");
    }
}

#[test]
fn a_key_is_found_in_the_sections_of_the_drivers_that_have_it() {
    assert!(find("hypervisor.qemu.kernel").is_some_and(|place| place.read));
    assert!(find("hypervisor.firecracker.kernel").is_some_and(|place| !place.read));
    assert!(find("hypervisor.clh.factory.enable_template").is_some());
    assert!(find("hypervisor.clh.sev_snp_guest").is_none());
    assert!(find("hypervisor.*.kernel").is_none());
    assert!(find("hypervisor.kernel").is_none());
}

#[test]
fn no_annotation_sets_two_keys() {
    let mut seen = BTreeSet::new();
    for name in all().filter_map(Key::annotation_name) {
        assert!(seen.insert(name.clone()), "{name}");
    }
}
