use kata_api::agent::{
    CopyFileRequest, CreateContainerRequest, StringUser, UpdateInterfaceRequest, WriteStreamRequest,
};
use kata_api::{oci, types};
use proptest::prelude::*;
use protobuf::{Message, MessageField};

use super::*;

fn seen(method: &str, message: &impl Message) -> Request {
    Request::of(&format!("grpc.AgentService/{method}"), &message.write_to_bytes().unwrap()).unwrap()
}

#[test]
fn every_method_of_the_agent_has_a_shape_and_health_has_none() {
    let names: BTreeMap<&str, &str> =
        shapes().iter().map(|(method, shape)| (method.as_str(), shape.name())).collect();
    assert_eq!(names["grpc.AgentService/CreateContainer"], "CreateContainerRequest");
    assert_eq!(names["grpc.AgentService/ReadStderr"], "ReadStreamRequest");
    assert_eq!(names["grpc.AgentService/GetGuestDetails"], "GuestDetailsRequest");
    assert_eq!(names["kata.guest.v1.Evidence/GetEvidence"], "GetEvidenceRequest");
    assert!(names.keys().any(|name| name.ends_with("/Remove")) && names.len() > 35, "{names:?}");
    assert!(!names.keys().any(|name| name.contains("Health")), "{names:?}");
    assert!(matches!(Request::of("grpc.Health/Check", &[]), Err(RequestError::Method(_))));
}

#[test]
fn container_is_seen_by_the_names_of_the_protocol_with_all_its_defaults() {
    let mut spec = oci::Spec::new();
    let mut process = oci::Process::new();
    process.args = vec!["sh".to_owned()];
    process.user = MessageField::some(oci::User { uid: 7, ..oci::User::new() });
    spec.process = MessageField::some(process);
    spec.annotations.insert("a".to_owned(), "b".to_owned());
    let user = StringUser { uid: "1".to_owned(), ..StringUser::new() };
    let request = CreateContainerRequest {
        container_id: "web".to_owned(),
        oci: MessageField::some(spec),
        string_user: MessageField::some(user),
        ..CreateContainerRequest::new()
    };
    let Request { name, input } = seen("CreateContainer", &request);
    assert_eq!((name.as_str(), &input["container_id"]), ("CreateContainerRequest", &json!("web")));
    assert_eq!(input["OCI"]["Process"]["Args"], json!(["sh"]));
    assert_eq!(input["OCI"]["Process"]["User"]["UID"], json!(7));
    assert_eq!(input["OCI"]["Process"]["Terminal"], json!(false));
    assert_eq!(input["OCI"]["Process"]["Cwd"], json!(""));
    assert_eq!(input["OCI"]["Annotations"], json!({"a": "b"}));
    assert_eq!((&input["OCI"]["Root"], &input["storages"]), (&Value::Null, &json!([])));
    assert_eq!(input["string_user"]["uid"], json!("1"));
}

#[test]
fn enumerations_are_numbers_and_types_have_their_own_name() {
    let mut interface = types::Interface::new();
    interface.type_ = "veth".to_owned();
    interface.hw_addr = "02:00".to_owned();
    let mut address = types::IPAddress::new();
    address.family = types::IPFamily::v6.into();
    interface.ip_addresses.push(address);
    let request =
        UpdateInterfaceRequest { interface: MessageField::some(interface), ..UpdateInterfaceRequest::new() };
    let Request { input, .. } = seen("UpdateInterface", &request);
    assert_eq!(input["interface"]["hwAddr"], json!("02:00"));
    assert_eq!(input["interface"]["type_"], json!("veth"));
    assert_eq!(input["interface"]["IPAddresses"][0]["family"], json!(1));
}

#[test]
fn what_is_written_is_not_seen_but_where_a_link_leads_is() {
    let mut file = CopyFileRequest::new();
    file.path = "/run/x".to_owned();
    file.data = b"/etc/shadow".to_vec();
    file.file_mode = 0o100_644;
    let input = seen("CopyFile", &file).input;
    assert_eq!((&input["path"], &input["symlink_src"]), (&json!("/run/x"), &json!("")));
    assert!(input.get("data").is_none());
    file.file_mode = 0o120_777;
    assert_eq!(seen("CopyFile", &file).input["symlink_src"], json!("/etc/shadow"));
    let mut write = WriteStreamRequest::new();
    write.data = b"hunter2".to_vec();
    write.container_id = "web".to_owned();
    let input = seen("WriteStdin", &write).input;
    assert!(input.get("data").is_none() && input["container_id"] == "web", "{input}");
}

#[test]
fn bytes_that_are_no_request_are_refused() {
    let error = Request::of("grpc.AgentService/CreateContainer", &[0xff]).unwrap_err();
    assert_eq!(error.to_string(), "the request is no CreateContainerRequest");
}

proptest! {
    #[test]
    fn whatever_comes_is_seen_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        for shape in shapes().values() {
            let _ = shape.read(&bytes);
        }
    }
}
