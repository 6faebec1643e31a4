"""Prepare the environment and run the pack in it: `python dev.py demo | test [args] | bench NAME [args] | serve`.

Needs nothing but Python 3.10 or newer. The first run fills `.dev/` with 7 GB; later ones start at once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from devtools.environment.preparation import Layout, PreparationError, find_layout, prepare

REPOSITORY = Path(__file__).resolve().parent
PACKAGES = ["nodes", "smp", "devtools", "benchmarks"]


def main() -> int:
    arguments = parse_arguments(sys.argv[1:])
    try:
        if arguments.command == "bench":
            check_benchmark(arguments.name)
        layout = find_layout()
        prepare(layout)
        if arguments.command == "test":
            return run_checks(layout, arguments.arguments, quick=arguments.quick)
        if arguments.command == "bench":
            return run_module(layout, f"storydiffusion.benchmarks.{arguments.name}", arguments.arguments)
        if arguments.command == "demo":
            return run_module(layout, "storydiffusion.devtools.demo", [])
        port = [] if arguments.port is None else [str(arguments.port)]
        return run_module(layout, "storydiffusion.devtools.serve", port)
    except PreparationError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndev.py: interrupted. The same command goes on from here.", file=sys.stderr)
        return 130


def parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("demo", help="draw a story with the shipped workflow on a small model, into output/")
    test = commands.add_parser("test", help="lint, type check, and all tests; with arguments, pytest with these alone")
    test.add_argument("--quick", action="store_true", help="lint, type check, and the fast tests that need no server")
    bench = commands.add_parser("bench", help="run benchmarks/NAME.py")
    bench.add_argument("name", metavar="NAME")
    bench.add_argument("arguments", nargs=argparse.REMAINDER)
    serve = commands.add_parser("serve", help="start ComfyUI with this pack and the small models")
    serve.add_argument("--port", type=int, help="default: a free one")
    arguments, rest = parser.parse_known_args(words)
    if arguments.command == "test":
        arguments.arguments = rest
    elif rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return arguments


def check_benchmark(name: str) -> None:
    """Refuse an unknown benchmark before anything is installed."""
    folder = REPOSITORY / "benchmarks"
    files, folders = folder.glob("[!_]*.py"), folder.glob("*/__main__.py")
    known = sorted([*(path.stem for path in files), *(path.parent.name for path in folders)])
    if name not in known:
        raise PreparationError(f"bench: there is no benchmark {name!r}. There are: {', '.join(known)}.")


def run_module(layout: Layout, module: str, arguments: list[str]) -> int:
    launcher = str(REPOSITORY / "devtools" / "launch.py")
    return run(layout, [launcher, module, *arguments], REPOSITORY)


def run_checks(layout: Layout, pytest_arguments: list[str], *, quick: bool) -> int:
    """Run every check, also after one has failed; return 0 if all passed. Given arguments, only pytest runs, with them.

    Tests run in a process for each core, up to four: each takes 2 GB of memory.
    """
    if pytest_arguments and not quick:
        return run(layout, ["-m", "pytest", *pytest_arguments], REPOSITORY)
    config = str(REPOSITORY / "pyproject.toml")
    modules = [option for name in PACKAGES for option in ("-p", f"storydiffusion.{name}")]
    typing = ["--config-file", config, "--cache-dir", str(layout.dev / "mypy_cache")]
    processes = ["-n", str(min(os.cpu_count() or 1, 4))]
    fast = ["-m", "not slow", "--ignore", "tests/server"] if quick else []
    checks = {
        "lint": (["-m", "ruff", "check", "."], REPOSITORY),
        "format": (["-m", "ruff", "format", "--check", "."], REPOSITORY),
        "types": (["-m", "mypy", *typing, "-m", "storydiffusion", *modules], layout.typecheck),
        "types of dev.py": (["-m", "mypy", *typing, "--explicit-package-bases", "dev.py"], REPOSITORY),
        "tests": (["-m", "pytest", *processes, *fast, *pytest_arguments], REPOSITORY),
    }
    failed = []
    for name, (command, folder) in checks.items():
        print(f"[{name}]", flush=True)
        if run(layout, command, folder) != 0:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "All checks passed.")
    return 1 if failed else 0


def run(layout: Layout, command: list[str], folder: Path) -> int:
    """Run the prepared environment's Python with `command` and return its exit status."""
    environment = {**layout.environment, "MYPYPATH": str(layout.typecheck)}
    process = subprocess.Popen([str(layout.python), *command], cwd=folder, env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return process.wait()  # the terminal sent it to the child as well, which ends in its own way


if __name__ == "__main__":
    sys.exit(main())
