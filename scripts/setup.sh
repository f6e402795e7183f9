#!/usr/bin/env bash
# Sees to what the tests and the demo need: a PostgreSQL server, Python with the drivers, cargo-deny, the crates.
#
#   scripts/setup.sh             all of it
#   scripts/setup.sh postgres    the server alone (all that the demo needs)
#
# What is there is left as it is. What is missing is installed: system packages with apt-get (as root, or through sudo),
# all else below target/. Runs on Debian and Ubuntu; elsewhere it names what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

CARGO_DENY_VERSION=0.20.2

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# Runs as root, or says what to run.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "this needs root, and there is no sudo. Run as root: $*"
    fi
}

apt_updated=
apt_install() {
    command -v apt-get >/dev/null || fail "missing: $*. There is no apt-get here: install them yourself and run this again."
    say "installing $* (apt-get)"
    if [ -z "$apt_updated" ]; then
        as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q
        apt_updated=yes
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"
}

# The directory of the newest server that has all we need: the same places, in the same order, as src/cluster/programs.rs.
postgres_bindir() {
    local dir
    for dir in "${CROSSFADE_PG_BIN:-}" $(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -t/ -k5,5nr) \
        "$(pg_config --bindir 2>/dev/null || true)" ${PATH//:/ }; do
        if [ -n "$dir" ] && [ -x "$dir/initdb" ] && [ -x "$dir/postgres" ]; then
            echo "$dir"
            return
        fi
    done
    return 1
}

setup_postgres() {
    if ! postgres_bindir >/dev/null; then
        # Installing Debian's server would also make and start a cluster on port 5432, which nobody here asked for.
        apt_install postgresql-common
        if [ -f /etc/postgresql-common/createcluster.conf ]; then
            say "create_main_cluster = false in /etc/postgresql-common/createcluster.conf: no server is started by the package"
            as_root sed -i -E 's/^#?create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
        fi
        apt_install postgresql postgresql-contrib
    fi
    local bindir program
    bindir=$(postgres_bindir) || fail "PostgreSQL's server programs are still missing"
    for program in psql pgbench; do
        [ -x "$bindir/$program" ] || command -v "$program" >/dev/null || fail "$program is missing: install PostgreSQL's client programs and contrib"
    done
    command -v find >/dev/null || apt_install findutils
    if [ "$(id -u)" = 0 ] && ! id postgres >/dev/null 2>&1 && ! id nobody >/dev/null 2>&1; then
        fail "PostgreSQL does not run as root: add an account named postgres"
    fi
    say "PostgreSQL: $("$bindir/postgres" --version), in $bindir"
}

# For tests/pooler.rs alone, which tests nothing where it cannot be had, and says so.
setup_pgbouncer() {
    if ! PATH=$PATH:/usr/sbin command -v pgbouncer >/dev/null; then
        if ! (apt_install pgbouncer); then
            say "PgBouncer is missing: tests/pooler.rs will test nothing"
            return
        fi
        say "PgBouncer's own service is not used here: systemctl disable --now pgbouncer"
    fi
    say "$(PATH=$PATH:/usr/sbin pgbouncer --version | head -1)"
}

# For tests/clocks.rs alone, likewise.
setup_faketime() {
    if ! compgen -G '/usr/lib/*/faketime/libfaketime.so.1' >/dev/null && ! (apt_install libfaketime); then
        say "libfaketime is missing: tests/clocks.rs will test nothing"
    fi
}

setup_python() {
    local venv=target/venv python=${PYTHON:-python3}
    if ! "$venv/bin/python" -c 'import psycopg, psycopg_binary, asyncpg' 2>/dev/null; then
        if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
            apt_install python3 python3-venv
        fi
        say "Python drivers in $venv"
        rm -rf "$venv"
        "$python" -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check -r tests/drivers/requirements.txt ||
            fail "pip could not install the drivers of tests/drivers/requirements.txt"
    fi
    say "drivers: $("$venv/bin/python" -c 'import psycopg, asyncpg; print("psycopg", psycopg.__version__ + ", asyncpg", asyncpg.__version__)')"
}

setup_rust() {
    command -v cargo >/dev/null || fail "Rust is missing: see https://rustup.rs"
    command -v cc >/dev/null || apt_install build-essential
    # cargo-deny's offline checks, and every later build, look at all crates, those of other systems too.
    cargo fetch --locked --quiet
    local tools=$PWD/target/tools
    if ! "$tools/bin/cargo-deny" --version 2>/dev/null | grep -qF "$CARGO_DENY_VERSION"; then
        say "building cargo-deny $CARGO_DENY_VERSION in target/tools (about a minute)"
        # Unoptimised: it runs for a second, and an optimised build takes five times as long.
        CARGO_TARGET_DIR=$tools/build CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_DEV_OPT_LEVEL=0 \
            cargo install cargo-deny --version "=$CARGO_DENY_VERSION" --locked --debug --no-default-features --quiet --root "$tools"
        rm -rf "$tools/build"
    fi
    say "$("$tools/bin/cargo-deny" --version)"
}

case ${1:-all} in
    all)
        setup_postgres
        setup_pgbouncer
        setup_faketime
        setup_python
        setup_rust
        ;;
    postgres) setup_postgres ;;
    *) fail "usage: scripts/setup.sh [postgres]" ;;
esac
