//! The tests, all of them by default.

use crate::products::Profile;
use crate::shell::{self, at, cargo, tree};
use crate::{Chores, demo, packages, products, say};

/// Runs the test suite; with `unit`, without booting machines.
pub fn run(unit: bool, filter: &[String]) -> Chores {
    packages::for_test()?;
    let skips = tree().join("target/skipped-tests.txt");
    std::fs::create_dir_all(tree().join("target")).map_err(at("create", &tree().join("target")))?;
    std::fs::write(&skips, "").map_err(at("write", &skips))?;
    let mut nextest = cargo();
    nextest.args(["nextest", "run", "--workspace", "--cargo-profile", Profile::Quick.name()]);
    nextest.env("KATA_SKIP_LOG", &skips);
    if unit {
        nextest.args(["--profile", "unit"]);
    } else {
        let products = products::build(Profile::Quick, true)?;
        nextest.env("KATA_TEST_PROGRAMS", &products.dir).env("KATA_TEST_IMAGE", demo::busybox_image()?);
    }
    say("running the tests");
    let outcome = shell::run(nextest.args(filter));
    let skipped = std::fs::read_to_string(&skips).map_err(at("read", &skips))?;
    say(&format!("{} tests skipped", skipped.lines().count()));
    eprint!("{skipped}");
    outcome
}
