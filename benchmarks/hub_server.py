"""A stand-in for the Hub: a server on loopback that knows the routes huggingface_hub calls."""

from contextlib import contextmanager
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import threading
from urllib.parse import unquote, urlparse

COMMITS = {"main": "a" * 40, "refs/convert/parquet": "b" * 40}


@contextmanager
def hub(repositories):
    """Serve {"OWNER/NAME": {revision: {path: bytes}}}; yields (address, the list of requests)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            requests.append(path)
            kind, body, name = answer(repositories, path)
            self.send_response(200 if body is not None else 404)
            if body is None:
                self.send_header("X-Error-Code", kind)
                body = b""
            else:
                self.send_header("X-Repo-Commit", kind)
                self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("Content-Type", "application/json" if name is None else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def answer(repositories, path):
    """(commit or error code, body or None, file name or None) of a request."""
    for repository, revisions in repositories.items():
        by_commit = {COMMITS[name]: files for name, files in revisions.items()}
        by_name = {**by_commit, **revisions}
        api, resolve = f"/api/datasets/{repository}", f"/datasets/{repository}/resolve/"
        for revision, files in by_name.items():
            commit = COMMITS.get(revision, revision)
            if path in (f"{api}/revision/{revision}", api if revision == "main" else ""):
                names = [{"rfilename": name} for name in files]
                info = {"id": repository, "sha": commit, "siblings": names, "tags": []}
                return commit, json.dumps(info).encode(), None
            if path.rstrip("/") == f"{api}/tree/{revision}":
                tree = [
                    {"type": "file", "path": name, "size": len(body), "oid": commit}
                    for name, body in files.items()
                ]
                return commit, json.dumps(tree).encode(), None
            if path.startswith(f"{resolve}{revision}/"):
                name = path.removeprefix(f"{resolve}{revision}/")
                if name in files:
                    return commit, files[name], name
                return "EntryNotFound", None, None
        if path.startswith((api, resolve)):
            return "RevisionNotFound", None, None
    return "RepoNotFound", None, None
