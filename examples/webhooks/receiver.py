"""A webhook receiver with nothing but Python's standard library.

    TIDEMILL_WEBHOOK_SECRET=whsec_... python3 receiver.py 9000
"""

import base64
import hashlib
import hmac
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

SECRET = os.environ["TIDEMILL_WEBHOOK_SECRET"]
seen = set()  # in earnest: a table with a unique column


def key(secret):
    if secret.startswith("whsec_"):
        return base64.b64decode(secret[len("whsec_"):])
    return secret.encode()


def verify(headers, body, now=None):
    """Raises ValueError unless the request is the sender's and fresh."""
    now = time.time() if now is None else now
    timestamp = headers["webhook-timestamp"] or ""
    if not (timestamp.isascii() and timestamp.isdigit()):
        raise ValueError("the timestamp is no number")
    if not -60 <= now - int(timestamp) <= 300:
        raise ValueError("the timestamp is too old or too new")
    signed = f"{headers['webhook-id']}.{timestamp}.".encode() + body
    right = base64.b64encode(hmac.new(key(SECRET), signed, hashlib.sha256).digest()).decode()
    entries = (headers["webhook-signature"] or "").split(" ")
    if not any(hmac.compare_digest(f"v1,{right}", entry) for entry in entries):
        raise ValueError("no signature matches")


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))  # the bytes, before any parsing
        try:
            verify(self.headers, body)
        except ValueError as error:
            print(f"refused: {error}", flush=True)
            self.send_response(401)
            self.end_headers()
            return
        if self.headers["webhook-id"] not in seen:  # delivered at least once: count it once
            seen.add(self.headers["webhook-id"])
            event = json.loads(body)
            print(event["type"], event["id"], event["request_counts"], flush=True)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    HTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 9000), Receiver).serve_forever()
