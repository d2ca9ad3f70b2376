"""An OpenAI-style server that generates nothing, at a known pace: `fake_server.py PORT SECONDS_A_TOKEN [TOKENS]`.

With TOKENS it sends only so many, whatever it is asked for.
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert asked["temperature"] == 0
        assert asked["ignore_eos"]
        assert asked["stream"]
        count = int(sys.argv[3]) if len(sys.argv) > 3 else asked["max_tokens"]
        self.send_response(200)
        self.end_headers()
        for _ in range(count):
            time.sleep(float(sys.argv[2]))
            self._chunk({"choices": [{"index": 0, "text": "x"}]})
        self._chunk({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": count}
        self._chunk({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, body: object) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def _chunk(self, body: object) -> None:
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")

    def log_message(self, *_: object) -> None:
        """Nothing."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
