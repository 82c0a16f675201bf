//! What a Kubernetes manifest says of a pod's containers.
//!
//! | in the manifest | in the policy |
//! |---|---|
//! | `image` | the image that the guest has to pull, by one of the names that container runtimes tell |
//! | `command`, `args` | the command line; with `args` alone what it ends with, with neither any |
//! | `env` with a value | that value; `valueFrom`, `envFrom` and the image's own variables may be any |
//! | `$(NAME)` in any of these | what the kubelet makes of it, where that is known |
//! | `workingDir` | the working directory |
//! | `volumes`, `volumeMounts`, `volumeDevices` | places of mounts and devices, and where what is there may come from |
//! | `securityContext` | user, group, capabilities, privileges, a read-only root |
//! | probes, `lifecycle` | commands that may be executed in this container |

use serde_json::Value;

use super::GenerateError;
use super::container::Container;
use super::volumes;

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
    // As kubectl reads them: `0755` is a mode.
    let options = serde_saphyr::options! { with_snippet: false, legacy_octal_numbers: true };
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
    let mut found = vec![Container::pause()];
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for one in items(spec, list) {
            found.push(container(one, spec)?);
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

fn container(one: &Value, pod: &Value) -> Result<Container, GenerateError> {
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
    let image =
        text(one, "image").filter(|image| !image.is_empty()).ok_or_else(|| fault("it has no image"))?;
    expected.images = image_names(image);
    match command {
        Some(command) => {
            expected.command = Some(command.into_iter().chain(args.unwrap_or_default()).collect())
        }
        None => expected.arguments = args.filter(|args| !args.is_empty()),
    }
    expected.env = variables.known();
    expected.cwd = text(one, "workingDir").map(str::to_owned);
    volumes::mount(&mut expected, one, pod);
    let of_pod = pod.get("securityContext").unwrap_or(&Value::Null);
    secure(&mut expected, one.get("securityContext").unwrap_or(&Value::Null), of_pod);
    expected.commands = commands(one, &variables);
    expected.stdin = one.get("stdin").and_then(Value::as_bool).unwrap_or(false);
    Ok(expected)
}

fn secure(expected: &mut Container, own: &Value, of_pod: &Value) {
    let flag = |key: &str| own.get(key).and_then(Value::as_bool).unwrap_or(false);
    let number = |key: &str| own.get(key).or_else(|| of_pod.get(key)).and_then(Value::as_i64);
    expected.uid = number("runAsUser");
    expected.gid = number("runAsGroup");
    expected.read_only = flag("readOnlyRootFilesystem");
    expected.no_new_privileges = own.get("allowPrivilegeEscalation").and_then(Value::as_bool) == Some(false);
    let capabilities = |place: &str| own.pointer(place).and_then(Value::as_array).into_iter().flatten();
    expected.may_not_have(capabilities("/capabilities/drop").filter_map(Value::as_str));
    expected.may_have(capabilities("/capabilities/add").filter_map(Value::as_str));
    if flag("privileged") {
        expected.may_have(["ALL"].into_iter());
    }
}

/// The commands of probes and of hooks, as they are written and, since the kubelet does so for probes, with variables put in.
fn commands(one: &Value, variables: &Variables<'_>) -> Vec<Vec<String>> {
    const PLACES: [&str; 5] = [
        "/livenessProbe/exec/command",
        "/readinessProbe/exec/command",
        "/startupProbe/exec/command",
        "/lifecycle/postStart/exec/command",
        "/lifecycle/preStop/exec/command",
    ];
    let lists = PLACES.iter().filter_map(|place| one.pointer(place)?.as_array());
    let mut found = Vec::new();
    for list in lists {
        let words = || list.iter().filter_map(Value::as_str);
        found.push(words().map(str::to_owned).collect::<Vec<_>>());
        found.extend(words().map(|word| variables.expanded(word)).collect::<Option<Vec<_>>>());
    }
    found.retain(|command| !command.is_empty());
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
    let untagged = match full.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => full.as_str(),
    };
    let mut names = vec![image.to_owned()];
    match digest {
        // Some leave the tag out then: the digest is what counts.
        Some(digest) => names.extend([format!("{full}@{digest}"), format!("{untagged}@{digest}")]),
        None if untagged.len() < full.len() => names.push(full),
        None => names.push(format!("{full}:latest")),
    }
    names.sort();
    names.dedup();
    names
}

pub(super) fn items<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value.get(key).and_then(Value::as_array).into_iter().flatten()
}

pub(super) fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key).and_then(Value::as_str)
}
