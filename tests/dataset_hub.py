"""A stand-in for a hub of data sets on loopback: what huggingface_hub's file system asks of it to read files."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


def _entries(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders in a folder, as the hub lists them."""
    folders = {path.rsplit("/", depth)[0] for path in files for depth in range(1, path.count("/") + 1)}
    found = [{"type": "directory", "path": path, "oid": "b" * 40, "size": 0} for path in sorted(folders)]
    found += [{"type": "file", "path": path, "oid": "a" * 40, "size": len(data)} for path, data in files.items()]
    start = f"{folder}/" if folder else ""
    return [
        entry
        for entry in found
        if entry["path"].startswith(start) and (recursive or "/" not in entry["path"][len(start) :])
    ]


def _handler(repositories: Mapping[str, Mapping[str, bytes]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            parts = [unquote(part) for part in asked.path.strip("/").split("/")]
            api = parts[:2] == ["api", "datasets"]
            name = "/".join(parts[2:4] if api else parts[1:3])
            files, rest = repositories.get(name), parts[4:] if api else parts[3:]
            if files is None:
                self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            elif api and rest[:1] in (["revision"], []):
                self._answer(200, {"id": name, "sha": "c" * 40, "siblings": [], "tags": [], "private": False})
            elif api and rest[0] == "tree":
                entries = _entries(files, "/".join(rest[2:]), "recursive=true" in asked.query.lower())
                self._answer(200, entries)
            elif not api and rest[0] == "resolve" and "/".join(rest[2:]) in files:
                self._part(files["/".join(rest[2:])])
            else:
                self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET

        def _part(self, data: bytes) -> None:
            asked, headers = self.headers.get("Range"), {"ETag": '"e"', "X-Repo-Commit": "c" * 40}
            if asked is None:
                self._answer(200, data, headers)
                return
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last or len(data)), len(data) - 1)
            range_ = {"Content-Range": f"bytes {first}-{end}/{len(data)}"}
            self._answer(206, data[int(first) : end + 1], headers | range_)

        def _answer(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@contextmanager
def dataset_hub(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[str]:
    """Serves files by repository and path, whatever the revision, until the end of the body; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repositories))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
