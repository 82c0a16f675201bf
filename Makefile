# Every target is a chore of xtask; this file only gives them their usual names.
.PHONY: run test test-unit lint bench docs clean

run test lint bench:
	@cargo xtask $@

test-unit:
	@cargo xtask test --unit

docs:
	@cargo doc --workspace --no-deps

clean:
	@cargo clean
