# Every target is a chore of xtask; this file only gives them their usual names.
.PHONY: run test test-unit test-lab lint bench bench-lab soak lab docs clean

run test lint bench:
	@cargo xtask $@

test-unit:
	@cargo xtask test --unit

# A shell where there is KVM, see docs/lab.md.
lab:
	@cargo xtask lab shell

test-lab:
	@cargo xtask lab test --all

bench-lab:
	@cargo xtask lab bench

# For as long as TIME says, e.g. `make soak TIME=10m`.
TIME ?= 10m
soak:
	@cargo xtask soak --time $(TIME)

docs:
	@cargo xtask docs
	@cargo doc --workspace --no-deps

clean:
	@cargo clean
