"""A stand-in for the hub: the calls of its HTTP API that an upload makes, over a repository in memory."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import NamedTuple

LARGE = ".safetensors"  # what goes the way of LFS
ROLES = {"writes": "write", "reads": "read", "elsewhere": "fineGrained"}  # of a token; the last has no right here


class Repository(NamedTuple):
    private: bool
    files: dict[str, bytes]
    commits: list[str]  # their messages


class Hub(ThreadingHTTPServer):
    """Repositories by name; `calls` has the method and the path of each request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def standing_in() -> Iterator[Hub]:
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content: object = None, status: int = 200, **headers: str) -> None:
        body = json.dumps({} if content is None else content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_any(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub: Hub = self.server
        hub.calls.append(f"{self.command} {path}")
        if path.startswith("/lfs/"):
            hub.objects[path.removeprefix("/lfs/")] = body
            return self.answer()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ROLES:
            return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "me", "auth": {"accessToken": {"role": ROLES[token]}}})
        if path == "/api/validate-yaml":
            return self.answer()
        if self.command == "POST" and token != "writes":
            return self.answer({"error": "You don't have the rights"}, 403)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        name = path.removeprefix("/api/models").strip("/").partition(".git/")[0]
        name = "/".join(name.split("/")[:2])
        if name not in hub.repos:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        repo = hub.repos[name]
        if "/preupload/" in path:
            return self.answer({"files": [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False} for f in json.loads(body)["files"]]})  # fmt: skip
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer({"transfer": "basic", "objects": [self.upload(o) for o in json.loads(body)["objects"]]})
        if "/commit/" in path:
            return self.commit(name, repo, [json.loads(line) for line in body.splitlines()])
        self.answer({"id": name, "private": repo.private, "sha": "0" * 40,
                     "siblings": [sibling(*file) for file in repo.files.items()]})  # fmt: skip

    do_GET = do_POST = do_PUT = do_any

    def create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.server.repos:
            return self.answer({"error": "You already created this model repo", "url": self.place(name)}, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.repos[name] = Repository(private, {".gitattributes": b""}, [])
        self.answer({"url": self.place(name)})

    def place(self, name: str) -> str:
        return f"{self.server.url}/{name}"

    def upload(self, wanted: dict) -> dict:
        where = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}}
        return wanted | ({} if wanted["oid"] in self.server.objects else {"actions": where})

    def commit(self, name: str, repo: Repository, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append(value["summary"])
            elif line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.server.objects[value["oid"]]
            else:
                return self.answer({"error": f"unknown operation {line['key']}"}, 400)
        self.answer({"commitUrl": f"{self.place(name)}/commit/1", "commitOid": "1" * 40, "success": True})


def sibling(path: str, content: bytes) -> dict:
    """A file, as the hub lists it."""
    entry = {"rfilename": path, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
    of_lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
    return entry | ({"lfs": of_lfs} if path.endswith(LARGE) else {})
