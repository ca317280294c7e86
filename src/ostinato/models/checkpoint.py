"""What a model's files say: config, tensors by name, tokenizer. The same for both formats.

A Hugging Face folder and a GGUF file look alike from here: config keys and tensor names are
Hugging Face's, shapes are PyTorch's. Sizes are checked when a checkpoint is opened, before
any weight is read. Pickle files are never loaded. Knows nothing of what a model computes.
"""

from __future__ import annotations

import fnmatch
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from ..tokenizer import Tokenizer

__all__ = ["Checkpoint", "SafetensorsCheckpoint", "TensorInfo", "open_checkpoint"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the file stores it."""

    shape: tuple[int, ...]
    dtype: str
    """The file's own name of the element type: "F32", "F16", "BF16", "Q4_1", ..."""


class Checkpoint(ABC):
    """An opened model. Reading a tensor touches the disk; everything else is in memory."""

    path: Path
    """The folder or the .gguf file."""
    config: Mapping[str, Any]
    """As config.json has it; for GGUF made from the metadata."""
    generation_config: Mapping[str, Any]
    """As generation_config.json has it, {} if there is none; `eos_token_id` may be an int or a list."""
    tensors: Mapping[str, TensorInfo]
    """By Hugging Face name."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the stored type; quantised ones become float32.

        It may be backed by the file: do not write to it.

        Raises:
            CheckpointError: no such tensor, or it cannot be read.
        """

    @abstractmethod
    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the model.

        Raises:
            TokenizerError: there is none, or it cannot be used.
        """

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor {name!r} among {len(self.tensors)}") from None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face folder or a .gguf file and check that it is whole.

    Raises:
        ModelNotFoundError: nothing there.
        CheckpointError: a file is missing, damaged, not readable, or shorter than its header says.
        UnsupportedModelError: the weights are pickles, or of a type that cannot be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return SafetensorsCheckpoint(path)
        if path.is_file():
            from .gguf import GGUFCheckpoint

            return GGUFCheckpoint(path)
    except PermissionError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read: permission denied; "
            "give this user the right to read the model's folder and files"
        ) from error
    raise ModelNotFoundError(f"no such file or folder: {path.absolute()}")


class SafetensorsCheckpoint(Checkpoint):
    """A folder with config.json and one or many .safetensors files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not _exists(path / "config.json"):
            raise CheckpointError(
                f"{path} has no config.json; a model folder needs one, or pass a .gguf file instead of a folder"
            )
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if _exists(generation) else {}
        self._handles: dict[str, Any] = {}
        tensors: dict[str, TensorInfo] = {}
        wanted = _index(path)
        files = sorted(set(wanted.values())) if wanted is not None else _weight_files(path)
        for file in files:
            handle, found = _open_safetensors(path / file)
            for name, info in found.items():
                if wanted is not None and wanted.get(name) != file:
                    continue  # the index is the authority on which copy counts
                if name in tensors:
                    raise CheckpointError(f"{path / file}: tensor {name!r} is in another file too")
                tensors[name] = info
                self._handles[name] = handle
        for name, file in (wanted or {}).items():
            if name not in tensors:
                raise CheckpointError(f"{path / file} has no tensor {name!r}, which the index promises")
        self.tensors = tensors

    def read(self, name: str) -> torch.Tensor:
        self._info(name)
        try:
            tensor: torch.Tensor = self._handles[name].get_tensor(name)
        except Exception as error:  # the Rust library raises types of its own
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error
        return tensor

    def load_tokenizer(self) -> Tokenizer:
        from ..tokenizer import Tokenizer

        return Tokenizer.from_folder(self.path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object; anything else is a `CheckpointError` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def _exists(file: Path) -> bool:
    """Unlike `is_file`, this raises where the folder may not be entered, instead of finding nothing."""
    try:
        file.stat()
    except FileNotFoundError:
        return False
    return True


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _index(path: Path) -> dict[str, str] | None:
    """Tensor name to file name, from model.safetensors.index.json; None if there is none."""
    index = path / "model.safetensors.index.json"
    if not _exists(index):
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        # A path that leads out of the folder is not a shard.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: {name!r} is in {file!r}, expected the name of a .safetensors file"
            )
    missing = sorted({file for file in weight_map.values() if not _exists(path / file)})
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(set(weight_map.values()))} weight files are missing, "
            f"first {missing[0]}; download the model again"
        )
    return weight_map


def _weight_files(path: Path) -> list[str]:
    if _exists(path / "model.safetensors"):
        return ["model.safetensors"]
    names = sorted(os.listdir(path))  # raises where the folder may not be read; glob would find nothing
    files = fnmatch.filter(names, "*.safetensors")
    if files:
        return files
    pickles = [name for pattern in _PICKLES for name in fnmatch.filter(names, pattern)]
    if pickles:
        raise UnsupportedModelError(
            f"{path} has its weights only as pickle ({pickles[0]}), which is never loaded because it can run "
            f"code. Convert it where you trust it: transformers' `AutoModelForCausalLM.from_pretrained(folder)"
            f".save_pretrained(new_folder)` writes safetensors"
        )
    gguf = fnmatch.filter(names, "*.gguf")
    hint = f"; pass {path / gguf[0]} to load the GGUF file" if gguf else ""
    raise CheckpointError(f"{path} has no .safetensors file{hint}")


def _open_safetensors(file: Path) -> tuple[Any, dict[str, TensorInfo]]:
    """A memory-mapped handle and what it holds. The library checks the header against the file's size."""
    from safetensors import safe_open

    try:
        with file.open("rb"):  # the library does not tell a file that may not be read from a damaged one
            pass
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {_reason(error)}") from error
    try:
        handle: Any = safe_open(str(file), framework="pt", device="cpu")
        found = {}
        for name in handle.keys():  # noqa: SIM118  not a mapping
            view = handle.get_slice(name)
            found[name] = TensorInfo(tuple(view.get_shape()), str(view.get_dtype()))
    except Exception as error:  # the Rust library raises types of its own
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file: {error}; download it again"
        ) from error
    return handle, found
