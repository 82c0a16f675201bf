//! `initdata`: the document that is bound to a pod's machine, made of files and looked at.

use std::path::Path;

use kata_image::manifest::hex;
use kata_initdata::{DocumentError, Initdata};
use serde_json::json;

use super::Outcome;
use super::guest::content;
use crate::cli::{InitdataCommand, InitdataCreateArgs, InitdataShowArgs};
use crate::{output, table};

/// Annotations of one Kubernetes object together (Kubernetes, validation of object metadata).
const ANNOTATIONS_MAX: usize = 256 * 1024;
/// Bytes of the field that SEV-SNP's reports have for it, and TDX's.
const FIELDS: [(&str, usize); 2] = [("snp_host_data", 32), ("tdx_mrconfigid", 48)];

/// Why there is no initdata.
#[derive(Debug, thiserror::Error)]
enum InitdataError {
    #[error("cannot read {file}")]
    Read {
        file: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{file} is not text, and initdata carries nothing else")]
    Text { file: String },
    #[error("{0} has no name of its own: give it one, as in policy.rego={0}")]
    Name(String),
    #[error("two files are to be called {0:?}")]
    Twice(String),
    #[error("what comes out is of no use: it")]
    Document(#[from] DocumentError),
    #[error("the source")]
    Source(#[source] DocumentError),
    #[error("it has no {name:?}; it has {has}")]
    NoFile { name: String, has: String },
}

/// Does what is asked.
pub fn run(command: &InitdataCommand) -> Outcome {
    match command {
        InitdataCommand::Create(args) => create(args),
        InitdataCommand::Show(args) => show(args),
    }
}

fn create(args: &InitdataCreateArgs) -> Outcome {
    let mut data = toml::Table::new();
    for file in &args.file {
        let (name, path) = name_and_path(file)?;
        let bytes =
            std::fs::read(&path).map_err(|source| InitdataError::Read { file: path.clone(), source })?;
        let text = String::from_utf8(bytes).map_err(|_| InitdataError::Text { file: path })?;
        if data.insert(name.clone(), toml::Value::String(text)).is_some() {
            return Err(InitdataError::Twice(name).into());
        }
    }
    let head = json!({ "version": "0.1.0", "algorithm": args.algorithm });
    let mut document = toml::Table::try_from(head)?;
    document.insert("data".to_owned(), toml::Value::Table(data));
    let initdata =
        Initdata::parse(toml::to_string_pretty(&document)?.into_bytes()).map_err(InitdataError::Document)?;
    let annotation = initdata.to_annotation().map_err(InitdataError::Document)?;
    if annotation.len() > ANNOTATIONS_MAX {
        tracing::warn!(
            "the value has {} bytes, and Kubernetes takes {ANNOTATIONS_MAX} of all annotations together: hypervisor.qemu.initdata of the \
             configuration takes more",
            annotation.len()
        );
    }
    if args.toml {
        output::print(&String::from_utf8_lossy(initdata.raw()))?;
    } else if args.json {
        let mut told = summary(&initdata);
        if let Some(fields) = told.as_object_mut() {
            fields.insert("annotation".to_owned(), annotation.into());
        }
        output::document(&told)?;
    } else {
        output::print(&(annotation + "\n"))?;
    }
    Ok(0)
}

/// `NAME=FILE`, or a file that goes by its own name.
fn name_and_path(text: &str) -> Result<(String, String), InitdataError> {
    if let Some((name, path)) = text.split_once('=') {
        return Ok((name.to_owned(), path.to_owned()));
    }
    let name = Path::new(text).file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| InitdataError::Name(text.to_owned()))?;
    Ok((name.to_owned(), text.to_owned()))
}

fn show(args: &InitdataShowArgs) -> Outcome {
    let bytes = content(&args.source)?;
    let initdata = read(bytes).map_err(InitdataError::Source)?;
    if let Some(name) = &args.file {
        let text = initdata.data().get(name).ok_or_else(|| InitdataError::NoFile {
            name: name.clone(),
            has: initdata.data().keys().cloned().collect::<Vec<_>>().join(", "),
        })?;
        output::print(text)?;
        return Ok(0);
    }
    let told = summary(&initdata);
    if args.json {
        output::document(&told)?;
        return Ok(0);
    }
    let text = |key: &str| told.get(key).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
    let row = |name: &str, value: String| [name.to_owned(), value];
    let mut rows = vec![row("algorithm", text("algorithm")), row("digest", text("digest"))];
    rows.extend(FIELDS.map(|(key, _)| row(&key.replace('_', " "), text(key))));
    let of_file = |(name, text): (&String, &String)| {
        row("file", format!("{name}, {}", table::bytes(text.len() as u64)))
    };
    rows.extend(initdata.data().iter().map(of_file));
    output::print(&table::columns(&rows))?;
    Ok(0)
}

/// The document itself, or an annotation's value: base64 has no blanks, and no TOML of this form is without.
fn read(bytes: Vec<u8>) -> Result<Initdata, DocumentError> {
    match std::str::from_utf8(&bytes) {
        Ok(text) if !text.trim().contains([' ', '\n', '=']) || is_base64(text.trim()) => {
            Initdata::from_annotation(text)
        }
        _ => Initdata::parse(bytes),
    }
}

fn is_base64(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'='))
}

fn summary(initdata: &Initdata) -> serde_json::Value {
    let mut told = json!({
        "algorithm": initdata.algorithm().to_string(),
        "digest": hex(initdata.digest()),
        "files": initdata.data().keys().collect::<Vec<_>>(),
    });
    if let Some(fields) = told.as_object_mut() {
        fields.extend(FIELDS.map(|(key, size)| (key.to_owned(), hex(&initdata.host_data(size)).into())));
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(files: &[(&str, &str)], dir: &Path) -> InitdataCreateArgs {
        let file = |(name, text): &(&str, &str)| {
            let path = dir.join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let file = files.iter().map(file).collect();
        InitdataCreateArgs { file, algorithm: "sha384".to_owned(), toml: false, json: false }
    }

    fn error(outcome: Outcome) -> String {
        crate::failure::chain(&*outcome.unwrap_err().error.unwrap())
    }

    #[test]
    fn file_goes_by_its_own_name_or_by_the_one_that_it_is_given() {
        let names = |text| name_and_path(text).map(|(name, path)| format!("{name} {path}")).unwrap();
        assert_eq!(names("/a/policy.rego"), "policy.rego /a/policy.rego");
        assert_eq!(names("policy.rego=/a/b"), "policy.rego /a/b");
        assert!(name_and_path("..").is_err());
    }

    #[test]
    fn document_and_annotation_are_told_apart() {
        let text = "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\na = \"1\"\n";
        let initdata = read(text.into()).unwrap();
        let annotation = initdata.to_annotation().unwrap();
        assert_eq!(read(format!("{annotation}\n").into_bytes()).unwrap(), initdata);
        assert_eq!(summary(&initdata)["tdx_mrconfigid"].as_str().map(str::len), Some(96));
    }

    #[test]
    fn what_cannot_be_carried_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut args = made(&[("a", "1")], dir.path());
        assert!(create(&args).is_ok());
        args.file.push(args.file[0].clone());
        assert_eq!(error(create(&args)), "two files are to be called \"a\"");
        args.file = vec![format!("../x={}", dir.path().join("a").display())];
        assert!(error(create(&args)).contains("has the key \"../x\", which can be no file name"));
        std::fs::write(dir.path().join("b"), [0xff]).unwrap();
        args.file = vec![dir.path().join("b").display().to_string()];
        assert!(error(create(&args)).ends_with("is not text, and initdata carries nothing else"));
    }
}
