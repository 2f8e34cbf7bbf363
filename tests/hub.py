"""A stand-in for a model hub on loopback: what huggingface_hub asks of it to make a repository and to fill it.

Large files come by git LFS, small ones within the commit, and a commit counts only if all its large files have come.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from kto_ray.config import yaml12

TOKEN = "hf_testing"
LARGE = (".safetensors", ".png")


@dataclass
class Hub:
    """What it was told, and from whom it takes it."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by path, by repository."""
    messages: list[str] = field(default_factory=list)
    """Of commits."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    closed_to: set[str] = field(default_factory=set)
    """Repositories that nobody may make or write."""

    @property
    def environment(self) -> dict[str, str]:
        """Under which it is the hub of a process that has a token."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def create(self, name: str) -> tuple[int, Any]:
        if name in self.closed_to:
            return 403, {"error": f"You don't have the rights to create {name}"}
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, {})
        return status, {"url": f"{self.address}/{name}", "name": name}

    def batch(self, asked: dict[str, Any]) -> tuple[int, Any]:
        def answer(each: dict[str, Any]) -> dict[str, Any]:
            upload = {"upload": {"href": f"{self.address}/store/{each['oid']}"}}
            return each if each["oid"] in self.stored else each | {"actions": upload}

        return 200, {"transfer": "basic", "objects": [answer(each) for each in asked["objects"]]}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.stored:
                files[value["path"]] = self.stored[value["oid"]]
            else:
                return 400, {"error": f"{line['key']} {value} is not known or has not come"}
        self.repositories[name] |= files
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{'c' * 40}", "commitOid": "c" * 40}


def _validated(card: str) -> tuple[int, Any]:
    """As far as a front matter that no reader could read."""
    try:
        fits = isinstance(yaml12.load(card.split("---\n")[1]), dict)
    except (yaml12.YAMLError, IndexError):
        fits = False
    return (200, {}) if fits else (400, {"errors": [{"message": "no mapping between --- and ---"}]})


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body, path = self._body(), urlsplit(self.path).path
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._answer(401, {"error": "Invalid username or password."})
                return
            name, rest = "/".join(path.split("/")[3:5]), path.split("/")[5:]
            if path == "/api/repos/create":
                asked = json.loads(body)
                self._answer(*hub.create(f"{asked['organization']}/{asked['name']}"))
            elif path == "/api/validate-yaml":
                self._answer(*_validated(json.loads(body)["content"]))
            elif path.endswith(".git/info/lfs/objects/batch"):
                self._answer(*hub.batch(json.loads(body)))
            elif rest == ["preupload", "main"]:
                files = [file["path"] for file in json.loads(body)["files"]]
                modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in files}
                told = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
                self._answer(200, {"files": told})
            elif rest == ["commit", "main"]:
                self._answer(*hub.commit(name, [json.loads(line) for line in body.splitlines()]))
            else:
                self._answer(404, {"error": f"no {path} here"})

        def do_GET(self) -> None:
            self._answer(404, {"error": "Repository not found"})

        def do_PUT(self) -> None:
            body, digest = self._body(), self.path.rpartition("/")[2]
            right = hashlib.sha256(body).hexdigest() == digest
            if right:
                hub.stored[digest] = body
            self._answer(200 if right else 400, {})

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _answer(self, status: int, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Runs until the end of the body."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
