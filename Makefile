# What people and CI run. Everything is made below target/; see scripts/setup.sh for what is installed.

CARGO ?= cargo
# An optimised build takes a few minutes the first time; `make demo PROFILE=dev` starts sooner.
PROFILE ?= release
# Cases of each property test.
FUZZ_CASES ?= 200000

export CARGO_TERM_COLOR ?= auto

.PHONY: help setup demo test check test-only versions proof mutants bench fuzz regress-fixture

help:
	@echo "make demo             the whole migration on two throw-away clusters, with a load running"
	@echo "make test             set-up, check and all tests"
	@echo "make check            fmt, clippy, rustdoc, cargo-deny"
	@echo "make versions         the tests between servers of different major versions, which it fetches (an hour; PAIRS='14:18 15:17' chooses some)"
	@echo "make proof            the tests at full length: more kills, larger values, the model's states (hours on two cores)"
	@echo "make mutants          takes safeguards out one at a time: the tests named in tests/mutants.json must fail (WORDS='...' chooses some)"
	@echo "make bench            throughput and memory beside PgBouncer and Pgpool-II; backfill, verify, moves, reads (two hours)"
	@echo "make fuzz             the property tests with FUZZ_CASES=$(FUZZ_CASES) cases each"
	@echo "make regress-fixture  makes the parsers' yardstick again with PostgreSQL's own parser (needs libclang)"

setup:
	scripts/setup.sh

demo:
	scripts/setup.sh postgres
	$(CARGO) run --locked --profile $(PROFILE) -- demo

test: setup check test-only

check: setup
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --quiet
	target/tools/bin/cargo-deny --offline --locked check licenses bans sources

# nextest where it is there: it runs the tests of all binaries side by side, two more than there are processors, since most of them wait.
test-only:
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		set -x; $(CARGO) nextest run --locked --no-fail-fast --test-threads $$(($$(nproc) + 2)) && $(CARGO) test --locked --doc; \
	else \
		set -x; $(CARGO) test --locked --no-fail-fast; \
	fi

versions: setup
	scripts/versions $(PAIRS)

# Full counts want optimised programs, with the debug build's checks: some minutes to build.
proof: setup
	@export CROSSFADE_PROOF=1 CROSSFADE_LARGE_MB=1000; \
	if $(CARGO) nextest --version >/dev/null 2>&1; then \
		set -x; $(CARGO) nextest run --locked --no-fail-fast --cargo-profile proof --profile proof --test-threads $$(nproc); \
	else \
		set -x; $(CARGO) test --locked --profile proof --no-fail-fast; \
	fi

mutants: setup
	scripts/mutants $(WORDS)

bench:
	scripts/setup.sh postgres
	$(CARGO) build --locked --release --bins --examples
	bench/run
	bench/backfill
	bench/verify
	bench/moves
	bench/reads

# Inputs at random, shrunk where one fails (proptest); coverage-guided fuzzers need a nightly compiler.
fuzz:
	PROPTEST_CASES=$(FUZZ_CASES) $(CARGO) test --locked --profile $(PROFILE) --lib -- fuzz
	PROPTEST_CASES=$(FUZZ_CASES) $(CARGO) test --locked --profile $(PROFILE) --test sql_properties

regress-fixture:
	@test -n "$(SCRIPTS)" || { echo "usage: make regress-fixture SCRIPTS='.../src/test/regress/sql/*.sql' (PostgreSQL's sources)"; exit 2; }
	$(CARGO) run --locked --release --manifest-path tests/oracle/Cargo.toml -- $(SCRIPTS) > tests/fixtures/sql/regress.jsonl.part
	mv tests/fixtures/sql/regress.jsonl.part tests/fixtures/sql/regress.jsonl
