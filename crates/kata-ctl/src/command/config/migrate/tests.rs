use super::*;

fn migrated(text: &str) -> (String, Vec<(Fate, String)>) {
    let (result, accounts) = migrate(Path::new("upstream.toml"), text).unwrap();
    (result, accounts.into_iter().map(|account| (account.fate, account.key)).collect())
}

#[test]
fn comments_of_what_stays_are_kept() {
    let text = "# mine\n[hypervisor.qemu]\n# a lot\ndefault_memory = 4096 # MiB\n# gone\nqueue_size = 128\n\n[runtime]\nname = \"virt_container\"\n";
    let (result, fates) = migrated(text);
    assert_eq!(result, "# mine\n[hypervisor.qemu]\n# a lot\ndefault_memory = 4096 # MiB\n");
    assert_eq!(
        fates,
        [
            (Fate::Dropped, "hypervisor.qemu.queue_size".to_owned()),
            (Fate::Dropped, "runtime.name".to_owned()),
        ]
    );
}

#[test]
fn what_has_another_name_is_moved_with_its_unit() {
    let (result, fates) = migrated(
        "[agent.kata]\ndial_timeout = 90\n[runtime]\ncreate_container_timeout = 1200\nlog_level = \"warn\"\n\
         [hypervisor.qemu]\nseccompsandbox = \"on\"\n",
    );
    let reading = Reading::of_text(Path::new("f"), &result).unwrap();
    assert_eq!(reading.config.agent.kata.reconnect_timeout_ms, 90_000);
    assert_eq!(reading.config.agent.kata.create_container_timeout, 1200);
    assert_eq!(reading.config.hypervisor.qemu.seccomp_sandbox, "on");
    assert!(fates.iter().all(|(fate, _)| *fate == Fate::Moved), "{fates:?}");
}

#[test]
fn what_is_asked_for_and_not_done_is_lost_and_told_last() {
    let (result, fates) =
        migrated("[hypervisor.qemu]\nenable_iommu = true\ndefault_bridges = 1\ndefault_vcpus = 2\n");
    assert_eq!(result, "[hypervisor.qemu]\ndefault_vcpus = 2\n");
    assert_eq!(fates.last(), Some(&(Fate::Lost, "hypervisor.qemu.enable_iommu".to_owned())));
}

#[test]
fn a_driver_that_is_not_there_goes_with_its_section() {
    let (result, fates) = migrated(
        "[hypervisor.dragonball]\npath = \"/x\"\n[hypervisor.dragonball.factory]\nenable_template = false\n[runtime]\nhypervisor_name = \"dragonball\"\n",
    );
    assert_eq!(result, "");
    assert_eq!(
        fates,
        [
            (Fate::Dropped, "hypervisor.dragonball".to_owned()),
            (Fate::Lost, "runtime.hypervisor_name".to_owned()),
        ]
    );
}

#[test]
fn upstreams_daemon_and_its_arguments_go_together() {
    let (result, _) = migrated(
        "[hypervisor.qemu]\nvirtio_fs_daemon = \"/opt/kata/libexec/virtiofsd\"\nvirtio_fs_extra_args = [\"-o\", \"announce_submounts\"]\nvirtio_fs_cache = \"never\"\n",
    );
    assert_eq!(result, "[hypervisor.qemu]\nvirtio_fs_cache = \"never\"\n");
}

#[test]
fn every_file_of_upstreams_can_be_migrated() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kata-config/tests/corpus");
    let mut count = 0;
    for runtime in ["rust", "go"] {
        for entry in std::fs::read_dir(corpus.join(runtime)).unwrap() {
            let path = entry.unwrap().path();
            if let Err(failure) = migrate(&path, &std::fs::read_to_string(&path).unwrap()) {
                panic!("{}: {:?}", path.display(), failure.error.map(|error| error.to_string()));
            }
            count += 1;
        }
    }
    assert_eq!(count, 29);
}

#[test]
fn a_value_whose_new_place_is_taken_is_dropped_and_said_to_be() {
    let (result, fates) = migrated("[agent.kata]\nreconnect_timeout_ms = 100\ndial_timeout = 60\n");
    assert_eq!(result, "[agent.kata]\nreconnect_timeout_ms = 100\n");
    assert_eq!(fates, [(Fate::Dropped, "agent.kata.dial_timeout".to_owned())]);
}

#[test]
fn what_stays_less_strict_than_the_defaults_is_named() {
    let text = "[hypervisor.qemu]\nseccomp_sandbox = \"\"\nenable_annotations = [\"kernel_params\"]\n";
    let (result, fates) = migrated(text);
    assert_eq!(result, text);
    assert_eq!(
        fates,
        [
            (Fate::Kept, "hypervisor.qemu.seccomp_sandbox".to_owned()),
            (Fate::Kept, "hypervisor.qemu.enable_annotations".to_owned()),
        ]
    );
}

#[test]
fn upstreams_guest_gives_way_to_the_own_one_and_anybody_elses_stays() {
    let (result, _) = migrated(
        "[hypervisor.qemu]\nkernel = \"/opt/kata/share/kata-containers/vmlinux.container\"\nimage = \"/srv/my.img\"\n",
    );
    assert_eq!(result, "[hypervisor.qemu]\nimage = \"/srv/my.img\"\n");
}
