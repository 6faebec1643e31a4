"""Every test runs against the real host: COMFYUI_PATH names it, `python dev.py test` sets it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # A thread for each worker, and for the server that one of them starts: more would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

DEVTOOLS = str(Path(__file__).resolve().parents[1] / "devtools")

sys.path.insert(0, DEVTOOLS)
import pack_alias  # noqa: E402

sys.path.remove(DEVTOOLS)

if TYPE_CHECKING:
    from storydiffusion.devtools.drivers.server import ComfyServer

if "COMFYUI_PATH" not in os.environ:
    raise SystemExit("COMFYUI_PATH is not set. Run the tests with `python dev.py test`.")
COMFYUI = Path(os.environ["COMFYUI_PATH"]).resolve()
PACK_ROOT = pack_alias.PACK_ROOT
SERVER_TESTS = "tests/server/"
_arguments = sys.argv
pack_alias.register(COMFYUI)
pack_alias.start_comfy(cpu=True)
sys.argv = _arguments
# A run that is told to end (a time limit does that) ends as with Ctrl+C, so that the server fixture stops its process.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-contracts",
        action="store_true",
        help="write the snapshot of /object_info anew, where a change is meant",
    )


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file go to one process, and those on the server to one: they share what is made for them."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return SERVER_TESTS if nodeid.startswith(SERVER_TESTS) else nodeid.split("::")[0]

    return Scheduler(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Tests on the server come first: they are the longest that one process has to do."""
    for item in items:
        if "server" in getattr(item, "fixturenames", ()) and not item.nodeid.startswith(SERVER_TESTS):
            raise pytest.UsageError(f"{item.nodeid} asks for the server: move it to {SERVER_TESTS}.")
    yield  # here others sort
    items.sort(key=lambda item: not item.nodeid.startswith(SERVER_TESTS))


@pytest.fixture(scope="session")
def models() -> Path:
    """Return the models folder; checkpoints are made there once and kept between runs."""
    return PACK_ROOT / ".dev" / "models"


@pytest.fixture(scope="session")
def tiny_sd15_file(models: Path) -> Path:
    from storydiffusion.devtools.tiny.checkpoints import TINY_SD15, ensure_checkpoint

    return ensure_checkpoint(TINY_SD15, models / "checkpoints")


@pytest.fixture(scope="session")
def tiny_sdxl_file(models: Path) -> Path:
    from storydiffusion.devtools.tiny.checkpoints import TINY_SDXL, ensure_checkpoint

    return ensure_checkpoint(TINY_SDXL, models / "checkpoints")


@pytest.fixture(scope="session")
def tiny_dit_file(models: Path) -> Path:
    from storydiffusion.devtools.tiny.checkpoints import ensure_dit

    return ensure_dit(models / "diffusion_models")


@pytest.fixture(scope="session")
def tiny_sd15(tiny_sd15_file: Path) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a small SD1.5, through the host's own loader."""
    return _load_checkpoint(tiny_sd15_file)


@pytest.fixture(scope="session")
def tiny_sdxl(tiny_sdxl_file: Path) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a small SDXL, through the host's own loader."""
    return _load_checkpoint(tiny_sdxl_file)


def _load_checkpoint(path: Path) -> tuple[Any, Any, Any]:
    import comfy.sd

    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(path))
    return model, clip, vae


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """One real server with this pack for all tests; models that appear later in `models` are found too."""
    from storydiffusion.devtools.drivers.server import ComfyServer

    folder = tmp_path_factory.mktemp("server")
    models.mkdir(parents=True, exist_ok=True)
    with ComfyServer(COMFYUI, folder / "base", models, cpu=True, log=folder / "log.txt") as running:
        yield running


@pytest.fixture(scope="session")
def chromium() -> str:
    """A Chromium that is installed; without one its tests are skipped, but not under CI."""
    from storydiffusion.devtools.drivers.browser import find_chromium

    executable = find_chromium()
    if executable is None:
        reason = "no Chromium is installed: the workflows were not tried in the front end"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}, and under CI they must be")
        pytest.skip(reason)
    return executable
