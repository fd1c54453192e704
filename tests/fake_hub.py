# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""A model hub on 127.0.0.1 for tests: one repository, any number of commits, and faults on request."""
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """`commits` is {sha: {file name: bytes}}, `main` one of its keys; `seen` lists (path, headers) of the requests.

    `faults` is {end of a path: [fault, ...]}; each request that fits takes the first one left. A fault is a status
    (int), "cut" (half of what was asked for), "flip" (one byte changed), "long" (bytes too many), "whole" (Range is
    not honoured), bytes (another answer) or an address beginning with http (a redirect to there plus the path).
    """

    def __init__(self, repo, commits):
        self.repo, self.commits, self.main = repo, commits, list(commits)[-1]
        self.faults, self.seen, hub = {}, [], self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that hangs up is part of the tests
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def content(self, path):
        """The bytes of a path, None for 404."""
        api, files = f"/api/models/{self.repo}", re.fullmatch(rf"/{self.repo}/resolve/(\w+)/(.*)", path)
        if path.startswith(f"{api}/revision/"):
            sha = {"main": self.main}.get(path.rsplit("/")[-1], path.rsplit("/")[-1])
            return json.dumps({"id": self.repo, "sha": sha}).encode() if sha in self.commits else None
        if path.startswith(f"{api}/tree/"):
            return json.dumps([self.entry(*item) for item in self.commits[path.rsplit("/")[-1]].items()]).encode()
        return self.commits.get(files[1], {}).get(files[2]) if files else None

    @staticmethod
    def entry(name, content):
        """What the tree says of a file: safetensors are LFS files, of which oid is the pointer's blob."""
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "oid": blob, "size": len(content), "path": name}
        return entry | {"oid": "0" * 40, "lfs": lfs} if name.endswith(".safetensors") else entry

    def answer(self, request):
        path = request.path
        self.seen.append((path, dict(request.headers)))
        waiting = next((faults for end, faults in self.faults.items() if path.endswith(end) and faults), [None])
        fault = waiting.pop(0) if waiting[0] is not None else None
        body, status, headers = self.content(path), 200, {}
        if isinstance(fault, int) or body is None:
            body, status = b"{}", fault if isinstance(fault, int) else 404
        elif isinstance(fault, bytes):
            body = fault
        elif fault and fault.startswith("http"):
            body, status, headers = b"", 302, {"Location": fault + path}
        span = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if span and status == 200 and fault != "whole":
            headers["Content-Range"] = f"bytes {span[1]}-{len(body) - 1}/{len(body)}"
            body, status = body[int(span[1]) :], 206
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "long":
            body += b"more"
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        request.close_connection = fault == "cut"
