"""Python's http.server, as programs use it: one port reads the bodies of requests, the other no body.

Started with an address and two ports. Each request that reaches a handler is a line on standard output.
"""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers every request, and reads the body that its Content-Length announces, as programs do."""

    protocol_version = "HTTP/1.1"
    timeout = 5
    server_label = "python"
    reads_bodies = True

    def answer(self) -> None:
        """Write the evidence, then answer."""
        hosts = ",".join(self.headers.get_all("Host", []))
        fields = [self.server_label, "200", hosts, "-", self.requestline]
        sys.stdout.write("\t".join(ascii(field)[1:-1] for field in fields) + "\n")
        sys.stdout.flush()
        if self.path.startswith("/ws") and self.headers.get("Upgrade"):
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            self.end_headers()
            self.close_connection = True
            return
        if self.reads_bodies:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "3")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"ok\n")

    def __getattr__(self, name: str) -> object:
        """Handle every method in the same way."""
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def log_message(self, *_arguments: object) -> None:
        """Write nothing to standard error."""


class LazyHandler(Handler):
    """Ignores all bodies, as programs do that answer before they have read one."""

    server_label = "python-lazy"
    reads_bodies = False


class Server(ThreadingHTTPServer):
    """A server with room for a campaign's connections."""

    request_queue_size = 200
    daemon_threads = True

    def handle_error(self, *_arguments: object) -> None:
        """Write nothing: a client may end its connection at any time."""


def main(address: str, port: str, lazy_port: str) -> None:
    """Serve both ports until the process is killed."""
    threading.Thread(target=Server((address, int(lazy_port)), LazyHandler).serve_forever, daemon=True).start()
    Server((address, int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
