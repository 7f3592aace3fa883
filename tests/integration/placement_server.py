"""The real Placement over HTTP; run by the Python of its own environment: PLACEMENT_PYTHON placement_server.py FOLDER.

FOLDER has placement.conf. Prints the port, and ends when its standard input does.
"""

import os
import sys
import threading
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server


class Handler(WSGIRequestHandler):
    def log_message(self, *args):
        pass


class Server(WSGIServer):
    # SQLite has one writer at a time anyway.
    request_queue_size = 64

    def server_bind(self):
        # Without the look-up of our own name, which may take seconds.
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "127.0.0.1", self.socket.getsockname()[1]
        self.server_address = self.socket.getsockname()
        self.setup_environ()


def main():
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is imported logs to standard output, too
    os.environ["OS_PLACEMENT_CONFIG_DIR"] = sys.argv[1]
    from placement import wsgi

    server = make_server("127.0.0.1", 0, wsgi.init_application(), Server, Handler)
    print(server.server_port, file=told, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


main()
