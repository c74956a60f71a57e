"""A server on this machine that stands for W&B's: it answers by the name of a GraphQL operation, and remembers."""

import gzip
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VIEWER = {"viewer": {"id": "1", "entity": "me", "username": "me", "teams": {"edges": []}}}


@contextmanager
def serving(answer):
    """Serve, and yield the address.

    Args:
        answer: Called with the operation's name and the body of its request, or with ``file_stream`` and the body of
            what uploads a run's history; returns the data.
    """

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            body = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
            if self.path.endswith("/graphql"):
                request = json.loads(body)
                (name,) = re.findall(r"^\s*(?:query|mutation) (\w+)", request["query"])
                self.reply({"data": answer(name, request)})
            else:
                self.reply(answer("file_stream", json.loads(body)) if self.path.endswith("/file_stream") else {})

        def do_PUT(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.reply({})

        def reply(self, data):
            body = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
