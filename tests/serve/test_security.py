"""Who may use a server, and what it tells."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AuthenticationError, OpenAI

from tests.serve.servers import Server, get, post, serving

SMALL = ("--max-num-seqs", "2", "--max-num-batched-tokens", "64")
SECRET = "a very private prompt"


@pytest.fixture(scope="module")
def locked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With two keys, logs as JSON, and a page of somebody else's that may ask."""
    keys = ("--api-key", "first-key", "--api-key", "second-key", "--cors-origin", "https://a.example")
    folder = tmp_path_factory.mktemp("locked")
    with serving(str(model), *SMALL, *keys, "--log-format", "json", folder=folder) as server:
        yield server


PATHS = ("/", "/v1/models", "/metrics", "/version", "/graphs", "/openapi.json", "/no/such/path")


@pytest.mark.parametrize("path", PATHS)
def test_every_path_but_health_asks_for_a_key(locked: Server, path: str) -> None:
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "Basic !"},
    ):
        status, data, answer = get(locked.url + path, headers)
        assert status == 401
        assert json.loads(data)["error"]["type"] == "authentication_error"
        assert "Basic" in answer["www-authenticate"]
    known = get(locked.url + path, {"authorization": "Bearer second-key"})[0]
    assert known == (404 if path == "/no/such/path" else 200)


def test_health_asks_for_no_key(locked: Server) -> None:
    assert get(f"{locked.url}/health")[0] == 200
    assert get(f"{locked.url}/health/")[0] == 401


def test_the_official_client_with_a_key_and_without(locked: Server) -> None:
    def ask(key: str) -> int:
        client = OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0)
        return len(client.completions.create(model="tiny", prompt="a", max_tokens=2).choices)

    assert ask("first-key") == ask("second-key") == 1
    for wrong in ("first-ke", "first-keyy", "x"):
        with pytest.raises(AuthenticationError):
            ask(wrong)


def test_a_browser_may_send_the_key_as_a_password(locked: Server) -> None:
    basic = base64.b64encode(b"me:first-key").decode()
    assert get(f"{locked.url}/", {"authorization": f"Basic {basic}"})[0] == 200


def test_other_peoples_pages(locked: Server, server: Server) -> None:
    """CORS is off unless an origin was named; and a page cannot send JSON without asking first."""
    key = {"authorization": "Bearer first-key"}
    allowed = get(f"{locked.url}/v1/models", key | {"origin": "https://a.example"})[2]
    assert allowed["access-control-allow-origin"] == "https://a.example"
    for url, headers in ((locked.url, key), (server.url, {})):
        answer = get(f"{url}/v1/models", headers | {"origin": "https://evil.example"})[2]
        assert "access-control-allow-origin" not in answer
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, answer, _ = post(f"{server.url}/v1/completions", {"prompt": "a"}, {"content-type": kind})
        assert status == 415
        assert "application/json" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        *(("localhost:8000", True), ("127.0.0.1", True), ("[::1]:8000", True), ("a.localhost", True)),
        *(("evil.example", False), ("evil.example:8000", False), ("127.0.0.1.evil.example", False)),
    ],
)
def test_names_that_were_pointed_here(server: Server, host: str, allowed: bool) -> None:
    status, data, _ = get(f"{server.url}/v1/models", {"host": host})
    assert status == (200 if allowed else 403)
    assert allowed or "--allowed-host" in json.loads(data)["error"]["message"]


def test_a_name_is_no_matter_where_there_is_a_key(locked: Server) -> None:
    headers = {"host": "models.example", "authorization": "Bearer first-key"}
    assert get(f"{locked.url}/v1/models", headers)[0] == 200


def test_prompts_and_ids_are_not_logged(locked: Server) -> None:
    key = {"authorization": "Bearer first-key"}
    answer = post(f"{locked.url}/v1/completions", {"prompt": SECRET, "max_tokens": 2}, key)[1]
    post(f"{locked.url}/v1/completions", {"prompt": SECRET, "max_tokens": -2}, key)
    assert answer["id"] not in locked.log
    for private in (SECRET, "first-key", "second-key"):
        assert private not in locked.log


def test_json_logs_are_one_object_a_line(locked: Server) -> None:
    lines = [json.loads(line) for line in locked.log.splitlines()]
    assert {"time", "level", "logger", "message"} <= set(lines[0])
    said = [line["message"] for line in lines]
    for stage in ("open", "weights", "KV cache", "tokenizer", "engine ready"):
        (line,) = [text for text in said if text.startswith(f"start: {stage}, ")]
        assert " s, " in line
        assert line.endswith(" bytes")


def test_prompts_are_logged_when_asked_and_the_world_is_warned_of(model: Path, tmp_path: Path) -> None:
    options = ("--log-prompts", "--host", "0.0.0.0")
    with serving(str(model), *SMALL, *options, folder=tmp_path, env={"OSTINATO_API_KEY": ""}) as server:
        answer = post(
            f"{server.url}/v1/completions",
            {"prompt": SECRET, "max_tokens": 2, "user": "ada\nforged: line\x1b[2J"},
        )[1]
        assert answer["id"] in server.log
        assert SECRET in server.log
        assert "ada" in server.log
        assert not any(line.startswith("forged") for line in server.log.splitlines())
        assert "\x1b" not in server.log
        page = get(f"{server.url}/")[2]
        assert "frame-ancestors 'none'" in page["content-security-policy"]
        assert "WARNING" in server.log
        assert "without a key" in server.log


def test_tls_and_the_key_from_the_environment(model: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("needs openssl to make a certificate")
    options = ("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate))
    env = {"OSTINATO_API_KEY": "from-the-environment"}
    with serving(str(model), *SMALL, *options, folder=tmp_path, env=env) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        request = urllib.request.Request(
            f"{server.url}/version", headers={"authorization": "Bearer from-the-environment"}
        )
        with urllib.request.urlopen(request, context=context, timeout=30) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{server.url}/version", context=context, timeout=30)
