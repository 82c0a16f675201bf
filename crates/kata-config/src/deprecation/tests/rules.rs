//! What the build script refuses, each with the registry that it refuses.

use super::OF_TEST;
use crate::deprecation::Registry;

/// The faults of the tests' registry with one thing changed.
fn faults(from: &str, to: &str) -> String {
    assert!(OF_TEST.contains(from), "{from}");
    let text = OF_TEST.replacen(from, to, 1);
    Registry::parse(&text).expect_err("must be refused").join("\n")
}

#[track_caller]
fn refused(from: &str, to: &str, fault: &str) {
    let faults = faults(from, to);
    assert!(faults.contains(fault), "{fault:?} is not in {faults:?}");
}

/// The second entry, the deprecated one, with one thing changed.
#[track_caller]
fn refused_of_second(from: &str, to: &str, fault: &str) {
    let (before, after) = OF_TEST.split_at(OF_TEST.find("id = \"D0002\"").unwrap());
    assert!(after.contains(from), "{from}");
    let text = format!("{before}{}", after.replacen(from, to, 1));
    let faults = Registry::parse(&text).expect_err("must be refused").join("\n");
    assert!(faults.contains(fault), "{fault:?} is not in {faults:?}");
}

#[test]
fn an_unknown_surface_is_refused() {
    refused("surface = \"config-key\"", "surface = \"registry-key\"", "unknown variant `registry-key`");
}

#[test]
fn an_unknown_stage_and_an_unknown_field_are_refused() {
    refused("stage = \"proposed\"", "stage = \"doomed\"", "unknown variant `doomed`");
    refused("tier = \"beta\"", "tier = \"beta\"\nteir = \"beta\"", "unknown field `teir`");
}

#[test]
fn a_field_that_is_missing_is_named() {
    refused("replacement = \"use thing 1b\"\n", "", "missing field `replacement`");
}

#[test]
fn a_date_of_another_form_is_refused() {
    refused("date = 2026-11-25", "date = \"25.11.2026\"", "expected a TOML datetime");
    refused("date = 2026-11-25", "date = 2026-11-31", "");
    refused("date = 2026-11-25", "date = 2026-11-25T10:00:00Z", "is not a day of the form YYYY-MM-DD");
}

#[test]
fn ids_have_one_form_and_one_order() {
    refused("id = \"D0001\"", "id = \"D001\"", "an id is D and four digits");
    refused("id = \"D0002\"", "id = \"D0001\"", "D0001: must come after D0001");
    refused("id = \"D0002\"", "id = \"D0007\"", "D0003: must come after D0007");
}

#[test]
fn one_thing_has_one_id() {
    refused(
        "hypervisor.*.thing_1",
        "hypervisor.*.thing_2",
        "D0002: config-key \"hypervisor.*.thing_2\" is selected twice",
    );
}

#[test]
fn texts_are_clauses_and_not_empty() {
    refused("reason = \"thing 1 is no good\"", "reason = \" \"", "D0001: reason is empty");
    refused("replacement = \"use thing 1b\"", "replacement = \"Use it.\"", "without a full stop");
    refused("issue = \"https://example.org/1\"", "issue = \"somewhere\"", "D0001: issue must be a link");
}

#[test]
fn what_nothing_selects_is_refused() {
    refused("names = [\"hypervisor.*.thing_1\"]", "names = []", "D0001: nothing selects it");
}

#[test]
fn removal_comes_after_announcement() {
    refused_of_second("date = 2027-06-25", "date = 2026-06-25", "before it is announced");
    refused_of_second(
        "warn_from = \"0.1.0\"",
        "warn_from = \"0.4.0\"",
        "D0002: warns from 0.4.0, outside 0.1.0 to 0.3.0",
    );
    refused_of_second(
        "off_by_default_in = \"0.2.0\"",
        "off_by_default_in = \"0.4.0\"",
        "is off by default in 0.4.0",
    );
}

#[test]
fn a_window_shorter_than_its_tier_is_refused() {
    let short = "D0002: the window is too short: beta needs ";
    refused_of_second("date = 2027-06-25", "date = 2027-05-24", &format!("{short}6 months before 0.3.0"));
    refused_of_second("release = \"0.3.0\"", "release = \"0.2.0\"", &format!("{short}2 minor releases"));
    refused_of_second(
        "tier = \"beta\"",
        "tier = \"stable\"",
        "12 months, an LTS release that warns before 0.3.0",
    );
    refused_of_second("release = \"0.3.0\"", "release = \"0.1.1\"", "outside 0.1.0 to 0.1.1");
}

#[test]
fn an_lts_release_within_the_window_is_what_a_stable_thing_needs() {
    let text = OF_TEST
        .replace("tier = \"beta\"", "tier = \"stable\"")
        .replace("2027-06-25", "2027-11-25")
        .replace("lts = []", "lts = [\"0.2.0\"]");
    assert!(Registry::parse(&text).is_ok());
    let early = Registry::parse(&text.replace("lts = [\"0.2.0\"]", "lts = [\"0.0.9\", \"0.3.0\"]"));
    assert!(early.unwrap_err().join("\n").contains("stable needs an LTS release that warns"));
}

#[test]
fn a_security_exception_shortens_the_window_for_two_maintainers_with_an_advisory() {
    let (from, short) = ("date = 2027-06-25 }", "date = 2026-12-01 }\nsecurity_exception = ");
    let two = "{ advisory = \"https://example.org/a\", approved_by = [\"a\", \"b\"] }";
    let text = OF_TEST.replace(from, &format!("{short}{two}"));
    assert!(Registry::parse(&text).is_ok());
    let one = "{ advisory = \"https://example.org/a\", approved_by = [\"a\", \"a\"] }";
    refused(from, &format!("{short}{one}"), "needs two maintainers");
    let none = "{ advisory = \"\", approved_by = [\"a\", \"b\"] }";
    refused(from, &format!("{short}{none}"), "needs a link to the advisory");
}

#[test]
fn what_only_upstream_had_is_removed_from_the_start() {
    refused_of_second(
        "origin = \"here\"",
        "origin = \"upstream\"",
        "D0002: what only upstream had can only be removed",
    );
}

#[test]
fn off_by_default_needs_a_way_back() {
    let (before, after) = OF_TEST.split_at(OF_TEST.find("id = \"D0003\"").unwrap());
    let text = format!("{before}{}", after.replacen("escape_hatch = \"name its id\"\n", "", 1));
    let faults = Registry::parse(&text).unwrap_err().join("\n");
    assert!(faults.contains("D0003: off by default needs off_by_default_in and an escape_hatch"), "{faults}");
}
