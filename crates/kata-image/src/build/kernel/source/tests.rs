use super::*;

#[test]
fn every_group_of_the_configuration_says_why() {
    // A group is what stands between two empty lines; each begins with its comment.
    for group in FRAGMENT.split("\n\n") {
        assert!(group.trim_start().starts_with('#'), "{group}");
    }
}

#[test]
fn configuration_names_each_option_once() {
    let lines: Vec<&str> = FRAGMENT.lines().filter(|line| line.starts_with("CONFIG_")).collect();
    let mut options: Vec<&str> = lines.iter().filter_map(|line| line.split('=').next()).collect();
    options.sort_unstable();
    let all = options.len();
    options.dedup();
    assert_eq!(options.len(), all);
    assert!(
        FRAGMENT.lines().all(|line| line.is_empty() || line.starts_with('#') || line.starts_with("CONFIG_"))
    );
}

#[test]
fn configured_kernel_has_every_capability() {
    let config = KernelConfig::parse(FRAGMENT);
    assert_eq!(config.capabilities(&Default::default()).len(), 14);
}
