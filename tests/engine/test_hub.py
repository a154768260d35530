"""Models by name, against a small server that speaks the hub's protocol on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from trichord import LLM, GGUFFile
from trichord.errors import GGUFError, RequestError
from trichord.hub import choose, find_model, names_model
from trichord.split import split_file

COMMIT = hashlib.sha1(b"commit").hexdigest()


class Hub:
    """Repositories of files, the requests that came, and files whose first transfer breaks off half-way."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.breaks_off: Counter[str] = Counter()
        self.sent: list[tuple[str, int, int]] = []  # file, first byte, bytes

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(handler) -> None:
                self.answer(handler)

            def do_GET(handler) -> None:
                self.answer(handler)

            def log_message(handler, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        if about := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            files = self.repositories.get(about[1])
            if files is None:
                return self.refuse(handler, 401, "RepoNotFound")
            siblings = [{"rfilename": name} for name in files]
            return self.send(handler, json.dumps({"id": about[1], "sha": COMMIT, "siblings": siblings}).encode())
        repository, name = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path).groups()
        if repository in self.gated:
            return self.refuse(handler, 403, "GatedRepo")
        return self.send_file(handler, name, self.repositories[repository][name])

    def refuse(self, handler: BaseHTTPRequestHandler, status: int, code: str) -> None:
        handler.send_response(status)
        handler.send_header("X-Error-Code", code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def send(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def send_file(self, handler: BaseHTTPRequestHandler, name: str, data: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        handler.send_response(206 if asked else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        if asked:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.end_headers()
        if handler.command == "GET":
            stop = len(data)
            if self.breaks_off[name]:
                self.breaks_off[name] -= 1
                stop = start + (len(data) - start) // 2
                handler.close_connection = True
            self.sent.append((name, start, stop - start))
            handler.wfile.write(data[start:stop])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)  # what is not yet a whole one of these is lost
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_a_model_by_name_is_fetched_once(hub, model, monkeypatch):
    data = model.read_bytes()
    hub.repositories["ann/tiny-GGUF"] = {"README.md": b"x", "tiny-Q4_K_M.gguf": data, "tiny-Q8_0.gguf": b"no"}
    path = find_model("ann/tiny-GGUF")
    assert path.name == "tiny-Q4_K_M.gguf" and path.read_bytes() == data
    llm = LLM("hf.co/ann/tiny-GGUF:q4_k_m", device="cpu")
    assert Path(llm.file.path) == path
    assert hub.sent == [("tiny-Q4_K_M.gguf", 0, len(data))]
    hub.server.shutdown()
    hub.server.server_close()  # without a network what was fetched serves on
    assert find_model("https://huggingface.co/ann/tiny-GGUF") == path
    with pytest.raises(RequestError, match=r"no model for Q8_0"):
        find_model("ann/tiny-GGUF:Q8_0")
    with pytest.raises(GGUFError, match=r"bob/other on 127.*cannot be read, and nothing of it was fetched before"):
        find_model("bob/other")


def test_a_transfer_that_breaks_off_is_resumed(hub, model):
    data = model.read_bytes()
    hub.repositories["ann/tiny"] = {"tiny.gguf": data}
    hub.breaks_off["tiny.gguf"] = 1
    assert find_model("ann/tiny").read_bytes() == data
    (_, _, half), (_, start, rest) = hub.sent
    assert 0 < start <= half < len(data) and start + rest == len(data)


def test_all_parts_of_a_split_model_are_fetched(hub, model, tmp_path):
    parts = split_file(model, tmp_path / "tiny-Q4_K_M", max_tensors=8)
    assert len(parts) > 2
    files = {f"Q4_K_M/{part.name}": part.read_bytes() for part in parts}
    hub.repositories["ann/big"] = {**files, "mmproj-Q4_K_M.gguf": b"no"}
    with GGUFFile(find_model("ann/big")) as file, GGUFFile(model) as whole:
        assert file.tensors.keys() == whole.tensors.keys()
    del hub.repositories["ann/big"][f"Q4_K_M/{parts[1].name}"]
    with pytest.raises(GGUFError, match=rf"ann/big on .* has {len(parts) - 1} of the {len(parts)} parts"):
        find_model("ann/big")


def test_what_cannot_be_had(hub, model):
    hub.repositories |= {"ann/gated": {"a.gguf": b"x"}, "ann/empty": {"model.safetensors": b"x"}}
    hub.gated.add("ann/gated")
    with pytest.raises(GGUFError, match=r"^ann/none: there is no such file, and no such repository"):
        find_model("ann/none")
    with pytest.raises(GGUFError, match=r"a\.gguf of ann/gated .* terms must be accepted"):
        find_model("ann/gated")
    with pytest.raises(RequestError, match=r"ann/empty on .* has no GGUF model"):
        find_model("ann/empty")


def test_the_command_line_takes_names(hub, model, tmp_path):
    hub.repositories["ann/tiny"] = {"tiny-f16.gguf": model.read_bytes()}
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}

    def trichord(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trichord.cli", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    assert json.loads(trichord("info", "ann/tiny", "--json").stdout)["architecture"] == "llama"
    assert trichord("split", "ann/tiny:F16", str(tmp_path / "part"), "--max-tensors", "20").returncode == 0
    missing = trichord("run", "ann/tiny:Q2_K", "hello")
    assert missing.returncode == 1 and missing.stdout == ""
    assert re.fullmatch(r"trichord: error: ann/tiny on .* no model for Q2_K: .* a colon: f16\.\n", missing.stderr)


FILES = [
    "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-UD-Q4_K_M.gguf", "m.IQ2_XS.gguf", "BF16/m-BF16-00001-of-00002.gguf",
    "BF16/m-BF16-00002-of-00002.gguf", "mmproj-m-F16.gguf", "m.imatrix.gguf", "config.json",
]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "tag", "chosen"),
    [
        (FILES, "Q4_K_S", ["m-Q4_K_S.gguf"]),
        (FILES, "ud-q4_k_m", ["m-UD-Q4_K_M.gguf"]),
        (FILES, "iq2_xs", ["m.IQ2_XS.gguf"]),
        (FILES, "m-Q4_K_M.gguf", ["m-Q4_K_M.gguf"]),
        (FILES, "BF16", ["BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf"]),
        (["a/x_q4_k_m.gguf", "x_q8_0.gguf"], None, ["a/x_q4_k_m.gguf"]),
        (["x.gguf", "mmproj.gguf"], None, ["x.gguf"]),
    ],
)
def test_which_files_a_tag_means(files, tag, chosen):
    assert choose(reversed(files), tag, "a/b") == chosen


@pytest.mark.parametrize(
    ("files", "tag", "has", "choices"),
    [
        (FILES, None, "several models for Q4_K_M", "Q4_K_M, UD-Q4_K_M"),
        (FILES, "Q4_K", "no model for Q4_K", "BF16, Q4_K_M, Q4_K_S, UD-Q4_K_M, IQ2_XS"),
        (["x-Q8_0.gguf", "y-Q8_0.gguf"], None, "several models", "x-Q8_0, y-Q8_0"),
    ],
)
def test_the_choices_are_listed(files, tag, has, choices):
    with pytest.raises(RequestError) as caught:
        choose(files, tag, "a/b")
    assert str(caught.value) == f"a/b has {has}: put one of these after a colon: {choices}."


def test_a_path_on_disk_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names_model("ann/tiny") and names_model("hf.co/ann/tiny:Q4_0") and names_model("x.gguf")
    assert not names_model("hello") and not names_model("./ann/tiny") and not names_model("a\0b" * 3000)
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "tiny").write_bytes(b"")
    assert find_model("ann/tiny") == Path("ann/tiny")
    for missing in ("absent.gguf", "dir/absent.gguf", "./ann/absent", "/ann/absent", "hello"):
        with pytest.raises(GGUFError, match=re.escape(f"{missing}: there is no such file")):
            find_model(missing)
