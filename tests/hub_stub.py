"""A stand-in for the Hugging Face hub, over HTTP on this machine: the real client talks to it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

CHUNK = 1 << 14


def commit_of(text: str) -> str:
    """A commit's 40 hex digits, by a word that tells it from others."""
    return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class HubRepo:
    revisions: dict[str, str]  # branch or tag: commit
    commits: dict[str, dict[str, bytes]]  # commit: name: content
    status: int = 200  # of every answer
    error_code: str = ""  # as the hub's header X-Error-Code has it
    sizes: dict[str, int] = field(default_factory=dict)  # what the hub says of files, where it is not so


class HubStub:
    """In a `with` block it answers on .endpoint; .requests are the paths that were asked for."""

    def __init__(self) -> None:
        self.repos: dict[str, HubRepo] = {}
        self.requests: list[tuple[str, str]] = []
        self.hold = threading.Event()  # while it is clear, contents of weights stop half-way
        self.hold.set()
        self.held = threading.Event()  # one of them has
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stub.answer(self)

            def do_HEAD(self) -> None:
                stub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def add(
        self, repo: str, files: Mapping[str, bytes] | Path, commit: str = "one", branch: str = "main"
    ) -> str:
        """Puts files, or a directory's, into a repository as what a branch means from now on."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        held = self.repos.setdefault(repo, HubRepo({}, {}))
        held.revisions[branch] = commit_of(commit)
        held.commits[commit_of(commit)] = dict(files)
        return commit_of(commit)

    def downloads(self, ending: str = ".safetensors") -> list[str]:
        """The files whose contents were sent."""
        names = (path.rpartition("/")[2] for method, path in self.requests if method == "GET")
        return [name for name in names if name.endswith(ending)]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path))
        owner_and_name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        repo = self.repos.get(owner_and_name)
        if repo is None:
            self._send(request, 404, {"X-Error-Code": "RepoNotFound"})
        elif repo.status != 200:
            self._send(request, repo.status, {"X-Error-Code": repo.error_code} if repo.error_code else {})
        elif path.startswith("/api/models/"):
            self._answer_api(request, repo, owner_and_name, path)
        else:
            _, _, rest = path.partition("/resolve/")
            commit, _, name = rest.partition("/")
            content = repo.commits.get(repo.revisions.get(commit, commit), {}).get(name)
            if content is None:
                self._send(request, 404, {"X-Error-Code": "EntryNotFound"})
            else:
                etag = hashlib.sha256(content).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
                headers["Content-Disposition"] = f'inline; filename="{name}";'  # what the bar shows
                self._send(request, 200, headers, content)

    def _answer_api(self, request: BaseHTTPRequestHandler, repo: HubRepo, id: str, path: str) -> None:
        kind, _, rest = path.removeprefix(f"/api/models/{id}").strip("/").partition("/")
        revision = rest or "main"
        commit = repo.revisions.get(revision, revision)
        if commit not in repo.commits and commit not in repo.revisions.values():
            self._send(request, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        files = {name: repo.sizes.get(name, len(content)) for name, content in repo.commits[commit].items()}
        answer: Any
        if kind == "tree":
            answer = [
                {"type": "file", "path": name, "size": size, "oid": commit_of(name)}
                for name, size in files.items()
            ]
        else:
            siblings = [{"rfilename": name, "size": size} for name, size in files.items()]
            answer = {"id": id, "sha": commit, "siblings": siblings}
        self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes = b""
    ) -> None:
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        half = len(content) // 2 if request.path.endswith((".safetensors", ".gguf")) else len(content)
        request.wfile.write(content[:half])
        if half < len(content):
            request.wfile.flush()
            if not self.hold.is_set():
                self.held.set()
                self.hold.wait(60)
            request.wfile.write(content[half:])

    def __enter__(self) -> HubStub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()
