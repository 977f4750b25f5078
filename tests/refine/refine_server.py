"""A small OpenAI-compatible server, a process of its own, that misbehaves on command.

Run as a program it prints its port. What it does with a request stands in the request's last message: the first word
after ``MODE:``; without one it answers the text after ``ANSWER:``. Modes are listed in `Handler.do_POST`.
"""

import json
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COUNTS = {"requests": 0, "now": 0, "most": 0}
LAST = {}
SEEN = {}
FORCED = {"mode": ""}
LOCK = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply(200, {"counts": COUNTS, "last": LAST})

    def do_PUT(self):
        FORCED["mode"] = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.reply(200, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with LOCK:
            COUNTS["requests"] += 1
            COUNTS["now"] += 1
            COUNTS["most"] = max(COUNTS["most"], COUNTS["now"])
            SEEN[text] = SEEN.get(text, 0) + 1
            LAST.update(body=body, key=self.headers.get("Authorization"), path=self.path)
        try:
            mode = FORCED["mode"] or (text.split("MODE:")[1].split()[0] if "MODE:" in text else "answer")
            self.act(mode, text)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has given up
        finally:
            with LOCK:
                COUNTS["now"] -= 1

    def act(self, mode, text):
        answer = text.split("ANSWER:")[-1]
        if mode == "slow":
            time.sleep(0.3)
        elif mode == "hang":
            time.sleep(600)
        elif mode == "drip":  # a byte now and then: no single read ever times out
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b" ")
                time.sleep(0.05)
        elif mode == "once" and SEEN[text] == 1:
            return self.reply(503, {"error": {"message": "busy"}})
        elif mode == "later" and SEEN[text] == 1:
            return self.reply(429, {"error": {"message": "busy"}}, {"Retry-After": "0.7"})
        elif mode.isdigit():
            return self.reply(int(mode), {"error": {"message": f"status {mode}"}})
        elif mode == "echo":
            return self.reply(401, {"error": {"message": f"{self.headers.get('Authorization')} is not known"}})
        elif mode == "close":
            return self.connection.close()
        elif mode == "garbage":
            return self.raw(b"<html>It works!</html>", "text/html")
        elif mode == "torn":
            return self.raw(b'{"choices": [{"message": {"conte', "application/json")
        elif mode == "list":
            return self.raw(b"[1, 2]", "application/json")
        elif mode == "nothing":
            return self.reply(200, {"choices": []})
        elif mode == "null":
            return self.reply(200, completion(None))
        elif mode == "number":
            return self.reply(200, completion(7))
        elif mode in ("length", "repetition", "abort"):
            return self.reply(200, completion(answer, mode))
        return self.reply(200, completion(answer))

    def reply(self, status, data, headers=None):
        self.raw(json.dumps(data).encode(), "application/json", status, headers)

    def raw(self, data, kind, status=200, headers=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def completion(text, reason="stop"):
    message = {"role": "assistant", "content": text}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": reason, "message": message}]}  # fmt: skip


class Server:
    """The running process, as the tests see it."""

    def __init__(self, process, port):
        self.process, self.port = process, port
        self.url = f"http://127.0.0.1:{port}/v1"

    def stats(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats", timeout=10) as reply:
            return json.load(reply)

    def force(self, mode=""):
        """Make every further request of this mode; empty gives the choice back to them."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/force", mode.encode(), method="PUT")
        urllib.request.urlopen(request, timeout=10).close()

    def stop(self):
        self.process.kill()
        self.process.wait()


@contextmanager
def running(port=0):
    process = subprocess.Popen([sys.executable, __file__, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        yield Server(process, int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Threads(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True


if __name__ == "__main__":
    server = Threads(("127.0.0.1", int(sys.argv[1])), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
