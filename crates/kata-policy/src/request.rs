//! A request as rules see it.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use protobuf::MessageDyn;
use protobuf::reflect::{
    FieldDescriptor, MessageDescriptor, MethodDescriptor, ReflectFieldRef, ReflectValueRef, RuntimeFieldType,
    RuntimeType,
};
use serde_json::{Map, Value, json};

/// The bytes are no message of the kind that they are said to be.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The protocol has no such method.
    #[error("the protocol has no method {0:?}")]
    Method(String),
    /// They do not parse.
    #[error("the request is no {name}")]
    Form {
        /// The message that it should be.
        name: String,
        /// Why not.
        #[source]
        source: protobuf::Error,
    },
}

/// What a method takes.
#[derive(Clone, Debug)]
pub struct Shape(MessageDescriptor);

/// A request by the name of its rule.
#[derive(Clone, Debug)]
pub struct Request {
    /// The message's name, which is that of the rule.
    pub name: String,
    /// What rules see as `input`.
    pub input: Value,
}

/// What each method of the agent takes, by `<package>.<service>/<method>`. Health is not part of it: it tells nothing and does
/// nothing, and a guest that denies everything is to be told from one that is gone.
pub fn shapes() -> &'static BTreeMap<String, Shape> {
    static SHAPES: OnceLock<BTreeMap<String, Shape>> = OnceLock::new();
    SHAPES.get_or_init(|| {
        let files = [
            kata_api::agent::file_descriptor(),
            kata_api::files::file_descriptor(),
            kata_api::evidence::file_descriptor(),
        ];
        let services = files.iter().flat_map(|file| file.services().map(|it| (file.proto().package(), it)));
        services
            .flat_map(|(package, service)| {
                let path = format!("{package}.{}", service.proto().name());
                let method = |method: MethodDescriptor| {
                    (format!("{path}/{}", method.proto().name()), Shape(method.input_type()))
                };
                service.methods().map(method).collect::<Vec<_>>()
            })
            .collect()
    })
}

impl Shape {
    /// The name of the rule.
    pub fn name(&self) -> &str {
        self.0.name()
    }

    /// Reads a request.
    ///
    /// # Errors
    /// [`RequestError::Form`].
    pub fn read(&self, bytes: &[u8]) -> Result<Request, RequestError> {
        let message = self.0.parse_from_bytes(bytes);
        let message =
            message.map_err(|source| RequestError::Form { name: self.name().to_owned(), source })?;
        Ok(Request { name: self.name().to_owned(), input: input(&*message) })
    }
}

impl Request {
    /// Reads the request of a method, as `grpc.AgentService/CreateContainer`.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn of(method: &str, bytes: &[u8]) -> Result<Self, RequestError> {
        let shape = shapes().get(method).ok_or_else(|| RequestError::Method(method.to_owned()))?;
        shape.read(bytes)
    }
}

/// The message, but for bulk that no rule looks into: of what is written to a file or a stream, rules see where it goes, and of a
/// symbolic link the target.
fn input(message: &dyn MessageDyn) -> Value {
    let mut object = object(message);
    let name = message.descriptor_dyn().name().to_owned();
    if !matches!(name.as_str(), "CopyFileRequest" | "WriteStreamRequest") {
        return Value::Object(object);
    }
    object.remove("data");
    if name == "CopyFileRequest" {
        const KIND: u64 = 0o170_000;
        const LINK: u64 = 0o120_000;
        let mode = object.get("file_mode").and_then(Value::as_u64).unwrap_or_default();
        let target = if mode & KIND == LINK { data(message) } else { String::new() };
        object.insert("symlink_src".to_owned(), Value::String(target));
    }
    Value::Object(object)
}

/// The bytes of the field `data` as text.
fn data(message: &dyn MessageDyn) -> String {
    let field = message.descriptor_dyn().field_by_name("data");
    match field.and_then(|field| field.get_singular(message)) {
        Some(ReflectValueRef::Bytes(bytes)) => String::from_utf8_lossy(bytes).into_owned(),
        _ => String::new(),
    }
}

fn object(message: &dyn MessageDyn) -> Map<String, Value> {
    let descriptor = message.descriptor_dyn();
    descriptor.fields().map(|field| (key(&field), value(message, &field))).collect()
}

/// Fields whose name in policies is the one that every field has in JSON if nothing else is said.
const IN_CAMEL_CASE: [&str; 4] = ["additionalGids", "devicePath", "hwAddr", "memHotplugProbeAddr"];

/// The name by which policies know a field: the protocol's own spelling, which our files give as `json_name` where theirs is
/// another, and for the word of Rust's what upstream's agent has made of it.
fn key(field: &FieldDescriptor) -> String {
    let (name, json) = (field.name(), field.json_name());
    match json {
        "type" => "type_".to_owned(),
        json if json == camel_case(name) && !IN_CAMEL_CASE.contains(&json) => name.to_owned(),
        json => json.to_owned(),
    }
}

fn camel_case(name: &str) -> String {
    let mut parts = name.split('_');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |mut name, part| {
        let mut rest = part.chars();
        name.extend(rest.next().map(|c| c.to_ascii_uppercase()));
        name + rest.as_str()
    })
}

fn value(message: &dyn MessageDyn, field: &FieldDescriptor) -> Value {
    match field.get_reflect(message) {
        ReflectFieldRef::Optional(optional) => match optional.value() {
            Some(value) => scalar(&value),
            None if field.proto().proto3_optional() || is_message(field) => Value::Null,
            // What was not written has its default.
            None => scalar(&field.get_singular_field_or_default(message)),
        },
        ReflectFieldRef::Repeated(items) => {
            Value::Array(items.into_iter().map(|item| scalar(&item)).collect())
        }
        ReflectFieldRef::Map(entries) => {
            let entries = entries.into_iter().map(|(key, value)| (key.to_string(), scalar(&value)));
            Value::Object(entries.collect())
        }
    }
}

fn is_message(field: &FieldDescriptor) -> bool {
    matches!(field.runtime_field_type(), RuntimeFieldType::Singular(RuntimeType::Message(_)))
}

fn scalar(value: &ReflectValueRef<'_>) -> Value {
    match value {
        ReflectValueRef::U32(number) => json!(number),
        ReflectValueRef::U64(number) => json!(number),
        ReflectValueRef::I32(number) => json!(number),
        ReflectValueRef::I64(number) => json!(number),
        ReflectValueRef::F32(number) => json!(number),
        ReflectValueRef::F64(number) => json!(number),
        ReflectValueRef::Bool(flag) => json!(flag),
        ReflectValueRef::String(text) => json!(text),
        ReflectValueRef::Bytes(bytes) => json!(bytes),
        ReflectValueRef::Enum(_, number) => json!(number),
        ReflectValueRef::Message(message) => Value::Object(object(&**message)),
    }
}

#[cfg(test)]
mod tests;
