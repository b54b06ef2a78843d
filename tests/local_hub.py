"""A hub on this machine: what its clients ask for when they create a repository, commit files, look it up and download, over real HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".json.large")  # kept apart from git, as hubs keep weights


class LocalHub:
    """Repositories by id, each a mapping of paths to contents.

    Attributes:
        endpoint: What ``HF_ENDPOINT`` must be for clients.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint, self.repos, self.blobs = endpoint, {}, {}
        self.lock = threading.Lock()

    def commit(self, repo: str) -> str:
        """Identifies the state of a repository."""
        state = sorted((path, hashlib.sha256(content).hexdigest()) for path, content in self.repos[repo].items())
        return hashlib.sha1(json.dumps(state).encode()).hexdigest()


class _Missing(Exception):
    """Answered with status 404 and the hub's name for what is missing."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *args):
        pass

    def do_POST(self):
        self._answer(
            ("/api/repos/create", self._create),
            ("/api/validate-yaml", lambda body: {"errors": [], "warnings": []}),
            ("/api/models/(.+)/preupload/main", self._preupload),
            (r"/(.+)\.git/info/lfs/objects/batch", self._batch),
            ("/api/models/(.+)/commit/main", self._commit),
        )

    def do_PUT(self):
        self._answer(("/blobs/([0-9a-f]{64})", self._store))

    def do_GET(self):
        self._answer(
            ("/api/models/([^/]+/[^/]+)(?:/revision/.+)?", self._info),
            ("/api/models/(.+)/tree/([^/]+)(/.*)?", self._tree),
            ("/(.+)/resolve/([^/]+)/(.+)", self._file),
        )

    do_HEAD = do_GET

    def _answer(self, *routes):
        path = unquote(urlsplit(self.path).path)
        body = (
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "chunked" not in self.headers.get("Transfer-Encoding", "")
            else self._chunks()
        )
        try:
            found = next(((match, act) for pattern, act in routes if (match := re.fullmatch(pattern, path))), None)
            if found is None:
                raise _Missing("EntryNotFound")
            with self.hub.lock:
                answer = found[1](*found[0].groups(), *([body] if self.command in ("POST", "PUT") else []))
        except _Missing as missing:
            self._send(404, b"{}", {"X-Error-Code": str(missing)})
            return
        content, headers = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {"Content-Type": "application/json"})
        self._send(200, content, headers)

    def _chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repo(self, repo):
        if repo not in self.hub.repos:
            raise _Missing("RepoNotFound")
        return self.hub.repos[repo]

    def _create(self, body):
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        self.hub.repos.setdefault(repo, {})
        return {"url": f"{self.hub.endpoint}/{repo}", "id": repo}

    def _preupload(self, repo, body):
        self._repo(repo)
        return {
            "files": [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
        }

    def _batch(self, repo, body):
        self._repo(repo)
        objects = json.loads(body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/blobs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _store(self, oid, body):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        return {}

    def _commit(self, repo, body):
        files = self._repo(repo)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        return {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{self.hub.commit(repo)}", "commitOid": self.hub.commit(repo)}

    def _info(self, repo):
        files = [{"rfilename": path} for path in self._repo(repo)]
        return {"_id": repo, "id": repo, "modelId": repo, "sha": self.hub.commit(repo), "siblings": files, "private": False, "tags": []}

    def _tree(self, repo, revision, folder):
        folder = (folder or "").strip("/")
        found = [path for path in self._repo(repo) if not folder or path.startswith(f"{folder}/")]
        if folder and not found:
            raise _Missing("EntryNotFound")
        return [{"type": "file", "path": path, "oid": "0" * 40, "size": len(self._repo(repo)[path])} for path in found]

    def _file(self, repo, revision, path):
        files = self._repo(repo)
        if path not in files:
            raise _Missing("EntryNotFound")
        return files[path], {"X-Repo-Commit": self.hub.commit(repo), "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'}


@contextmanager
def local_hub():
    """A running hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = LocalHub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
