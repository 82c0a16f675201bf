//! Turns `deprecations.toml` into constants, and refuses to build with a registry that breaks its own rules.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;

// The library's own modules: what is checked here is what is used there, and neither uses all of it.
#[allow(dead_code, reason = "the build script writes what the library reads")]
#[path = "src/deprecation/entry.rs"]
mod entry;
#[allow(dead_code, reason = "the build script writes what the library reads")]
#[path = "src/deprecation/registry.rs"]
mod registry;

use entry::{Entry, Point, SecurityException, Selector, Text};
use registry::Registry;
use semver::Version;

const REGISTRY: &str = "deprecations.toml";

fn main() -> Result<(), Box<dyn Error>> {
    for file in [REGISTRY, "build.rs", "src/deprecation/entry.rs", "src/deprecation/registry.rs"] {
        println!("cargo::rerun-if-changed={file}");
    }
    let text = std::fs::read_to_string(REGISTRY)?;
    match Registry::parse(&text) {
        Ok(registry) => {
            let out = std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?;
            std::fs::write(Path::new(&out).join("deprecations.rs"), source(&registry)?)?;
        }
        Err(faults) => {
            for fault in faults {
                for line in fault.lines() {
                    println!("cargo::error={REGISTRY}: {line}");
                }
            }
        }
    }
    Ok(())
}

fn source(registry: &Registry) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    let mut names = String::new();
    for entry in &registry.entries {
        // In documentation brackets would be links.
        let told = format!("{}: {}.", entry.title, entry.reason).replace('[', "\\[").replace('<', "\\<");
        writeln!(text, "#[doc = {told:?}]")?;
        writeln!(
            text,
            "pub static {}: Deprecation = Deprecation {{ entry: {}, uses: unmet() }};",
            entry.id,
            literal(entry)
        )?;
        write!(names, "&{}, ", entry.id)?;
    }
    writeln!(text, "/// Every entry, by id.\npub(super) static ALL: &[&Deprecation] = &[{names}];")?;
    Ok(text)
}

fn literal(entry: &Entry) -> String {
    // Taken apart whole: a field that is added to the struct cannot be forgotten here.
    let Entry {
        id,
        title,
        origin,
        tier,
        stage,
        announced,
        warn_from,
        off_by_default_in,
        remove_in,
        last_release,
        replacement,
        automatic_migration,
        docs,
        owner,
        issue,
        reason,
        escape_hatch,
        security_exception,
        selectors,
    } = entry;
    format!(
        "Entry {{ id: {}, title: {}, origin: Origin::{origin:?}, tier: Tier::{tier:?}, stage: Stage::{stage:?}, \
         announced: {}, warn_from: {}, off_by_default_in: {}, remove_in: {}, last_release: {}, replacement: {}, \
         automatic_migration: {automatic_migration}, docs: {}, owner: {}, issue: {}, reason: {}, escape_hatch: {}, \
         security_exception: {}, selectors: {} }}",
        quoted(id),
        quoted(title),
        point(announced),
        version(warn_from),
        option(off_by_default_in.as_ref(), version),
        point(remove_in),
        quoted(last_release),
        quoted(replacement),
        quoted(docs),
        quoted(owner),
        quoted(issue),
        quoted(reason),
        option(escape_hatch.as_ref(), quoted),
        option(security_exception.as_ref(), exception),
        list(selectors, selector),
    )
}

fn quoted(text: &Text) -> String {
    format!("Borrowed({text:?})")
}

fn version(version: &Version) -> String {
    format!("Version::new({}, {}, {})", version.major, version.minor, version.patch)
}

fn point(point: &Point) -> String {
    let entry::Date { year, month, day } = point.date;
    let release = version(&point.release);
    format!("Point {{ release: {release}, date: Date {{ year: {year}, month: {month}, day: {day} }} }}")
}

fn exception(exception: &SecurityException) -> String {
    let SecurityException { advisory, approved_by } = exception;
    format!(
        "SecurityException {{ advisory: {}, approved_by: {} }}",
        quoted(advisory),
        list(approved_by, quoted)
    )
}

fn selector(selector: &Selector) -> String {
    let Selector { surface, names, values, harmless } = selector;
    format!(
        "Selector {{ surface: Surface::{surface:?}, names: {}, values: {}, harmless: {} }}",
        list(names, quoted),
        list(values, quoted),
        list(harmless, quoted)
    )
}

fn list<T>(items: &[T], literal: impl Fn(&T) -> String) -> String {
    let items: Vec<String> = items.iter().map(literal).collect();
    format!("Borrowed(&[{}])", items.join(", "))
}

fn option<T>(value: Option<&T>, literal: impl Fn(&T) -> String) -> String {
    value.map_or_else(|| "None".to_owned(), |value| format!("Some({})", literal(value)))
}
