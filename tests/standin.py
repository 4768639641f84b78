"""A stand-in of the Hub: the part of its API that a push and a pull call, kept in memory.

Text goes into the commit itself and ``*.safetensors`` by LFS, as on the Hub. What a test wants to
go wrong it puts into ``faults``: a path's beginning and what is answered instead.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


@dataclass
class Repo:
    """Branches and commits: a commit is its files."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Add a commit with these files beside those of the branch."""
        whole = self.commits.get(self.branches.get(branch, ""), {}) | files
        told = json.dumps([len(self.commits), sorted(whole)])
        sha = hashlib.sha1(told.encode()).hexdigest()
        self.commits[sha] = whole
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> str | None:
        """The commit of a revision."""
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


class StandIn(ThreadingHTTPServer):
    """The server, running in a thread from the moment it is made."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.faults: dict[str, Callable[[Handler], None]] = {}
        self.thread = Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        """Its address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def hold(self, repo: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """A repository with these files, made by somebody else."""
        self.repos.setdefault(repo, Repo(private))
        return self.repos[repo].commit("main", files)

    def stop(self) -> None:
        """End the thread."""
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        """Bytes, or a value as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.serve(b"")

    def do_POST(self) -> None:
        self.serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def serve(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        for start, fault in self.server.faults.items():
            if f"{self.command} {path}".startswith(start):
                fault(self)
                return
        for pattern, act in ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                act(self, body, *found.groups())
                return
        self.answer(501, {"error": f"the stand-in knows no {self.command} {path}"})

    @property
    def known(self) -> bool:
        """Whether the one who asks has a token."""
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str, *, write: bool = False) -> Repo | None:
        """A repository that the one who asks may see; otherwise it has been answered."""
        found = self.server.repos.get(name)
        if found is None or (found.private and not self.known):
            # The Hub tells strangers nothing of what is private.
            self.answer(404 if self.known else 401, X_Error_Code="RepoNotFound")
            return None
        if write and not self.known:
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
            return None
        return found

    # --- what is asked ---------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.known:
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
            return
        self.server.hold(name, {".gitattributes": b"*.safetensors filter=lfs\n"},
                         private=asked.get("visibility") == "private")  # fmt: skip
        self.answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": "1"})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        if repo := self.repo(name, write=True):
            exists = branch in repo.branches
            repo.branches.setdefault(branch, repo.branches["main"])
            self.answer(409 if exists else 200, {})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if (repo := self.repo(name)) is None:
            return
        if (sha := repo.at(revision or "main")) is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
            return
        files = [{"rfilename": n, "size": len(data)} for n, data in repo.commits[sha].items()]
        self.answer(200, {"id": name, "sha": sha, "private": repo.private, "siblings": files})

    def card(self, body: bytes) -> None:
        """The Hub wants front matter, and of a base model its id."""
        text = json.loads(body)["content"]
        base = re.search(r"^base_model: (.*)$", text, re.MULTILINE)
        wrong = not text.startswith("---\n") or (base and base[1].count("/") != 1)
        errors = [{"message": '"base_model" is not valid'}] if wrong else []
        self.answer(400 if wrong else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self.repo(name, write=True):
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")],
                 "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            self.answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if self.repo(name, write=True):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self.answer(200)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if (repo := self.repo(name, write=True)) is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        head = lines[0]["value"]
        if head.get("parentCommit", repo.branches[revision]) != repo.branches[revision]:
            self.answer(412, {"error": "A commit has happened since"})
            return
        files = {}
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            content = self.server.large[value["oid"]] if large else None
            files[value["path"]] = content or base64.b64decode(value["content"])
        sha = repo.commit(revision, files)
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (repo := self.repo(name)) is None:
            return
        data = repo.commits[repo.at(revision) or ""].get(path)
        if data is None:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            self.answer(200, data)


NAME, REVISION = r"([\w-]+/[\w.-]+)", r"([^/]+)"
ROUTES: dict[str, Callable[..., None]] = {
    "POST /api/repos/create": Handler.create,
    "POST /api/validate-yaml": Handler.card,
    f"GET /api/models/{NAME}": Handler.info,
    f"GET /api/models/{NAME}/revision/{REVISION}": Handler.info,
    f"POST /api/models/{NAME}/branch/{REVISION}": Handler.branch,
    f"POST /api/models/{NAME}/preupload/{REVISION}": Handler.preupload,
    f"POST /api/models/{NAME}/commit/{REVISION}": Handler.commit,
    f"POST /{NAME}.git/info/lfs/objects/batch": Handler.batch,
    r"PUT /large/(\w+)": Handler.put,
    f"GET /{NAME}/resolve/{REVISION}/(.+)": Handler.resolve,
}
