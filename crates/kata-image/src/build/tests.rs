use super::elf::tests::{Section, elf_with, pvh_kernel};
use super::*;

const FACTS: &[u8] = b"{\"version\":\"0.1.0\",\"announces\":true}\0\0";

struct Scene {
    dir: tempfile::TempDir,
    builder: ImageBuilder,
}

/// A builder over a synthetic kernel and an agent with the given facts.
fn scene(facts: Option<&[u8]>) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let sections: Vec<Section> =
        facts.iter().map(|facts| Section { name: program::SECTION, data: facts.to_vec() }).collect();
    fs::write(at("agent"), elf_with(&[1], b"code", &sections)).unwrap();
    fs::write(at("kernel"), pvh_kernel("Linux version 6.12.1 ")).unwrap();
    let builder = ImageBuilder {
        agent: at("agent"),
        kernel: KernelSource::File(at("kernel")),
        cache: at("cache"),
        output: at("image"),
        services: None,
    };
    Scene { dir, builder }
}

impl Scene {
    /// Builds and hands back the manifest and what was reported.
    fn build(&self) -> Result<(Manifest, Vec<String>), BuildError> {
        let mut lines = Vec::new();
        let manifest = self.builder.build(&mut |line| lines.push(line.to_owned()))?;
        Ok((manifest, lines))
    }
}

#[test]
fn built_image_loads_and_verifies() {
    let scene = scene(Some(FACTS));
    let (manifest, _) = scene.build().unwrap();
    assert_eq!(manifest, Manifest::load(&scene.builder.output).unwrap());
    manifest.verify().unwrap();
    assert_eq!(manifest.kernel.release, "6.12.1");
    assert!(manifest.agent.announces && manifest.agent.version == "0.1.0");
    assert!(manifest.has(capability::VSOCK) && manifest.modules.is_empty());
}

#[test]
fn image_is_readable_by_everybody_and_nothing_is_left_beside_it() {
    let scene = scene(Some(FACTS));
    scene.build().unwrap();
    scene.build().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&scene.builder.output), 0o755);
    for entry in fs::read_dir(&scene.builder.output).unwrap() {
        assert_eq!(mode(&entry.unwrap().path()), 0o644);
    }
    let mut names: Vec<_> = fs::read_dir(scene.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["agent", "cache", "image", "kernel"]);
}

#[test]
fn agent_that_asks_no_policy_is_refused_where_initdata_is_read() {
    let mut scene = scene(Some(FACTS));
    let nowhere = scene.dir.path().join("nowhere");
    scene.builder.services = Some(Services {
        guest_init: nowhere.clone(),
        initdata: nowhere.clone(),
        image_pull: None,
        units: nowhere,
        suite: "trixie".to_owned(),
        mirror: None,
    });
    let error = scene.build().unwrap_err();
    assert!(matches!(&error, BuildError::NoPolicy { agent } if *agent == scene.builder.agent), "{error}");
    // With one, it is the next thing that is missing.
    let facts = b"{\"version\":\"0.1.0\",\"announces\":true,\"policy\":true}";
    let sections = [Section { name: program::SECTION, data: facts.to_vec() }];
    fs::write(&scene.builder.agent, elf_with(&[1], b"code", &sections)).unwrap();
    assert!(matches!(scene.build().unwrap_err(), BuildError::Program(_)));
}

#[test]
fn two_builds_of_the_same_inputs_are_the_same_bytes() {
    let (one, other) = (scene(Some(FACTS)), scene(Some(FACTS)));
    let digest = |scene: &Scene| scene.build().unwrap().0.initrd.unwrap().sha256;
    assert_eq!(digest(&one), digest(&other));
}

#[test]
fn second_build_of_the_same_inputs_does_nothing() {
    let scene = scene(Some(FACTS));
    scene.build().unwrap();
    let (_, lines) = scene.build().unwrap();
    assert!(matches!(&*lines, [line] if line.ends_with("is up to date")), "{lines:?}");
}

#[test]
fn changed_agent_replaces_the_image() {
    let scene = scene(Some(FACTS));
    let (before, _) = scene.build().unwrap();
    fs::write(&scene.builder.agent, elf_with(&[1], b"other", &[])).unwrap();
    let (after, lines) = scene.build().unwrap();
    assert_ne!(before.initrd, after.initrd);
    assert!(!after.agent.announces);
    assert!(lines.iter().any(|line| line.contains("tells nothing about itself")), "{lines:?}");
}

#[test]
fn damaged_image_is_built_again() {
    let scene = scene(Some(FACTS));
    let (manifest, _) = scene.build().unwrap();
    fs::write(manifest.initrd_path().unwrap(), "damage").unwrap();
    assert!(manifest.verify().is_err());
    scene.build().unwrap().0.verify().unwrap();
}

#[test]
fn directory_with_something_else_is_not_touched() {
    let scene = scene(Some(FACTS));
    fs::create_dir(&scene.builder.output).unwrap();
    fs::write(scene.builder.output.join("thesis"), "words").unwrap();
    assert!(matches!(scene.build(), Err(BuildError::Occupied { .. })));
    assert!(scene.builder.output.join("thesis").exists());
}

#[test]
fn directory_with_a_manifest_of_something_else_is_not_touched() {
    for manifest in [r#"{"manifest_version":3,"name":"an extension"}"#, "not even JSON"] {
        let scene = scene(Some(FACTS));
        fs::create_dir(&scene.builder.output).unwrap();
        fs::write(scene.builder.output.join("manifest.json"), manifest).unwrap();
        assert!(matches!(scene.build(), Err(BuildError::Occupied { .. })), "{manifest}");
        assert_eq!(fs::read_to_string(scene.builder.output.join("manifest.json")).unwrap(), manifest);
    }
}

#[test]
fn image_with_a_stranger_beside_it_is_not_replaced() {
    let scene = scene(Some(FACTS));
    scene.build().unwrap();
    fs::write(scene.builder.output.join("notes"), "words").unwrap();
    fs::write(&scene.builder.agent, elf_with(&[1], b"other", &[])).unwrap();
    assert!(matches!(scene.build(), Err(BuildError::Occupied { .. })));
    assert!(scene.builder.output.join("notes").exists());
}

#[test]
fn empty_output_directory_is_taken() {
    let scene = scene(Some(FACTS));
    fs::create_dir(&scene.builder.output).unwrap();
    scene.build().unwrap();
}

#[test]
fn dynamic_agent_is_refused_before_anything_is_made() {
    let scene = scene(None);
    fs::write(&scene.builder.agent, elf_with(&[3], b"/lib/ld", &[])).unwrap();
    assert!(matches!(scene.build(), Err(BuildError::Program(ProgramError::Dynamic { .. }))));
    assert!(!scene.builder.cache.exists() && !scene.builder.output.exists());
}

#[test]
fn agent_with_malformed_facts_is_refused() {
    let scene = scene(Some(b"version 1"));
    assert!(matches!(scene.build(), Err(BuildError::Program(ProgramError::Facts { .. }))));
}
