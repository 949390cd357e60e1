"""A bucket of Google Cloud Storage in memory, over HTTP, as gcsfs and tensorstore speak to one.

Objects appear as a whole, have no folders and cannot be appended to.
"""

import contextlib
import http.server
import json
import re
import threading
from urllib.parse import parse_qsl, quote, unquote

_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/[^/]+/o/([^/]+)")
_MOVED = re.compile(r"/storage/v1/b/[^/]+/o/([^/]+)/(moveTo/o|rewriteTo/b/[^/]+/o)/([^/]+)")
_BOUNDARY = re.compile(r'boundary="?([^";]+)')
_BLANK = re.compile(rb"\r?\n\r?\n")
_TIME = "2026-01-01T00:00:00.000Z"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # which keeps connections

    def log_message(self, *_):
        pass

    def do_GET(self):
        path, query = self._asked()
        if self.server.unreadable:
            self._json(403, {"error": {"code": 403, "message": "no permission"}})
            return
        match = _OBJECT.fullmatch(path)
        if match is None:
            self._json(200, self._listed(query) if path.endswith("/o") else {"name": "bucket"})
            return
        name = unquote(match[1])
        if name not in self.server.objects:
            self._json(404, {"error": {"code": 404, "message": "No such object"}})
        elif query.get("alt") == "media" or path.startswith("/download"):
            self._media(*self.server.objects[name])
        else:
            self._json(200, self._about(name))

    def do_POST(self):
        path, query = self._asked()
        body = self._body()
        if self.server.refusing:
            self._json(403, {"error": {"code": 403, "message": "no permission"}})
        elif "upload_id" in query:
            self._part(query["upload_id"], body)
        elif path.startswith("/upload"):
            self._upload(path, query, body)
        else:
            source, how, target = map(unquote, _MOVED.fullmatch(path).groups())
            self._moved(source, target, how.startswith("moveTo"))

    def do_PUT(self):
        self._part(self._asked()[1]["upload_id"], self._body())

    def do_DELETE(self):
        name = unquote(_OBJECT.fullmatch(self._asked()[0])[1])
        found = self.server.objects.pop(name, None)
        self._json(404 if found is None else 204, {})

    def _asked(self):
        """The path, and the query; a hook of the tests may act on it."""
        path, _, query = self.path.partition("?")
        self.server.hook(self.command, path)
        return path, dict(parse_qsl(query))

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _upload(self, path, query, body):
        if query["uploadType"] == "resumable":
            name = json.loads(body)["name"]
            self.server.parts[name] = b""
            place = f"http://{self.headers['Host']}{path}?upload_id={quote(name, safe='')}"
            self._json(200, {}, Location=place)
            return
        name = query.get("name")
        if query["uploadType"] == "multipart":
            boundary = b"--" + _BOUNDARY.search(self.headers["Content-Type"])[1].encode()
            _, about, content, _ = re.split(rb"(?:\r?\n)?" + re.escape(boundary), body)
            name = json.loads(_BLANK.split(about, maxsplit=1)[1])["name"]
            body = _BLANK.split(content, maxsplit=1)[1]
        self._stored(name, body, query.get("ifGenerationMatch"))

    def _part(self, name, body):
        """Of a resumable upload; the last one says how long the whole is."""
        self.server.parts[name] += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            self._json(308, {}, Range=f"bytes=0-{len(self.server.parts[name]) - 1}")
        else:
            self._stored(name, self.server.parts.pop(name))

    def _stored(self, name, content, expected=None):
        with self.server.lock:
            generation = self.server.objects.get(name, (b"", 0))[1]
            if expected is not None and int(expected) != generation:
                self._json(412, {})
                return
            self.server.put(name, content)
        self._json(200, self._about(name))

    def _moved(self, source, target, gone):
        if source not in self.server.objects:
            self._json(404, {})
            return
        self.server.put(target, self.server.objects[source][0])
        if gone:
            del self.server.objects[source]
        about = self._about(target)
        self._json(200, about if gone else {"done": True, "resource": about})

    def _about(self, name):
        content, generation = self.server.objects[name]
        numbers = {"size": len(content), "generation": generation, "metageneration": 1}
        about = {"kind": "storage#object", "name": name, "bucket": "bucket"}
        about |= {"updated": _TIME, "timeCreated": _TIME}
        return about | {key: str(x) for key, x in numbers.items()}

    def _listed(self, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, last = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        items, prefixes = [], {}
        for name in sorted(self.server.objects):
            if name.startswith(prefix) and first <= name < last:
                rest = name.removeprefix(prefix)
                if delimiter and delimiter in rest:
                    prefixes[prefix + rest.partition(delimiter)[0] + delimiter] = None
                else:
                    items.append(self._about(name))
        return {"items": items, "prefixes": [*prefixes]}

    def _media(self, content, generation):
        status, headers, whole = 200, {"x-goog-generation": generation}, len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(asked[1]), int(asked[2] or whole - 1) + 1
            content = content[start:stop]
            if not content:
                self._json(416, {})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{whole}"
        self._send(status, content, "application/octet-stream", headers)

    def _json(self, status, value, **headers):
        self._send(status, json.dumps(value).encode(), "application/json", headers)

    def _send(self, status, content, kind, headers):
        content = b"" if status == 204 else content
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": len(content), **headers}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)


class Bucket(http.server.ThreadingHTTPServer):
    """The server.

    Attributes:
        objects: {name: (content, generation)}.
        refusing: whether nothing may be written.
        unreadable: whether nothing may be read.
        hook: called with the method and the path of each request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("localhost", 0), _Handler)
        self.objects, self.parts, self.refusing, self.unreadable = {}, {}, False, False
        self.hook = lambda method, path: None
        self.lock, self.generation = threading.RLock(), 0

    def put(self, name, content):
        """Stores an object."""
        with self.lock:
            self.generation += 1
            self.objects[name] = content, self.generation

    def handle_error(self, *_):
        """A client that went away."""


@contextlib.contextmanager
def served():
    """The server of gs://bucket, and the environment in which clients find it."""
    with Bucket() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://localhost:{server.server_address[1]}"
        yield (
            server,
            {
                "STORAGE_EMULATOR_HOST": address,
                "TENSORSTORE_GCS_HTTP_URL": address,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for credentials
            },
        )
        server.shutdown()
        thread.join()
