use super::*;

#[test]
fn a_guest_cannot_name_a_block_of_memory_that_no_kernel_has() {
    for (bytes, mib) in [(0, 1), (1 << 20, 1), (128 << 20, 128), (2 << 30, 2048)] {
        assert_eq!(block_mib(bytes).unwrap(), mib);
    }
    for bytes in [1, 4096, (1 << 20) + 1, 3 << 20, 4 << 30, 1 << 40, u64::MAX] {
        let text = block_mib(bytes).unwrap_err().to_string();
        assert!(text.contains(&bytes.to_string()), "{text}");
    }
}

#[test]
fn a_change_that_is_taken_back_leaves_other_containers_as_they_are() {
    let mut tally = Tally::default();
    tally.set("other", Share::default());
    let before = |name: &str| Before { container: name.to_owned(), share: Share::default() };
    before("gone").put_back(&mut tally);
    assert!(tally.get("gone").is_none() && tally.get("other").is_some());
    before("other").put_back(&mut tally);
    assert_eq!(tally.get("other"), Some(&Share::default()));
}
