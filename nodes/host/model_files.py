"""Files of weights in the host's model folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths


def register_model_folder(name: str, extensions: set[str]) -> None:
    """Add `models/<name>` to the host's model folders, beside what other packs registered under that name.

    The host gives a folder it doesn't know an empty set of extensions, which lists every file.
    """
    folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
    paths, known = folder_paths.folder_names_and_paths[name]
    folder_paths.folder_names_and_paths[name] = (paths, known | extensions)


def read_weights(path: str | Path, kind: str) -> Mapping[str, Any]:
    """Named weights of a file, which may hold nothing else; `kind` says in messages what it should be.

    Raises:
        ValueError: a damaged file, or one that would have to run code to be read; the message names it.
    """
    name = Path(path).name
    try:
        content = comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception as error:  # each format has errors of its own, some of which advise to read without safety
        raise ValueError(
            f"{name} can't be read as a file of weights. It may be damaged (download it again), or hold more than "
            f"weights, which is not loaded for safety ({type(error).__name__})."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} holds a {type(content).__name__}; {kind} file holds named weights.")
    return content
