"""What all benchmarks share: the programs that they measure, and an end that leaves nothing behind."""

import os
import shutil
import signal
import subprocess
import sys

from clusters import Failed, scratch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Where each program is below the release builds.
PROGRAMS = {"crossfade": "crossfade", "relay": "examples/raw-relay", "generator": "examples/by-hand"}


def program_options(parser):
    about = {"crossfade": "the program", "relay": "bench/raw_relay.rs, built", "generator": "bench/by_hand, built"}
    for name in PROGRAMS:
        parser.add_argument(f"--{name}", help=f"{about[name]}; default: the release build, made now")
    parser.add_argument("--directory", default="/tmp", help="where the clusters live: on the disk that is to be measured")
    parser.add_argument("--out", default=os.path.join(ROOT, "target/bench"), help="where the JSON goes")


def build(options, wanted):
    """The release builds of those wanted that are not named by an option: in one go, or what they share would be built for each."""
    target = os.path.join(ROOT, os.environ.get("CARGO_TARGET_DIR", "target"), "release")
    missing = [name for name in wanted if not getattr(options, name)]
    if not missing:
        return
    command = ["cargo", "build", "--locked", "--release", "--bins", "--examples"]
    print(" ".join(command), flush=True)
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise Failed(f"{' '.join(command)} failed")
    for name in missing:
        setattr(options, name, os.path.join(target, PROGRAMS[name]))


def conduct(name, options, body):
    """body(options, directory, cleanup) in a directory of its own; whatever is in `cleanup` at the end is stopped. Returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    directory, cleanup = scratch(options.directory), []
    try:
        return body(options, directory, cleanup)
    except Failed as failed:
        print(f"{name}: {failed}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    finally:
        for thing in reversed(cleanup):
            thing.stop()
        shutil.rmtree(directory, ignore_errors=True)
