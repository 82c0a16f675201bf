//! Each id has its proof here: warning or refusal, metric, replacement. The table is the registry itself, so that a new entry
//! cannot come without.

use std::io::Write;
use std::sync::{Arc, Mutex};

use super::*;
use crate::{Config, Fault, Sources};

mod rules;

/// One entry for each stage in which a thing can be met, none of them real.
const OF_TEST: &str = include_str!("tests/registry.toml");

fn of_test() -> Registered {
    Registered::of_test(Registry::parse(OF_TEST).unwrap())
}

/// What is logged meanwhile.
fn logged(work: impl FnOnce()) -> String {
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let sink = Sink::default();
    let writer = sink.clone();
    let subscriber = tracing_subscriber::fmt().json().with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, work);
    String::from_utf8(sink.0.lock().unwrap().clone()).unwrap()
}

/// A name and a value that a selector means.
fn example(selector: &Selector, name: &str) -> (String, String) {
    let value = selector.values.first().map_or("asked-for", |value| value);
    (name.replace('*', "qemu"), value.to_owned())
}

fn examples(item: &'static Deprecation) -> Vec<(Surface, String, String)> {
    let mut all = Vec::new();
    for selector in item.selectors.iter() {
        for name in selector.names.iter() {
            let (name, value) = example(selector, name);
            all.push((selector.surface, name, value));
        }
    }
    all
}

/// Everything an id promises to those who use the thing.
fn prove(registered: Registered, item: &'static Deprecation) {
    let id = &item.id;
    let helps = |text: &str| {
        for part in [id, &item.reason, &item.replacement] {
            assert!(text.contains(&**part), "{id}: {part:?} is not in {text:?}");
        }
    };
    for (surface, name, value) in examples(item) {
        let before = item.met();
        let found = registered.find_value(surface, &name, Some(&value));
        if matches!(item.stage, Stage::Proposed | Stage::Cancelled | Stage::Archived) {
            assert!(found.is_none(), "{id}: {name} says something though it is {}", item.stage);
            continue;
        }
        let (found, fit) = found.unwrap_or_else(|| panic!("{id}: {surface} {name} = {value} is not found"));
        assert_eq!((&found.id, fit), (id, Fit::Yes), "{surface} {name} = {value}");

        let mut outcome = Ok(());
        let log = logged(|| outcome = Policy::Warn.admit(item, surface, &name, &[]));
        match (item.stage, outcome) {
            (Stage::Deprecated, Ok(())) if before == 0 => helps(&log),
            (Stage::Deprecated, Ok(())) => assert_eq!(log, "", "{id} is told of once"),
            (Stage::OffByDefault, Err(refused @ Refused::OffByDefault(_))) => helps(&refused.to_string()),
            (Stage::Removed, Err(refused @ Refused::Removed(_))) => {
                helps(&refused.to_string());
                assert!(refused.to_string().contains(&*item.last_release), "{refused}");
            }
            (stage, outcome) => panic!("{id}, {stage}: {outcome:?}"),
        }

        assert_eq!(item.met(), before + 1, "{id} is counted");
        let metrics = registered.metrics();
        let counter = format!(
            "kata_deprecated_uses_total{{id=\"{id}\",surface=\"{surface}\",remove_in=\"{}\"}} ",
            item.remove_in.release
        );
        assert!(metrics.contains(&counter), "{counter} is not in {metrics}");
        let gauge = format!(
            "kata_deprecated_removal_timestamp_seconds{{id=\"{id}\"}} {}\n",
            item.remove_in.date.unix_seconds()
        );
        assert!(metrics.contains(&gauge), "{gauge} is not in {metrics}");
    }
}

#[test]
fn every_id_warns_or_refuses_is_counted_and_names_its_replacement() {
    for item in all() {
        prove(Registered::PROGRAM, item);
    }
}

#[test]
#[should_panic(expected = "is not found")]
fn an_id_that_nothing_looks_up_fails_the_table() {
    prove(Registered::PROGRAM, of_test().get("D0002").unwrap());
}

#[test]
fn stages_that_no_real_entry_is_in_keep_the_same_promises() {
    let registered = of_test();
    let stages: Vec<Stage> = registered.all().map(|item| item.stage).collect();
    assert_eq!(stages, Stage::ALL, "one for each stage");
    for item in registered.all() {
        prove(registered, item);
    }
}

#[test]
fn every_removed_key_is_refused_with_its_id_when_a_configuration_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("configuration.toml");
    for item in all().filter(|item| item.stage == Stage::Removed) {
        for (surface, name, value) in examples(item) {
            if surface != Surface::ConfigKey {
                continue;
            }
            std::fs::write(&file, format!("{name} = {value:?}\n")).unwrap();
            let errors =
                Config::load(&Sources { file: Some(file.clone()), ..Sources::default() }).unwrap_err();
            let [error] = &errors.0[..] else { panic!("{errors}") };
            let Fault::Deprecated(refused) = &error.fault else { panic!("{errors}") };
            assert_eq!(refused.deprecation().id, item.id);
            let start = format!("{}:1: {name}: removed [{} {}]: ", file.display(), item.id, item.title);
            assert!(errors.to_string().starts_with(&start), "{errors}");
        }
    }
}

#[test]
fn a_value_that_asks_for_nothing_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("configuration.toml");
    for item in all() {
        for selector in item.selectors.iter().filter(|one| one.surface == Surface::ConfigKey) {
            for (name, value) in
                selector.names.iter().flat_map(|n| selector.harmless.iter().map(move |v| (n, v)))
            {
                let plain = value.parse::<u64>().is_ok() || value.parse::<bool>().is_ok() || value == "[]";
                let value = if plain { value.to_string() } else { format!("{value:?}") };
                let text = format!("{} = {value}\n", name.replace('*', "qemu"));
                std::fs::write(&file, &text).unwrap();
                let sources = Sources { file: Some(file.clone()), ..Sources::default() };
                assert_eq!(Config::load(&sources).unwrap(), Config::default(), "{}: {text}", item.id);
            }
        }
    }
}

#[test]
fn the_strict_policy_refuses_what_works_and_says_until_when() {
    let item = of_test().get("D0002").unwrap();
    let refused = Policy::Reject.admit(item, Surface::ConfigKey, "x", &[]).unwrap_err();
    assert!(matches!(refused, Refused::Rejected(_)));
    assert!(refused.to_string().contains("0.3.0 (2027-06-25)"), "{refused}");
}

#[test]
fn the_silent_policy_counts_and_says_nothing() {
    let item = of_test().get("D0002").unwrap();
    let log = logged(|| Policy::Off.admit(item, Surface::ConfigKey, "x", &[]).unwrap());
    assert_eq!((log.as_str(), item.met()), ("", 1));
}

#[test]
fn what_is_off_by_default_works_for_who_names_its_id() {
    let item = of_test().get("D0003").unwrap();
    let refused = Policy::Warn.admit(item, Surface::ConfigKey, "x", &[]).unwrap_err().to_string();
    assert!(refused.contains("runtime.deprecated_opt_in = [\"D0003\"]"), "{refused}");
    assert!(Policy::Warn.admit(item, Surface::ConfigKey, "x", &["D0003".to_owned()]).is_ok());
    assert!(Policy::Reject.admit(item, Surface::ConfigKey, "x", &["D0003".to_owned()]).is_err());
}

#[test]
fn no_policy_brings_back_what_is_removed() {
    let item = of_test().get("D0004").unwrap();
    for policy in [Policy::Warn, Policy::Reject, Policy::Off] {
        assert_eq!(policy.verdict(item, &["D0004".to_owned()]), Verdict::Refuse);
    }
}

#[test]
fn a_warning_is_one_record_with_fields() {
    let item = of_test().get("D0002").unwrap();
    let log = logged(|| {
        item.warn(Surface::Cli, "kata-ctl old");
        item.warn(Surface::Cli, "kata-ctl old");
    });
    assert_eq!(log.lines().count(), 1, "{log}");
    for field in [
        r#""level":"WARN""#,
        r#""deprecation":"D0002""#,
        r#""surface":"cli""#,
        r#""what":"kata-ctl old""#,
        r#""remove_in":"0.3.0""#,
        r#""removal_date":"2027-06-25""#,
    ] {
        assert!(log.contains(field), "{field} is not in {log}");
    }
}

#[test]
fn nothing_is_said_before_the_release_that_warns() {
    let text = OF_TEST.replace("warn_from = \"0.1.0\"", "warn_from = \"0.2.0\"");
    let item = Registered::of_test(Registry::parse(&text).unwrap()).get("D0002").unwrap();
    let log = logged(|| item.warn(Surface::Cli, "early"));
    assert_eq!((log.as_str(), item.met()), ("", 1));
}

#[test]
fn a_key_below_a_removed_section_is_found() {
    let item = find(Surface::ConfigKey, "hypervisor.stratovirt.path").unwrap();
    assert_eq!((&*item.id, &*item.title), ("D0001", "StratoVirt"));
    assert!(find(Surface::ConfigKey, "hypervisor.stratovirt2").is_none());
    assert!(find(Surface::Annotation, "hypervisor.stratovirt").is_none());
}

#[test]
fn a_command_is_recognised_wherever_its_program_is() {
    for line in ["runk run x", "sudo /usr/local/bin/runk --root /r list"] {
        assert_eq!(find(Surface::Cli, line).unwrap().id, "D0002", "{line}");
    }
    for line in ["runc run x", "krunk", ""] {
        assert!(find(Surface::Cli, line).is_none(), "{line}");
    }
}

#[test]
fn days_and_months_are_counted_as_in_the_calendar() {
    let day = |text: &str| text.parse::<Date>().unwrap();
    assert_eq!(day("1970-01-01").unix_seconds(), 0);
    assert_eq!(day("2026-11-25").unix_seconds(), 1_795_564_800);
    for text in ["1970-01-01", "2000-02-29", "2026-11-25", "2027-12-31", "2028-03-01", "2100-02-28"] {
        let seconds = day(text).unix_seconds();
        assert_eq!(Date::of_unix_seconds(seconds + 86_399).to_string(), text);
    }
    assert_eq!(day("2024-02-29").days_after(day("2023-03-01")), 365);
    assert_eq!(day("2026-01-31").plus_months(1).to_string(), "2026-02-28");
    assert_eq!(day("2027-12-31").plus_months(2).to_string(), "2028-02-29");
    assert_eq!(day("2026-11-25").plus_months(12).to_string(), "2027-11-25");
    for wrong in ["2026-13-01", "2026-02-30", "25.11.2026", "2026-11-25T00:00:00Z", ""] {
        assert!(wrong.parse::<Date>().is_err(), "{wrong}");
    }
}
