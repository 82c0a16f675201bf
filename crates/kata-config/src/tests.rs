//! What a user sees of the configuration: layers, overrides, and every fault at once.

use std::path::{Path, PathBuf};

use crate::{
    AcceleratorChoice, Config, ConfigErrors, Fault, HypervisorChoice, KernelParams, LogLevel, MachineType,
    Reading, SharedFs, Sources, Tee, UidRange,
};

struct Etc(tempfile::TempDir);

impl Etc {
    fn with(base: &str) -> Self {
        let etc = Self(tempfile::tempdir().unwrap());
        etc.write("configuration.toml", base);
        etc
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self) -> Reading {
        Reading::of(&Sources { file: Some(self.path("configuration.toml")), ..Sources::default() }).unwrap()
    }

    fn load(&self, overrides: &[&str]) -> Result<Config, ConfigErrors> {
        load(&self.path("configuration.toml"), overrides)
    }

    /// For a pod with these annotations, each without what all their names begin with.
    fn load_for(&self, annotations: &[(&str, &str)]) -> Result<Config, ConfigErrors> {
        let full =
            |(name, value): &(&str, &str)| (format!("{}{name}", crate::keys::PREFIX), (*value).to_owned());
        let annotations = annotations.iter().map(full).collect();
        let file = Some(self.path("configuration.toml"));
        Config::load(&Sources { file, annotations, ..Sources::default() })
    }
}

fn load(file: &Path, overrides: &[&str]) -> Result<Config, ConfigErrors> {
    let overrides = overrides.iter().map(|text| (*text).to_owned()).collect();
    Config::load(&Sources { file: Some(file.to_owned()), overrides, ..Sources::default() })
}

/// The faults as lines, with the directory taken off.
fn faults(etc: &Etc, overrides: &[&str]) -> Vec<String> {
    let dir = format!("{}/", etc.0.path().display());
    let errors = etc.load(overrides).expect_err("must be refused");
    errors.to_string().lines().map(|line| line.replace(&dir, "")).collect()
}

#[test]
fn an_empty_file_is_the_defaults() {
    let config = Etc::with("").load(&[]).unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(config.hypervisor.qemu.default_memory, 2048);
    assert_eq!(config.hypervisor.qemu.shared_fs, SharedFs::VirtioFs);
    assert_eq!(config.runtime.uid_range, UidRange { first: 900_000, last: 999_999 });
    assert!(!config.runtime.disable_guest_seccomp);
}

#[test]
fn the_defaults_dump_to_a_file_that_loads_to_the_same() {
    let mut config = Config::default();
    config.hypervisor.qemu.kernel = Some("/boot/vmlinuz".into());
    config.hypervisor.qemu.kernel_params = KernelParams(vec!["a=b".to_owned(), "c=\"d e\"".to_owned()]);
    config.hypervisor.qemu.default_vcpus = 1.5;
    config.agent.kata.kernel_modules = vec!["e1000e X=1".to_owned()];
    let etc = Etc::with(&toml::to_string(&config).unwrap());
    assert_eq!(etc.load(&[]).unwrap(), config);
}

#[test]
fn every_setting_can_be_written() {
    let etc = Etc::with(
        r#"
        [hypervisor.qemu]
        path = "/usr/bin/qemu-system-x86_64"
        kernel = "/k"
        initrd = "/i"
        machine_type = "microvm"
        kernel_params = "  quiet  foo=\"a b\" "
        default_vcpus = 2
        default_memory = 256
        shared_fs = "none"
        virtio_fs_daemon = "/v"
        virtio_fs_cache = "never"
        virtio_fs_extra_args = ["--thread-pool-size=1"]
        enable_debug = true
        seccomp_sandbox = ""
        [agent.kata]
        enable_debug = true
        debug_console_enabled = true
        create_container_timeout = 60
        dial_timeout_ms = 100
        reconnect_timeout_ms = 5000
        kernel_modules = ["loop"]
        [runtime]
        hypervisor_name = "qemu"
        accelerator = "tcg"
        uid_range = "5000-5999"
        log_level = "warn"
        disable_guest_seccomp = true
        enable_debug = true
        "#,
    );
    let config = etc.load(&[]).unwrap();
    let qemu = &config.hypervisor.qemu;
    assert_eq!(qemu.machine_type, MachineType::Microvm);
    assert_eq!(*qemu.kernel_params, ["quiet", "foo=\"a b\""]);
    assert_eq!(qemu.vcpus(8), 2);
    assert_eq!(qemu.initrd.as_deref(), Some(Path::new("/i")));
    assert_eq!(config.agent.kata.reconnect_bound().as_millis(), 5000);
    assert_eq!(config.agent.kata.create_container_bound().as_secs(), 60);
    assert_eq!(config.runtime.hypervisor_name, HypervisorChoice::Qemu);
    assert_eq!(config.runtime.accelerator, AcceleratorChoice::Tcg);
    assert_eq!(config.runtime.uid_range.count(), 1000);
    assert_eq!(config.runtime.effective_log_level(), LogLevel::Debug);
}

#[test]
fn all_faults_of_all_layers_are_reported_at_once() {
    let etc = Etc::with(
        "[hypervisor.qemu]\n\
         default_memry = 512\n\
         default_memory = \"much\"\n\
         machine_type = \"q36\"\n\
         enable_iommu = true\n\
         initrd = \"/a\"\n\
         image = \"/b\"\n\
         [runtime]\n\
         uid_range = \"0-5\"\n",
    );
    etc.write("config.d/10.toml", "[agent.kata]\ndial_timeout_ms = 0\nkernel_modules = [1]\n");
    etc.write("config.d/20.toml", "[agent.kata]\nenable_debug = = 1\n");
    assert_eq!(
        faults(&etc, &["runtime.acelerator=tcg", "nonsense", "hypervisor.qemu.default_vcpus=256"]),
        [
            "configuration.toml:2: hypervisor.qemu.default_memry: unknown key; did you mean hypervisor.qemu.default_memory?",
            "configuration.toml:3: hypervisor.qemu.default_memory: expected integer, found string",
            "configuration.toml:4: hypervisor.qemu.machine_type: \"q36\" is not one of q35, microvm; did you mean \"q35\"?",
            "configuration.toml:5: hypervisor.qemu.enable_iommu: not carried out by this version; remove it or set it to false",
            "configuration.toml:9: runtime.uid_range: the range must not hold user 0",
            "config.d/10.toml:2: agent.kata.dial_timeout_ms: must be from 1 to 600000",
            "config.d/10.toml:3: agent.kata.kernel_modules: expected string, found integer",
            "config.d/20.toml:2: not valid TOML: extra `=`, expected nothing",
            "--set: runtime.acelerator: unknown key; did you mean runtime.accelerator?",
            "--set: \"nonsense\" is not of the form key.path=value",
            "--set: hypervisor.qemu.default_vcpus: must be a decimal number up to 255",
            "configuration.toml:6: hypervisor.qemu.initrd: excludes hypervisor.qemu.image (set by configuration.toml:7); \
             set one of them to \"\"",
        ]
    );
}

#[test]
fn later_layers_win_and_drop_ins_are_read_by_name() {
    let etc =
        Etc::with("[hypervisor.qemu]\ndefault_memory = 512\ndefault_vcpus = 3\nkernel_params = \"a\"\n");
    etc.write("config.d/20-more.toml", "[hypervisor.qemu]\ndefault_memory = 2000\n");
    etc.write("config.d/10-less.toml", "[hypervisor.qemu]\ndefault_memory = 100\nkernel_params = \"b\"\n");
    etc.write("config.d/30-ignored.toml.bak", "not toml at all");
    let config = etc.load(&[]).unwrap();
    assert_eq!(config.hypervisor.qemu.default_memory, 2000);
    assert_eq!(*config.hypervisor.qemu.kernel_params, ["b"]);
    assert_eq!(config.hypervisor.qemu.default_vcpus, 3.0);
    let config =
        etc.load(&["hypervisor.qemu.default_memory=300", "hypervisor.qemu.default_memory=400"]).unwrap();
    assert_eq!(config.hypervisor.qemu.default_memory, 400);
}

#[test]
fn drop_ins_are_found_beside_a_link_and_beside_its_target() {
    let target = Etc::with("");
    target.write("config.d/a.toml", "[hypervisor.qemu]\ndefault_memory = 1000\ndefault_vcpus = 2\n");
    let link = Etc::with("");
    std::fs::remove_file(link.path("configuration.toml")).unwrap();
    std::os::unix::fs::symlink(target.path("configuration.toml"), link.path("configuration.toml")).unwrap();
    link.write("config.d/a.toml", "[hypervisor.qemu]\ndefault_memory = 1001\n");
    let config = link.load(&[]).unwrap();
    assert_eq!((config.hypervisor.qemu.default_memory, config.hypervisor.qemu.default_vcpus), (1001, 2.0));
}

#[test]
fn an_image_given_over_an_initrd_can_take_it_back() {
    let etc = Etc::with("[hypervisor.qemu]\ninitrd = \"/a\"\n");
    assert!(etc.load(&["hypervisor.qemu.image=/b"]).is_err());
    let config = etc.load(&["hypervisor.qemu.image=/b", "hypervisor.qemu.initrd="]).unwrap();
    assert_eq!(config.hypervisor.qemu.initrd, None);
}

#[test]
fn overrides_take_toml_values_tables_and_bare_strings() {
    let etc = Etc::with("");
    let config = etc
        .load(&[
            "runtime.hypervisor_name=qemu",
            "hypervisor.qemu.kernel_params=init=/x mitigations=off",
            "hypervisor.qemu.virtio_fs_extra_args=[\"-o\", \"x=y\"]",
            "hypervisor.qemu={ default_memory = 640, default_vcpus = 0.5 }",
            "runtime.uid_range=\"7-9\"",
        ])
        .unwrap();
    let qemu = &config.hypervisor.qemu;
    assert_eq!(*qemu.kernel_params, ["init=/x", "mitigations=off"]);
    assert_eq!(qemu.virtio_fs_extra_args, ["-o", "x=y"]);
    assert_eq!((qemu.default_memory, qemu.vcpus(4)), (640, 1));
    assert_eq!(config.runtime.uid_range, UidRange { first: 7, last: 9 });
}

#[test]
fn an_override_with_a_broken_value_names_its_key() {
    let etc = Etc::with("");
    let lines =
        faults(&etc, &["hypervisor.qemu.kernel_params=\"open", "hypervisor.qemu=3", "runtime.log_level="]);
    assert!(lines[0].starts_with("--set: hypervisor.qemu.kernel_params: not valid TOML: "), "{lines:?}");
    assert_eq!(lines[1], "--set: hypervisor.qemu: expected table, found integer");
    assert_eq!(lines[2], "--set: runtime.log_level: \"\" is not one of error, warn, info, debug, trace");
}

#[test]
fn a_right_key_in_a_wrong_section_is_recognised() {
    let lines = faults(&Etc::with("[runtime]\nkernel_modules = []\n[hypervisr.qemu]\npath = \"/x\"\n"), &[]);
    assert_eq!(
        lines,
        [
            "configuration.toml:2: runtime.kernel_modules: unknown key; did you mean agent.kata.kernel_modules?",
            "configuration.toml:3: hypervisr: unknown key; did you mean hypervisor?",
        ]
    );
}

#[test]
fn a_key_like_no_other_gets_no_suggestion() {
    assert_eq!(faults(&Etc::with("zzzzzzzz = 1\n"), &[]), ["configuration.toml:1: zzzzzzzz: unknown key"]);
}

#[test]
fn a_section_of_an_absent_driver_is_checked_and_noted_once() {
    let etc =
        Etc::with("[hypervisor.clh]\npath = \"/x\"\ndefault_memory = 1024\nconfidential_guest = true\n");
    let reading = etc.read();
    assert_eq!(reading.config, Config::default());
    let notes: Vec<String> = reading.notes.iter().map(|note| note.key.clone()).collect();
    assert_eq!(notes, ["hypervisor.clh"]);
    assert!(reading.into_config().is_ok());
    let lines = faults(&Etc::with("[hypervisor.clh]\ndefault_memry = 1\ndefault_memory = \"x\"\n"), &[]);
    assert_eq!(
        lines,
        [
            "configuration.toml:2: hypervisor.clh.default_memry: unknown key; did you mean hypervisor.clh.default_memory?",
            "configuration.toml:3: hypervisor.clh.default_memory: expected integer, found string",
        ]
    );
}

#[test]
fn choosing_an_absent_driver_is_read_and_not_carried_out() {
    let etc = Etc::with("[runtime]\nhypervisor_name = \"dragonball\"\n");
    assert_eq!(etc.read().config, Config::default());
    assert_eq!(
        faults(&etc, &[]),
        [
            "configuration.toml:2: runtime.hypervisor_name: \"dragonball\" is not carried out by this version, which knows auto, \
             qemu, builtin, cloud-hypervisor, clh, firecracker, fc"
        ]
    );
    assert!(etc.load(&["runtime.hypervisor_name=qemu"]).is_ok());
}

#[test]
fn section_of_the_chosen_driver_wins_over_that_of_qemu_but_not_over_a_later_override() {
    let etc = Etc::with(
        "[hypervisor.clh]\npath = \"/opt/clh\"\ndefault_memory = 1024\ndefault_vcpus = 3\n\
         [hypervisor.qemu]\npath = \"/opt/qemu\"\ndefault_memory = 512\nmemory_slots = 3\n\
         [runtime]\nhypervisor_name = \"clh\"\n",
    );
    let config = etc.load(&["hypervisor.qemu.default_vcpus=2"]).unwrap();
    let qemu = &config.hypervisor.qemu;
    assert_eq!((qemu.default_memory, qemu.default_vcpus, qemu.memory_slots), (1024, 2.0, 3));
    assert_eq!(config.hypervisor.cloud_hypervisor.path, Some("/opt/clh".into()));
    assert_eq!(qemu.path, Some("/opt/qemu".into()));
    let text = toml::to_string(&config).unwrap();
    assert_eq!(Reading::of_text(Path::new("again"), &text).unwrap().config, config, "{text}");

    let config = etc.load(&["runtime.hypervisor_name=qemu"]).unwrap();
    assert_eq!(config.hypervisor.qemu.default_memory, 512);
    assert_eq!(config.hypervisor.cloud_hypervisor.path, None);
}

#[test]
fn annotation_wins_over_the_section_of_the_driver_that_another_one_chooses() {
    let etc = Etc::with(
        "[hypervisor.qemu]\nenable_annotations = [\"default_memory\", \"runtime.hypervisor_name\"]\n\
         [hypervisor.clh]\ndefault_memory = 1024\nmemory_slots = 3\n",
    );
    let pod = [("hypervisor.default_memory", "333"), ("runtime.hypervisor_name", "clh")];
    let config = etc.load_for(&pod).unwrap();
    assert_eq!((config.hypervisor.qemu.default_memory, config.hypervisor.qemu.memory_slots), (333, 3));
}

#[test]
fn section_of_the_driver_that_an_annotation_chooses_is_the_only_one_that_is_read() {
    let etc = Etc::with(
        "[runtime]\nhypervisor_name = \"clh\"\n\
         [hypervisor.qemu]\nenable_annotations = [\"runtime.hypervisor_name\"]\ndefault_memory = 512\ndefault_vcpus = 2\n\
         [hypervisor.clh]\npath = \"/opt/clh\"\ndefault_memory = 1024\nenable_iommu = true\n\
         [hypervisor.fc]\npath = \"/opt/fc\"\ndefault_vcpus = 3\n",
    );
    let chosen = |driver| etc.load_for(&[("runtime.hypervisor_name", driver)]);
    let hypervisor = chosen("fc").unwrap().hypervisor;
    assert_eq!((hypervisor.qemu.default_memory, hypervisor.qemu.default_vcpus), (512, 3.0));
    assert_eq!(hypervisor.firecracker.path, Some("/opt/fc".into()));
    assert_eq!(hypervisor.cloud_hypervisor.path, None);
    let hypervisor = chosen("qemu").unwrap().hypervisor;
    assert_eq!((hypervisor.qemu.default_memory, hypervisor.qemu.default_vcpus), (512, 2.0));
    let refused = chosen("clh").unwrap_err().to_string();
    assert!(refused.contains("hypervisor.clh.enable_iommu: not carried out"), "{refused}");
}

#[test]
fn section_of_a_driver_opens_nothing_to_the_pod_that_chooses_it() {
    let etc = Etc::with(
        "[hypervisor.qemu]\nenable_annotations = [\"runtime.hypervisor_name\"]\n\
         [hypervisor.fc]\nenable_annotations = [\".*\"]\n",
    );
    let pod = [("runtime.hypervisor_name", "fc"), ("hypervisor.default_memory", "512")];
    let refused = etc.load_for(&pod).unwrap_err().to_string();
    assert!(refused.contains("hypervisor.qemu.default_memory: pods may not set it"), "{refused}");
}

#[test]
fn fault_in_the_section_of_the_chosen_driver_is_told_once() {
    let etc = Etc::with("[hypervisor.clh]\nkernel_params = 'a=\"b'\n[runtime]\nhypervisor_name = \"clh\"\n");
    let told = faults(&etc, &[]);
    assert!(told.len() == 1 && told[0].contains(":2: hypervisor.clh.kernel_params: "), "{told:?}");
}

#[test]
fn section_of_the_chosen_driver_is_held_to_what_is_carried_out() {
    let etc = Etc::with(
        "[hypervisor.firecracker]\njailer_path = \"/opt/jailer\"\nqueue_size = 3\n[runtime]\nhypervisor_name = \"fc\"\n",
    );
    assert_eq!(
        faults(&etc, &[]),
        [
            "configuration.toml:2: hypervisor.firecracker.jailer_path: not carried out by this version; remove it or set it to \"\""
        ]
    );
    assert!(etc.load(&["runtime.hypervisor_name=clh"]).is_ok());
}

#[test]
fn a_planned_key_is_noted_where_it_asks_for_nothing_and_the_last_layer_decides() {
    let etc = Etc::with("[hypervisor.qemu]\nenable_iommu = true\ndefault_bridges = 1\nqueue_size = 3\n");
    assert_eq!(
        faults(&etc, &[]),
        [
            "configuration.toml:2: hypervisor.qemu.enable_iommu: not carried out by this version; remove it or set it to false"
        ]
    );
    etc.write("config.d/off.toml", "[hypervisor.qemu]\nenable_iommu = false\n");
    assert!(etc.load(&[]).is_ok());
    let notes: Vec<String> = etc.read().notes.iter().map(|note| note.key.clone()).collect();
    assert_eq!(
        notes,
        ["hypervisor.qemu.default_bridges", "hypervisor.qemu.queue_size", "hypervisor.qemu.enable_iommu"]
    );
}

#[test]
fn a_switch_that_is_on_by_default_may_not_be_off() {
    let lines = faults(&Etc::with("[hypervisor.qemu]\ndisable_guest_selinux = false\n"), &[]);
    assert!(lines[0].ends_with("not carried out by this version; remove it or set it to true"), "{lines:?}");
}

#[test]
fn a_named_file_that_is_absent_is_an_error() {
    let error = load(Path::new("/nonexistent/configuration.toml"), &[]).unwrap_err();
    assert!(matches!(error.0[0].fault, Fault::Unreadable(_)));
    assert!(
        error.to_string().contains("/nonexistent/configuration.toml: cannot be read: No such file"),
        "{error}"
    );
}

#[test]
fn relative_paths_and_nul_are_refused() {
    let lines =
        faults(&Etc::with("[hypervisor.qemu]\npath = \"qemu\"\nseccomp_sandbox = \"a\\u0000\"\n"), &[]);
    assert_eq!(
        lines,
        [
            "configuration.toml:2: hypervisor.qemu.path: qemu is not an absolute path",
            "configuration.toml:3: hypervisor.qemu.seccomp_sandbox: holds a NUL character",
        ]
    );
}

#[test]
fn vcpus_round_up_and_stay_within_the_host() {
    let count = |text: &str, host| {
        let config = Etc::with("").load(&[&format!("hypervisor.qemu.default_vcpus={text}")]).unwrap();
        config.hypervisor.qemu.vcpus(host)
    };
    assert_eq!(count("0", 4), 1);
    assert_eq!(count("1.2", 4), 2);
    assert_eq!(count("3", 4), 3);
    assert_eq!(count("99", 4), 4);
    assert_eq!(count("-1", 4), 4);
    assert_eq!(count("2", 0), 1);
}

#[test]
fn templates_hinder_no_pod_whatever_runs_it_and_have_an_absolute_path() {
    let etc = Etc::with("[hypervisor.qemu.factory]\nenable_template = true\n");
    for other in ["runtime.hypervisor_name=qemu", "hypervisor.qemu.enable_hugepages=true"] {
        let config = etc.load(&[other]).unwrap();
        assert!(config.hypervisor.qemu.factory.enable_template);
        assert_eq!(config.hypervisor.qemu.factory.template_path, Path::new("/run/vc/vm/template"));
    }
    let [fault] = &faults(&etc, &["hypervisor.qemu.factory.template_path=here"])[..] else { panic!() };
    assert!(fault.contains("template_path") && fault.ends_with("is not an absolute path"), "{fault}");
}

const EXTENSION: &str = r#"
    [[hypervisor.qemu.guest_extension_images]]
    name = "coco"
    path = "/opt/extension.img"
    verity_params = "root_hash=00"
"#;

#[test]
fn extension_images_are_read_and_written_back() {
    let etc = Etc::with(EXTENSION);
    let config = etc.load(&[]).unwrap();
    let [image] = config.hypervisor.qemu.guest_extension_images.as_slice() else { panic!("{config:?}") };
    assert_eq!((image.name.as_str(), image.path.as_path()), ("coco", Path::new("/opt/extension.img")));
    assert_eq!(image.verity_params, "root_hash=00");
    etc.write("again.toml", &toml::to_string(&config).unwrap());
    assert_eq!(load(&etc.path("again.toml"), &[]).unwrap(), config);
}

#[test]
fn extension_image_with_a_fault_is_refused_and_the_fault_is_named() {
    for (from, to, words) in [
        ("name = \"coco\"", "name = \"../x\"", "name: \"../x\" is not"),
        ("name = \"coco\"", "name = \"a-name-too-long\"", "is not 1 to 10"),
        ("name = \"coco\"", "", "an image has no name"),
        ("path = \"/opt", "path = \"opt", "is not an absolute path"),
        ("verity_params", "verity", "\"verity\" is no key of an image"),
    ] {
        let text = faults(&Etc::with(&EXTENSION.replace(from, to)), &[]).join("\n");
        assert!(text.contains(words) && text.contains("guest_extension_images"), "{text}");
    }
    let text = faults(&Etc::with(&EXTENSION.repeat(2)), &[]).join("\n");
    assert!(text.contains("two images have the name \"coco\""), "{text}");
}

/// What a confidential machine needs, each on a line.
const CONFIDENTIAL: &str = "[hypervisor.qemu]\nconfidential_guest = true\nsev_snp_guest = true\nfirmware = \"/ovmf\"\n\
    shared_fs = \"none\"\n[runtime]\nstatic_sandbox_resource_mgmt = true\n";

#[test]
fn confidential_machine_is_of_the_kind_that_is_asked_for() {
    let config = Etc::with(CONFIDENTIAL).load(&[]).unwrap();
    assert_eq!(config.hypervisor.qemu.tee(), Some(Tee::SevSnp));
    let config = Etc::with(CONFIDENTIAL).load(&["hypervisor.qemu.sev_snp_guest=false"]).unwrap();
    assert_eq!(config.hypervisor.qemu.tee(), Some(Tee::Tdx));
    assert_eq!(Config::default().hypervisor.qemu.tee(), None);
}

#[test]
fn what_no_confidential_machine_has_keeps_pods_from_being_made_and_says_what_to_set() {
    let told = |set: &str| faults(&Etc::with(CONFIDENTIAL), &[set]).join("\n");
    for (set, next) in [
        ("hypervisor.qemu.shared_fs=virtio-fs", "set hypervisor.qemu.shared_fs to \"none\""),
        ("hypervisor.qemu.machine_type=microvm", "set hypervisor.qemu.machine_type to \"q35\""),
        ("hypervisor.qemu.firmware=\"\"", "set hypervisor.qemu.firmware"),
        ("runtime.static_sandbox_resource_mgmt=false", "set runtime.static_sandbox_resource_mgmt to true"),
        (
            "hypervisor.qemu.reclaim_guest_freed_memory=true",
            "set hypervisor.qemu.reclaim_guest_freed_memory to false",
        ),
        ("hypervisor.qemu.enable_hugepages=true", "set hypervisor.qemu.enable_hugepages to false"),
    ] {
        let text = told(set);
        assert!(text.contains("hypervisor.qemu.confidential_guest") && text.ends_with(next), "{set}: {text}");
    }
    let text = told("hypervisor.qemu.confidential_guest=false");
    assert!(
        text.contains("hypervisor.qemu.sev_snp_guest") && text.ends_with("confidential_guest to true"),
        "{text}"
    );
}
