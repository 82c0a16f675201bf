use super::*;

fn request() -> Request {
    Request { name: "web".to_owned(), ..Request::default() }
}

fn image() -> ProcessDefaults {
    ProcessDefaults {
        user: None,
        env: Some(vec!["PATH=/bin".to_owned(), "A=image".to_owned()]),
        entrypoint: Some(vec!["/entry".to_owned()]),
        cmd: Some(vec!["default".to_owned()]),
        working_dir: Some("/work".to_owned()),
        stop_signal: Some("SIGQUIT".to_owned()),
    }
}

fn made(request: &Request, image: &ProcessDefaults) -> Result<Value, BundleError> {
    spec(Path::new("/bundle"), request, image, &RootStack::default())
        .map(|spec| serde_json::to_value(spec).unwrap())
}

fn process(request: &Request, image: &ProcessDefaults) -> Value {
    made(request, image).unwrap()["process"].clone()
}

#[test]
fn the_command_replaces_the_images_and_is_given_to_the_entry_point() {
    assert_eq!(process(&request(), &image())["args"], json!(["/entry", "default"]));
    let given = Request { command: vec!["-v".into(), "x".into()], ..request() };
    assert_eq!(process(&given, &image())["args"], json!(["/entry", "-v", "x"]));
    assert_eq!(process(&given, &ProcessDefaults::default())["args"], json!(["-v", "x"]));
    assert!(matches!(made(&request(), &ProcessDefaults::default()), Err(BundleError::NoCommand)));
}

#[test]
fn variables_of_the_user_win_over_those_of_the_image_and_those_over_defaults() {
    let given = Request { env: vec!["A=user".into(), "B=x=y".into(), "KATA_TEST_UNSET".into()], ..request() };
    let env = process(&given, &image())["env"].clone();
    assert_eq!(env, json!(["HOSTNAME=web", "PATH=/bin", "A=user", "B=x=y", "HOME=/"]));
    let env = process(
        &Request { terminal: true, command: vec!["x".into()], ..request() },
        &ProcessDefaults::default(),
    );
    let env: Vec<&str> = env["env"].as_array().unwrap().iter().map(|entry| entry.as_str().unwrap()).collect();
    assert!(env.contains(&PATH) && env.iter().any(|entry| entry.starts_with("TERM=")), "{env:?}");
    assert!(matches!(extend_env(&mut vec![], &["=x".into()]), Err(BundleError::Environment(_))));
}

#[test]
fn a_variable_without_a_value_is_taken_from_here() {
    let mut env = vec!["CARGO_MANIFEST_DIR=old".to_owned()];
    extend_env(&mut env, &["CARGO_MANIFEST_DIR".to_owned()]).unwrap();
    assert_eq!(env, [format!("CARGO_MANIFEST_DIR={}", std::env::var("CARGO_MANIFEST_DIR").unwrap())]);
}

#[test]
fn the_working_directory_is_the_users_then_the_images_then_the_root() {
    let cwd = |request: &Request, image: &ProcessDefaults| process(request, image)["cwd"].clone();
    assert_eq!(cwd(&Request { workdir: Some("/u".into()), ..request() }, &image()), "/u");
    assert_eq!(cwd(&request(), &image()), "/work");
    let empty = ProcessDefaults { working_dir: Some(String::new()), ..image() };
    assert_eq!(cwd(&request(), &empty), "/");
    let relative = made(&Request { workdir: Some("u".into()), ..request() }, &image());
    assert!(matches!(relative, Err(BundleError::WorkingDirectory(_))));
}

#[test]
fn the_user_of_the_flags_wins_over_the_images() {
    let image = ProcessDefaults { user: Some("5:6".into()), ..image() };
    let user = process(&request(), &image)["user"].clone();
    assert_eq!((user["uid"].clone(), user["gid"].clone()), (json!(5), json!(6)));
    let user = process(&Request { user: Some("7".into()), ..request() }, &image)["user"].clone();
    assert_eq!((user["uid"].clone(), user["gid"].clone()), (json!(7), json!(0)));
}

#[test]
fn a_container_has_the_expected_confinement() {
    let spec = made(&request(), &image()).unwrap();
    let capabilities = &spec["process"]["capabilities"];
    for set in ["bounding", "effective", "permitted"] {
        let names: Vec<&str> =
            capabilities[set].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
        assert_eq!(names.len(), CAPABILITIES.len(), "{set}");
        assert!(!names.contains(&"CAP_SYS_ADMIN") && !names.contains(&"CAP_SYS_MODULE"));
    }
    let none = |set: &str| capabilities[set].as_array().is_none_or(Vec::is_empty);
    assert!(none("inheritable") && none("ambient"));
    let linux = &spec["linux"];
    assert_eq!(linux["maskedPaths"], json!(MASKED));
    assert_eq!(linux["readonlyPaths"], json!(READ_ONLY));
    assert_eq!(linux["seccomp"]["defaultAction"], "SCMP_ACT_ALLOW");
    let namespaces: Vec<&Value> =
        linux["namespaces"].as_array().unwrap().iter().map(|ns| &ns["type"]).collect();
    assert_eq!(namespaces, ["pid", "ipc", "uts", "mount", "cgroup"], "the network is the guest's");
}

#[test]
fn flags_are_carried_over() {
    let spec = made(&Request { read_only: true, terminal: true, ..request() }, &image()).unwrap();
    assert_eq!(
        (spec["root"]["readonly"].clone(), spec["process"]["terminal"].clone()),
        (json!(true), json!(true))
    );
    assert_eq!((spec["hostname"].clone(), spec["root"]["path"].clone()), (json!("web"), json!("rootfs")));
    assert_eq!(spec["annotations"], json!({ STOP_SIGNAL: "SIGQUIT" }));
}

#[test]
fn the_size_of_the_terminal_is_given_where_it_is_known() {
    let sized = Request { terminal: true, size: Some((111, 33)), ..request() };
    assert_eq!(process(&sized, &image())["consoleSize"], json!({ "height": 33, "width": 111 }));
    let unknown = Request { terminal: true, ..request() };
    assert!(process(&unknown, &image()).get("consoleSize").is_none());
}

#[test]
fn volumes_are_bind_mounts_and_replace_the_files_that_are_made() {
    let volume = Volume { source: "/src".into(), destination: "/etc/hosts".into(), read_only: true };
    let spec = made(&Request { volumes: vec![volume], ..request() }, &image()).unwrap();
    let binds: Vec<Value> =
        spec["mounts"].as_array().unwrap().iter().filter(|mount| mount["type"] == "bind").cloned().collect();
    assert_eq!(binds.len(), 2);
    assert_eq!(binds[0]["source"], "/bundle/hostname");
    assert_eq!(
        (&binds[1]["source"], &binds[1]["options"]),
        (&json!("/src"), &json!(["rbind", "rprivate", "ro"]))
    );
}

#[test]
fn the_bundle_is_written_whole_and_read_back_for_an_exec() {
    let dir = tempfile::tempdir().unwrap();
    let bundle = dir.path().join("bundle");
    let stack = RootStack(vec!["/nonexistent".into()]);
    let missing = write(&bundle, &request(), &image(), &stack);
    assert!(matches!(missing, Err(BundleError::User(UserError::Read { .. }))), "{missing:?}");
    let stack = RootStack(vec![dir.path().to_owned()]);
    write(&bundle, &request(), &image(), &stack).unwrap();
    assert!(bundle.join("rootfs").is_dir());
    assert_eq!(fs::read_to_string(bundle.join("hostname")).unwrap(), "web\n");
    assert!(fs::read_to_string(bundle.join("hosts")).unwrap().contains("localhost web\n"));
    assert_eq!(RootStack::load(&bundle).unwrap().0, stack.0);
    let process = process_of(&bundle).unwrap();
    assert_eq!(process.cwd(), Path::new("/work"));
    // The owner reads it with the same types.
    Spec::load(bundle.join("config.json")).unwrap();
}

#[test]
fn the_bundle_is_for_root_alone_and_its_etc_files_are_for_everybody_inside() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let bundle = dir.path().join("bundle");
    let request = Request { name: "p".to_owned(), command: vec!["true".to_owned()], ..Request::default() };
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    write(&bundle, &request, &ProcessDefaults::default(), &RootStack::default()).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&bundle), 0o700);
    assert_eq!((mode(&bundle.join("hosts")), mode(&bundle.join("hostname"))), (0o644, 0o644));
}
