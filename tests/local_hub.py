"""A small Hugging Face hub on this machine: only the addresses that a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")


class LocalHub:
    """Serves `<folder>/models/<org>/<name>` and `<folder>/datasets/<org>/<name>`.

    The files as they stand are the branch `main`; its commit changes with them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gated: set[str] = set()
        """Repositories that need a token."""
        self.failing: set[str] = set()
        """File names for whose content the server returns an error."""
        self.stated: dict[str, int] = {}
        """Sizes to report instead of the true ones, by file name."""
        self.garbled: set[str] = set()
        """File names to serve with other content of the same length."""
        self.down = False
        """Whether every connection is dropped."""
        self.sent: list[str] = []
        """Files whose content was sent."""
        self.authorised: list[str] = []
        """Authorization headers of the requests."""
        handler = type("Bound", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LocalHub:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def repository(self, kind: str, name: str) -> Path:
        """Creates and returns the folder of a repository; `kind` is models or datasets."""
        folder = self.folder / kind / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(self, repository: Path) -> str:
        """Returns the commit of a repository's present content."""
        digest = hashlib.sha1()
        for file in files_of(repository):
            digest.update(f"{file.relative_to(repository)}\0".encode() + file.read_bytes())
        return digest.hexdigest()


def files_of(repository: Path) -> list[Path]:
    """Returns the files of a repository, sorted."""
    return sorted(path for path in repository.rglob("*") if path.is_file())


def _entry(repository: Path, file: Path, stated: dict[str, int]) -> dict[str, Any]:
    content = file.read_bytes()
    size = stated.get(file.name, len(content))
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    path = str(file.relative_to(repository))
    entry = {"type": "file", "path": path, "size": size, "oid": blob}
    if file.suffix in LFS_SUFFIXES:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def _respond(self) -> None:
        if self.hub.down:
            self.close_connection = True
            return None
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        token = self.headers.get("Authorization")
        if token:
            self.hub.authorised.append(token)
        address = urlsplit(self.path)
        parts = unquote(address.path).strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        if len(parts) < 2:
            return self._refuse(404, "RepoNotFound")
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.hub.folder / kind / name
        if not repository.is_dir():
            return self._refuse(401, "RepoNotFound")
        if name in self.hub.gated and not token:
            return self._refuse(401, "GatedRepo")
        verb, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        commit = self.hub.commit(repository)
        if revision not in ("main", commit):
            return self._refuse(404, "RevisionNotFound")
        if not is_api:
            return self._file(repository, "/".join(rest[2:]), commit)
        if verb == "revision":
            siblings = [{"rfilename": e["path"]} for e in self._tree(repository, "")]
            return self._json({"id": name, "sha": commit, "siblings": siblings, "gated": False})
        if verb == "tree":
            below = "/".join(rest[2:])
            if below and not (repository / below).exists():
                return self._refuse(404, "EntryNotFound")
            deep = "true" in parse_qs(address.query.lower()).get("recursive", [])
            return self._json(self._tree(repository, below, deep=deep))
        if verb == "paths-info":
            wanted = (
                json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            )
            entries = [_entry(repository, repository / path, self.hub.stated) for path in wanted
                     if (repository / path).is_file()]  # fmt: skip
            entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
                      for path in wanted if (repository / path).is_dir()]  # fmt: skip
            return self._json(entries)
        return self._refuse(404, "EntryNotFound")

    def _tree(self, repository: Path, below: str, *, deep: bool = True) -> list[dict[str, Any]]:
        top = repository / below
        if deep:
            return [_entry(repository, file, self.hub.stated) for file in files_of(top)]
        return [
            _entry(repository, path, self.hub.stated) if path.is_file()
            else {"type": "directory", "path": str(path.relative_to(repository)),
                  "oid": "0" * 40, "size": 0}
            for path in sorted(top.iterdir())
        ]  # fmt: skip

    def _file(self, repository: Path, path: str, commit: str) -> None:
        file = repository / path
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", commit)
        entry = _entry(repository, file, self.hub.stated)
        content = file.read_bytes()
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        first = 0
        if span := self.headers.get("Range"):
            first = int(span.removeprefix("bytes=").partition("-")[0])
        if file.name in self.hub.failing and self.command == "GET":
            return self._refuse(500, "InternalError", commit)
        if file.name in self.hub.garbled:
            content = bytes(255 - byte for byte in content)
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(content) - first))
        if span:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        if "lfs" in entry:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.hub.sent.append(path)
        self.wfile.write(content[first:])

    def _json(self, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _refuse(self, code: int, reason: str, commit: str | None = None) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", reason)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()
