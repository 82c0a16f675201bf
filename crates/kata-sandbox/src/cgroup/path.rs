//! `linux.cgroupsPath` as a path below a hierarchy's root.

use std::path::{Component, Path, PathBuf};

use super::CgroupError;

/// Resolves both forms that container managers use.
///
/// | form | means |
/// |---|---|
/// | `/kubepods/burstable/pod1/web`, or without the slash | that path |
/// | `kubepods-pod1.slice:cri-containerd:web` | the slice, below those that its name is made of, and in it the scope `cri-containerd-web.scope` |
///
/// The second is what systemd would make of it. The directory is made without asking systemd, which leaves alone what it has not
/// made.
pub(super) fn resolve(path: &Path) -> Result<PathBuf, CgroupError> {
    let fault = |reason| CgroupError::Path { path: path.to_owned(), reason };
    let text = path.to_str().ok_or_else(|| fault("is not UTF-8"))?;
    let parts: Vec<&str> = text.split(':').collect();
    let resolved = match parts.as_slice() {
        [_] => PathBuf::from(text.trim_start_matches('/')),
        [slice, prefix, name] => {
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            let scope = match (name.ends_with(".slice"), prefix.is_empty()) {
                (true, _) => (*name).to_owned(),
                (false, true) => format!("{name}.scope"),
                (false, false) => format!("{prefix}-{name}.scope"),
            };
            expand(slice).ok_or_else(|| fault("names no slice of systemd's"))?.join(scope)
        }
        _ => return Err(fault("is neither a path nor of the form slice:prefix:name")),
    };
    let plain = resolved.components().all(|part| matches!(part, Component::Normal(_)));
    if !plain || resolved.as_os_str().is_empty() {
        return Err(fault("leads nowhere"));
    }
    Ok(resolved)
}

/// `a-b.slice` is in `a.slice`: systemd.slice(5).
fn expand(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(PathBuf::new());
    }
    if name.contains('/') || name.split('-').any(str::is_empty) {
        return None;
    }
    let ends = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
    ends.map(|end| name.get(..end).map(|part| format!("{part}.slice"))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_and_systemds_names_lead_to_the_same_kind_of_place() {
        for (given, expected) in [
            ("/default/web", "default/web"),
            ("kubepods/pod1/web", "kubepods/pod1/web"),
            (
                "kubepods-burstable-pod1_2.slice:cri-containerd:web",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-web.scope",
            ),
            ("system.slice:docker:web", "system.slice/docker-web.scope"),
            (":docker:web", "system.slice/docker-web.scope"),
            ("-.slice::web", "web.scope"),
        ] {
            assert_eq!(resolve(Path::new(given)).unwrap(), Path::new(expected), "{given}");
        }
    }

    #[test]
    fn what_leads_elsewhere_is_refused() {
        for given in [
            "/",
            "",
            "../a",
            "/a/../../b",
            "a:b",
            "a:b:c",
            "a--b.slice:x:y",
            "a.slice:x:../../y",
            "a/b.slice:x:y",
        ] {
            assert!(resolve(Path::new(given)).is_err(), "{given}");
        }
    }

    proptest! {
        #[test]
        fn nothing_leads_out_of_the_hierarchy(given in "[a./:-]{0,24}(slice)?[a./:-]{0,8}") {
            if let Ok(path) = resolve(Path::new(&given)) {
                prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))), "{path:?}");
            }
        }
    }
}
