//! What a Kubernetes manifest says of a pod's containers.
//!
//! | in the manifest | in the policy |
//! |---|---|
//! | `image` | one of the names that container runtimes tell |
//! | `command`, `args` | the command line; with `args` alone what it ends with, with neither any |
//! | `env` with a value | that value; `valueFrom`, `envFrom` and the image's own variables may be any |
//! | `$(NAME)` in any of these | what the kubelet makes of it, where that is known |
//! | `volumeMounts` | places of mounts |
//! | `securityContext` | user, capabilities, a read-only root |
//! | probes, `lifecycle` | commands that may be executed |

use serde_json::Value;

use super::GenerateError;
use super::container::Container;

/// Kinds of objects that make pods, and where in them the pod's template is.
const TEMPLATES: [(&str, &str); 8] = [
    ("Pod", "/spec"),
    ("CronJob", "/spec/jobTemplate/spec/template/spec"),
    ("DaemonSet", "/spec/template/spec"),
    ("Deployment", "/spec/template/spec"),
    ("Job", "/spec/template/spec"),
    ("ReplicaSet", "/spec/template/spec"),
    ("ReplicationController", "/spec/template/spec"),
    ("StatefulSet", "/spec/template/spec"),
];

/// The containers of the one pod in a manifest, that of the pod itself first.
pub fn containers(file: &str, text: &str) -> Result<Vec<Container>, GenerateError> {
    let options = serde_saphyr::options! { with_snippet: false };
    let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|source| GenerateError::Yaml { file: file.to_owned(), source: Box::new(source) })?;
    let mut pods = Vec::new();
    for document in &documents {
        find(document, &mut pods);
    }
    let spec = match pods.as_slice() {
        [] => return Err(GenerateError::NoPod { file: file.to_owned() }),
        [(_, spec)] => spec,
        several => {
            let names = several.iter().map(|(name, _)| name.clone()).collect();
            return Err(GenerateError::Pods { file: file.to_owned(), names });
        }
    };
    let of_pod = spec.get("securityContext").unwrap_or(&Value::Null);
    let mut found = vec![Container::pause()];
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for one in items(spec, list) {
            found.push(container(one, of_pod)?);
        }
    }
    Ok(found)
}

fn find<'a>(document: &'a Value, pods: &mut Vec<(String, &'a Value)>) {
    let kind = text(document, "kind").unwrap_or_default();
    if kind == "List" {
        items(document, "items").for_each(|item| find(item, pods));
    }
    let template = TEMPLATES.iter().find(|(name, _)| *name == kind);
    if let Some(spec) = template.and_then(|(_, place)| document.pointer(place)) {
        let name = document.get("metadata").and_then(|metadata| text(metadata, "name"));
        pods.push((format!("{kind} {}", name.unwrap_or("without a name")), spec));
    }
}

fn container(one: &Value, of_pod: &Value) -> Result<Container, GenerateError> {
    let name = text(one, "name")
        .ok_or_else(|| GenerateError::Part { of: "a container".to_owned(), what: "it has no name" })?;
    let fault = |what| GenerateError::Part { of: format!("container {name}"), what };
    let variables = Variables::of(one);
    let words =
        |key: &'static str, wrong: &'static str| -> Result<Option<Vec<Option<String>>>, GenerateError> {
            let Some(list) = one.get(key).filter(|list| !list.is_null()) else { return Ok(None) };
            let list = list.as_array().ok_or_else(|| fault(wrong))?;
            let word =
                |word: &Value| word.as_str().map(|word| variables.expanded(word)).ok_or_else(|| fault(wrong));
            list.iter().map(word).collect::<Result<Vec<_>, _>>().map(Some)
        };
    let args = words("args", "args is not a list of strings")?;
    let command = words("command", "command is not a list of strings")?.filter(|words| !words.is_empty());
    let mut expected = Container::named(name);
    expected.images = text(one, "image").map(image_names).unwrap_or_default();
    match command {
        Some(command) => {
            expected.command = Some(command.into_iter().chain(args.unwrap_or_default()).collect())
        }
        None => expected.arguments = args.filter(|args| !args.is_empty()),
    }
    expected.env = variables.known();
    let mounts = items(one, "volumeMounts").filter_map(|mount| text(mount, "mountPath"));
    expected.may_mount(mounts.map(|path| match path.trim_end_matches('/') {
        "" => "/".to_owned(),
        path => path.to_owned(),
    }));
    secure(&mut expected, one.get("securityContext").unwrap_or(&Value::Null), of_pod);
    expected.commands = commands(one);
    expected.stdin = one.get("stdin").and_then(Value::as_bool).unwrap_or(false);
    Ok(expected)
}

fn secure(expected: &mut Container, own: &Value, of_pod: &Value) {
    let flag = |key: &str| own.get(key).and_then(Value::as_bool).unwrap_or(false);
    expected.uid = own.get("runAsUser").or_else(|| of_pod.get("runAsUser")).and_then(Value::as_i64);
    expected.read_only = flag("readOnlyRootFilesystem");
    let added = own.pointer("/capabilities/add").and_then(Value::as_array);
    expected.may_have(added.into_iter().flatten().filter_map(Value::as_str));
    if flag("privileged") {
        expected.may_have(["ALL"].into_iter());
    }
}

/// The commands of probes and of hooks.
fn commands(one: &Value) -> Vec<Vec<String>> {
    const PLACES: [&str; 5] = [
        "/livenessProbe/exec/command",
        "/readinessProbe/exec/command",
        "/startupProbe/exec/command",
        "/lifecycle/postStart/exec/command",
        "/lifecycle/preStop/exec/command",
    ];
    let words = |list: &Value| {
        let words = list.as_array()?.iter().filter_map(Value::as_str).map(str::to_owned);
        Some(words.collect::<Vec<_>>())
    };
    let mut found: Vec<_> = PLACES.iter().filter_map(|place| one.pointer(place)).filter_map(words).collect();
    found.sort();
    found.dedup();
    found
}

/// Variables in the order of the manifest; `None` is a value that only the cluster knows.
struct Variables<'a>(Vec<(&'a str, Option<String>)>);

impl<'a> Variables<'a> {
    fn of(one: &'a Value) -> Self {
        let mut known = Self(Vec::new());
        for entry in items(one, "env") {
            let Some(name) = text(entry, "name") else { continue };
            let value = if entry.get("valueFrom").is_some() {
                None
            } else {
                known.expanded(text(entry, "value").unwrap_or_default())
            };
            known.0.retain(|(other, _)| *other != name);
            known.0.push((name, value));
        }
        known
    }

    /// Those with a value that is known.
    fn known(&self) -> Vec<String> {
        let known = self.0.iter().filter_map(|(name, value)| Some(format!("{name}={}", value.as_ref()?)));
        known.collect()
    }

    /// What the kubelet makes of a text: `$(NAME)` is the variable's value and `$$` a dollar sign. `None` where it names one that
    /// nobody knows here.
    fn expanded(&self, text: &str) -> Option<String> {
        let (mut done, mut rest) = (String::new(), text);
        while let Some((before, after)) = rest.split_once('$') {
            done.push_str(before);
            if let Some(after) = after.strip_prefix('$') {
                done.push('$');
                rest = after;
                continue;
            }
            let Some((name, after)) = after.strip_prefix('(').and_then(|name| name.split_once(')')) else {
                done.push('$');
                rest = after;
                continue;
            };
            match self.0.iter().find(|(known, _)| *known == name) {
                Some((_, value)) => done.push_str(value.as_ref()?),
                // It may come from `envFrom` or be a service's: then it is replaced, otherwise left as it is.
                None => return None,
            }
            rest = after;
        }
        Some(done + rest)
    }
}

/// An image as it is written, and as container runtimes call it.
fn image_names(image: &str) -> Vec<String> {
    let (path, digest) = image.split_once('@').map_or((image, None), |(path, digest)| (path, Some(digest)));
    let has_host =
        path.split_once('/').is_some_and(|(host, _)| host.contains(['.', ':']) || host == "localhost");
    let full = match (has_host, path.contains('/')) {
        (true, _) => path.to_owned(),
        (false, true) => format!("docker.io/{path}"),
        (false, false) => format!("docker.io/library/{path}"),
    };
    let tagged = full.rsplit('/').next().is_some_and(|name| name.contains(':'));
    let full = match digest {
        Some(digest) => format!("{full}@{digest}"),
        None if tagged => full,
        None => format!("{full}:latest"),
    };
    let mut names = vec![image.to_owned(), full];
    names.dedup();
    names
}

fn items<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key).and_then(Value::as_str)
}
