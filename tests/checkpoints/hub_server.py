"""What do Hugging Face and Kaggle answer? A small server on this machine that speaks as much of both as their clients ask for.

Each model has a name, files, and one fault. Tests use a model of their own, since the clients keep what they got.
"""

import base64
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Model:
    """One model's files and what goes wrong with it.

    files: name -> content; those of 1 KB and more are "large": known by their SHA-256, others by git's SHA-1.
    fault: "" for none; "status N" for every request; for files of 1 KB and more: "cut N" breaks the first N answers off in the
        middle, "silent" sends half and then nothing, "flipped" changes a byte, "short" announces and sends one byte less;
        "gone" has no such file, "restart" breaks off always and ignores Range.
    revisions: what it answers to beside its commit.
    asked: the requests, as (method, path, range).
    """

    files: dict[str, bytes]
    fault: str = ""
    revisions: tuple[str, ...] = ("main",)
    version: int = 3
    asked: list = field(default_factory=list)
    cuts: int = 0


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, Model] = {}
        self.released = threading.Event()  # lets the silent ones end
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self):
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Nothing: clients that go away are part of the tests."""


def _hash(content: bytes) -> str:
    if len(content) >= 1024:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            model = self._model("/".join(parts[2:4]))
            if model is not None:
                self._hugging_face(model, parts[2:])
        elif parts[0] == "storage":  # where Kaggle keeps its files
            model = self._model("/".join(parts[1:5]))
            if model is not None:
                self._file(model, "/".join(parts[5:]), kaggle=True)
        elif len(parts) > 4 and parts[2] == "resolve":
            model = self._model("/".join(parts[:2]))
            if model is not None:
                self._file(model, "/".join(parts[4:]), kaggle=False)
        else:
            self._refuse(404)

    def do_POST(self):
        """Kaggle's API."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        framework = {"MODEL_FRAMEWORK_KERAS": "keras"}.get(asked.get("framework"), str(asked.get("framework")).lower())
        name = "/".join((asked["ownerSlug"], asked["modelSlug"], framework, asked["instanceSlug"]))
        model = self._model(name)
        if model is None:
            return
        call = self.path.rsplit("/", 1)[-1]
        if call == "GetModelInstance":
            self._json({"versionNumber": model.version})
        elif call == "ListModelInstanceVersionFiles":
            files = [{"name": file, "size": len(content)} for file, content in model.files.items()]
            self._json({"files": files, "nextPageToken": ""})
        elif asked.get("path") in model.files:
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/storage/{name}/{asked['path']}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._refuse(404)

    def _model(self, name):
        """The model; None if it is not there or answers with an error, which is then sent."""
        model = self.server.models.get(name)
        if model is None:
            self._refuse(404, "RepoNotFound")
            return None
        model.asked.append((self.command, self.path, self.headers.get("Range")))
        if model.fault.startswith("status "):
            self._refuse(int(model.fault.split()[1]))
            return None
        return model

    def _hugging_face(self, model, parts):
        owner, name, kind, revision = parts[:4]
        if revision not in (*model.revisions, COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif kind == "revision":
            self._json(
                {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": file} for file in model.files]}
            )
        else:
            self._json([self._entry(file, content) for file, content in model.files.items()])

    def _entry(self, file, content):
        entry = {"type": "file", "path": file, "size": len(content), "oid": _hash(content)[:40]}
        if len(content) >= 1024:
            entry["lfs"] = {"oid": _hash(content), "size": len(content), "pointerSize": 130}
        return entry

    def _file(self, model, file, *, kaggle):
        content, fault = model.files.get(file), model.fault
        if content is None or (fault == "gone" and len(content) >= 1024):
            self._refuse(404, "EntryNotFound")
            return
        sent, first = content, 0
        faulty = len(content) >= 1024 and self.command == "GET"
        if faulty and fault == "flipped":
            sent = bytes([content[0] ^ 1]) + content[1:]
        if faulty and fault == "short":
            sent = content[:-1]
        asked = self.headers.get("Range")
        if asked and fault != "restart":
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(sent) - 1}/{len(sent)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(sent) - first))
        self.send_header("Accept-Ranges", "bytes")
        if kaggle:
            self.send_header("x-goog-hash", f"md5={base64.b64encode(hashlib.md5(content).digest()).decode()}")
        else:
            self.send_header("ETag", f'"{_hash(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = sent[first:]
        stops = faulty and (
            fault in ("silent", "restart") or (fault.startswith("cut") and model.cuts < int(fault.split()[1]))
        )
        if not stops:
            self.wfile.write(body)
            return
        model.cuts += 1
        if first == 0 or fault == "restart":  # a resumed answer breaks off before its first byte
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(0.02)  # the client reads them before the end
        if fault == "silent":
            self.server.released.wait(20)
        self.close_connection = True

    def _json(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status, code=""):
        body = b"" if self.command == "HEAD" else json.dumps({"error": f"{status} from the server"}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if status == 429:
            self.send_header("Retry-After", "7")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
