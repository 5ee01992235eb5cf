"""A Hugging Face Hub on this machine, as far as pushes and downloads need it: the real client talks to it."""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest


@dataclass
class FakeRepository:
    """A repository: who may see it, and its files."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        """A name of the files' content."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class FakeHub:
    """The repositories of a Hub, by kind and name, and what it refuses: path of a request → status."""

    repositories: dict[str, FakeRepository] = field(default_factory=dict)
    refuses: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        self.requests.append(f"{method} {path}")
        status = next((status for part, status in self.refuses.items() if part in path), None)
        if status is not None:
            return status, {"error": "not today"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            place = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
            if place in self.repositories:
                return 409, {"error": "You already created this repo"}
            is_private = asked.get("private") or asked.get("visibility") == "private"
            self.repositories[place] = FakeRepository(bool(is_private), {".gitattributes": b"*.safetensors filter=lfs"})
            return 200, {"url": f"{self.url}/{asked['organization']}/{asked['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/resolve/" in path:
            place, _, file = path.removeprefix("/").partition("/resolve/")
            return self._file(place, file.partition("/")[2])
        place, _, action = path.removeprefix("/api/").partition("/preupload/")
        if action:
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        place, _, tree = place.partition("/tree/")
        place, _, action = place.partition("/commit/")
        repository = self.repositories.get(place.partition("/revision/")[0])
        if repository is None:
            return 404, {"error": "RepoNotFound"}
        if tree:
            sizes = {name: len(content) for name, content in repository.files.items()}
            kind = {"type": "file"}
            return 200, [{**kind, "path": n, "size": s, "oid": blob_id(repository.files[n])} for n, s in sizes.items()]
        if action:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/{place}/commit/1", "commitOid": "1" * 40}
        siblings = [{"rfilename": name, "blobId": blob_id(content)} for name, content in repository.files.items()]
        known = {"private": repository.private, "sha": repository.commit, "siblings": siblings}
        return 200, {"id": place.partition("/")[2].partition("/revision/")[0], **known}

    def _file(self, place: str, file: str) -> tuple[int, Any]:
        """A file of a repository, or what there is in its place."""
        repository = self.repositories.get(place)
        if repository is None:
            return 404, {"error": "RepoNotFound"}
        content = repository.files.get(file)
        return (404, {"error": "EntryNotFound"}) if content is None else (200, (content, repository.commit))


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """The Hub at an address of its own, in a thread."""

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, found = hub.answer(self.command, self.path.partition("?")[0], body)
            self.send_response(status)
            if isinstance(found, tuple):  # a file and its commit
                content, commit = found
                self.send_header("ETag", f'"{blob_id(content)}"')
                self.send_header("X-Repo-Commit", commit)
            else:
                content = json.dumps(found).encode()
                self.send_header("Content-Type", "application/json")
                if "error" in found:
                    self.send_header("X-Error-Code", found["error"])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = _reply  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def connected(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The Hub, served, as the one that huggingface_hub talks to, with a token and a cache of its own."""
    with serving(hub), tempfile.TemporaryDirectory() as cache:
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
        yield hub
