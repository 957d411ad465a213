"""A stand-in for the Hugging Face Hub on this machine: it keeps what is pushed, and fails on command."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants, hf_api

from jit_accel.model import hub

USER = "alice"
TOKEN = "hf_" + "t" * 34


class HubServer:
    """Serves at `url`; its attributes may be changed at any time.

    fail: part of a request's path -> status to answer with, or "hang". whoami: what the login is told to be.
    repositories: id -> whether private. files: id -> path -> content, of all commits. commits: id of each commit.
    """

    def __init__(self):
        self.fail: dict[str, int | str] = {}
        self.whoami = {"name": USER, "orgs": [{"name": "garden"}], "auth": {"accessToken": {"role": "write"}}}
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.released = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args):
        pass

    def answer(self, status: int, content=None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        wrong = next((what for part, what in self.hub.fail.items() if part in path), None)
        if wrong == "hang":
            self.hub.released.wait(30)
            self.close_connection = True
            return
        is_upload = path.startswith("/lfs/")  # at an address that is its own permission, as on the Hub
        if wrong is None and not is_upload and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            wrong = 401
        if wrong is not None:
            self.answer(wrong, {"error": "told to fail"})
            return
        self.route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def route(self, path: str, body: bytes) -> None:
        hub, parts = self.hub, path.strip("/").split("/")
        if path == "/api/whoami-v2":
            self.answer(200, hub.whoami)
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted['organization'] or USER}/{wanted['name']}"
            status = 409 if repo_id in hub.repositories else 200
            hub.repositories.setdefault(repo_id, wanted.get("visibility") == "private" or bool(wanted.get("private")))
            self.answer(
                status,
                {"url": f"{hub.url}/{repo_id}", "error": "it exists"}
                if status == 409
                else {"url": f"{hub.url}/{repo_id}"},
            )
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif parts[-2:] == ["preupload", "main"]:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if f["size"] > 500_000 else "regular"}
                for f in files
            ]
            self.answer(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in objects]
            self.answer(200, {"transfer": "basic", "objects": actions})
        elif parts[0] == "lfs":
            assert hashlib.sha256(body).hexdigest() == parts[1]
            hub.objects[parts[1]] = body
            self.answer(200)
        elif parts[-2:] == ["commit", "main"]:
            self.commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])
        elif parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in hub.repositories:
            repo_id = "/".join(parts[2:4])
            self.answer(
                200, {"id": repo_id, "private": hub.repositories[repo_id], "siblings": [], "tags": [], "sha": "0" * 40}
            )
        else:
            self.resolve("/".join(parts[:2]), "/".join(parts[4:]))

    def resolve(self, repo_id: str, name: str) -> None:
        content = self.hub.files.get(repo_id, {}).get(name)
        if content is None:
            kind = "EntryNotFound" if repo_id in self.hub.repositories else "RepoNotFound"
            self.answer(404, X_Error_Code=kind, X_Repo_Commit="0" * 40)
        else:
            self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit="0" * 40)

    def commit(self, repo_id: str, operations: list[dict]) -> None:
        files = self.hub.files.setdefault(repo_id, {})
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.commits.append(repo_id)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/1", "commitOid": "1" * 40})


def stand_in(monkeypatch) -> HubServer:
    """A server that this process takes for the Hub from now on, with somebody logged in."""
    server = HubServer()
    address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub, "LOGIN_TIMEOUT_S", 0.3)
    monkeypatch.setattr(hub, "SILENCE_TIMEOUT_S", 2.0)
    return server


def use_environment() -> None:
    """Make a client that is imported already use the addresses of the environment."""
    constants.ENDPOINT = hf_api.api.endpoint = os.environ["HF_ENDPOINT"]
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
