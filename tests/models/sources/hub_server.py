"""A Hub on loopback: one repository, whose branch `main` can be moved."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """Revisions are commits of 40 digits and the branch `main`; every file has one content."""

    def __init__(self, repository: str, files: Mapping[str, bytes]) -> None:
        self.repository = repository
        self.files = dict(files)
        self.commit = "a" * 40
        self.fetched: list[str] = []
        self.address = ""

    @contextmanager
    def serve(self) -> Iterator["FakeHub"]:
        """Answer requests on a free port while the context lasts."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def log_message(self, *args: object) -> None:
                pass

            def _answer(self, *, with_body: bool) -> None:
                path = self.path.partition("?")[0]
                api = f"/api/models/{hub.repository}"
                if path.startswith(f"{api}/revision/"):
                    revision = path.rpartition("/")[2]
                    commit = hub.commit if revision == "main" else revision
                    siblings = [{"rfilename": name} for name in hub.files]
                    facts = {"id": hub.repository, "sha": commit, "siblings": siblings}
                    self._send(json.dumps(facts).encode(), {}, with_body)
                elif path.startswith(f"{api}/tree/"):
                    entries = [
                        {
                            "type": "file",
                            "path": name,
                            "size": len(content),
                            "oid": hashlib.sha1(content).hexdigest(),
                        }
                        for name, content in hub.files.items()
                    ]
                    self._send(json.dumps(entries).encode(), {}, with_body)
                elif path.startswith(f"/{hub.repository}/resolve/"):
                    revision, _, name = path.partition("/resolve/")[2].partition("/")
                    if name not in hub.files:
                        self._missing()
                        return
                    commit = hub.commit if revision == "main" else revision
                    etag = hashlib.sha256(commit.encode() + hub.files[name]).hexdigest()
                    if with_body:
                        hub.fetched.append(name)
                    headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
                    self._send(hub.files[name], headers, with_body)
                else:
                    self._missing()

            def _send(self, body: bytes, headers: Mapping[str, str], with_body: bool) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def _missing(self) -> None:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
