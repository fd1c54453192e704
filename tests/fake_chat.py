# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""A chat endpoint on 127.0.0.1 for tests: scripted replies, and faults on request."""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeChat:
    """`answer(payload)` gives a reply's text; `seen` lists (payload, headers) of the requests.

    Each request takes the first of `faults` that is left. A fault is a status (int), "cut" (half of the body), "slow"
    (bytes that never end), "huge" (a body of 8 MB), or bytes (another body)."""

    def __init__(self, answer):
        self.answer, self.faults, self.seen, self.lock, chat = answer, [], [], threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                chat.reply(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that hangs up is part of the tests
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def reply(self, request):
        payload = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self.lock:
            self.seen.append((payload, dict(request.headers)))
            fault = self.faults.pop(0) if self.faults else None
        body = fault if isinstance(fault, bytes) else json.dumps(
            dict(choices=[dict(message=dict(content=self.answer(payload)))], usage=dict(total_tokens=7))).encode()
        body = b" " * 2**23 + body if fault == "huge" else body
        request.send_response(fault if isinstance(fault, int) else 200)
        for name, value in {"Content-Length": str(len(body)), "Retry-After": "0", "Location": self.url}.items():
            request.send_header(name, value)
        request.end_headers()
        for i in range(40 if fault == "slow" else 0):
            request.wfile.write(b" ")
            request.wfile.flush()
            time.sleep(0.05)
        request.wfile.write(body[: len(body) // 2] if fault in ("cut", "slow") else body)
        request.close_connection = fault in ("cut", "slow")
