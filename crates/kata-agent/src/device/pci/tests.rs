use std::fs::create_dir_all;

use proptest::prelude::*;

use super::*;

fn path(text: &str) -> PciPath {
    text.parse().unwrap()
}

#[test]
fn slots_are_hexadecimal_with_an_optional_function() {
    assert_eq!(path("02"), PciPath(vec![Slot { device: 2, function: 0 }]));
    assert_eq!(path("1c.3/00").0, [Slot { device: 0x1c, function: 3 }, Slot { device: 0, function: 0 }]);
    assert_eq!(path("1F/1f/1f.7").0.len(), 3);
}

#[test]
fn what_is_no_pci_path_is_refused_with_its_text() {
    for text in
        ["", "2", "002", "02/", "/02", "02//00", "20", "02.8", "02.", "02.00", "+2", "0x2", "..", "02/.."]
    {
        let error = text.parse::<PciPath>().unwrap_err().to_string();
        assert!(error.contains(&format!("{text:?}")), "{error}");
    }
}

#[test]
fn bus_numbers_come_from_the_bridges() {
    let sys = tempfile::tempdir().unwrap();
    let bridge = sys.path().join("devices/pci0000:00/0000:00:02.0");
    create_dir_all(bridge.join("pci_bus/0000:0a")).unwrap();
    create_dir_all(bridge.join("0000:0a:00.0")).unwrap();
    assert_eq!(path("02").directory(sys.path()).unwrap(), bridge);
    assert_eq!(path("02/00").directory(sys.path()).unwrap(), bridge.join("0000:0a:00.0"));
}

#[test]
fn a_way_that_ends_early_tells_where_and_what_is_there() {
    let sys = tempfile::tempdir().unwrap();
    let root = sys.path().join("devices/pci0000:00");
    for device in ["0000:00:1f.0", "0000:00:00.0", "power", "pci_bus"] {
        create_dir_all(root.join(device)).unwrap();
    }
    let text = path("02/00").directory(sys.path()).unwrap_err().to_string();
    assert!(text.contains("0000:00:02.0") && text.contains("0000:00:00.0, 0000:00:1f.0"), "{text}");
    assert!(!text.contains("power"), "{text}");
    let text = path("1f/00").directory(sys.path()).unwrap_err().to_string();
    assert!(text.contains("0000:00:1f.0 is not a bridge"), "{text}");
    let none = path("00").directory(Path::new("/nowhere")).unwrap_err().to_string();
    assert!(none.contains("on its bus: none"), "{none}");
}

proptest! {
    #[test]
    fn no_text_leads_out_of_the_bus(text in "[0-9a-f./]{0,12}") {
        if let Ok(path) = text.parse::<PciPath>() {
            let way: Vec<String> = path.0.iter().map(Slot::to_string).collect();
            prop_assert!(way.iter().all(|slot| slot.len() == 4 && !slot.starts_with('.')));
        }
    }
}
