"""A small stand-in for W&B's server: keeps what arrives by run, and fails in the ways real servers do.

It speaks what wandb 0.31 needs to log in, to start, continue and end a run, to upload files, and to run a sweep.
"""

from __future__ import annotations

import base64
import http.server
import itertools
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import yaml

KEY = "0123456789" * 4
HISTORY, EVENTS = "wandb-history.jsonl", "wandb-events.jsonl"


@dataclass
class StoredRun:
    """What the server knows of one run; `lines` of each streamed file by their offset."""

    project: str
    entity: str
    settings: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    overwritten: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[dict] = field(default_factory=list)
    artifacts: list[dict] = field(default_factory=list)
    exit_code: int | None = None
    is_preempting: bool = False
    starts: int = 0

    @property
    def history(self) -> list[dict]:
        """Rows in the order of their offsets."""
        lines = self.lines.get(HISTORY, {})
        return [json.loads(lines[offset]) for offset in sorted(lines)]

    def append(self, name: str, offset: int, content: list[str]) -> None:
        lines = self.lines.setdefault(name, {})
        for number, line in enumerate(content, offset):
            if number in lines and name == HISTORY and lines[number] != line:
                self.overwritten += 1
            lines[number] = line

    def status(self, name: str) -> dict:
        """As `RunResumeStatus` asks for it."""
        tails = {n: [lines[max(lines)]] if (lines := self.lines.get(n)) else [] for n in (HISTORY, EVENTS)}
        return {
            "id": "run",
            "name": name,
            "summaryMetrics": json.dumps(self.summary),
            "displayName": self.settings.get("displayName"),
            "logLineCount": len(self.lines.get("output.log", ())),
            "historyLineCount": len(self.lines.get(HISTORY, ())),
            "eventsLineCount": len(self.lines.get(EVENTS, ())),
            "historyTail": json.dumps(tails[HISTORY]),
            "eventsTail": json.dumps(tails[EVENTS]),
            "config": json.dumps(self.config),
            "tags": self.settings.get("tags"),
            "notes": self.settings.get("notes"),
            "wandbConfig": json.dumps({"t": {}}),
        }


@dataclass
class StoredSweep:
    """A sweep, as `wandb sweep` brings it, and the trials that are left: a grid of its parameters' values."""

    config: str
    trials: dict[str, dict] = field(default_factory=dict)  # arguments by the id of the run

    def __post_init__(self):
        parameters = yaml.safe_load(self.config)["parameters"]
        values = [each.get("values", [each.get("value")]) for each in parameters.values()]
        for number, chosen in enumerate(itertools.product(*values)):
            self.trials[f"trial{number}"] = {name: {"value": value} for name, value in zip(parameters, chosen)}


@dataclass
class Failure:
    """What to do instead of an answer.

    Attributes:
        how: `hang`, `cut` (an answer that breaks off), or a status such as `503`.
        when: of requests by their name, an operation of GraphQL or the method and path.
    """

    how: str
    when: Callable[[str], bool]
    times: float


class WandbServer:
    """On a free port of this machine until `close`; `with WandbServer() as server:`."""

    def __init__(self):
        self.runs: dict[str, StoredRun] = {}
        self.sweeps: dict[str, StoredSweep] = {}
        self.deleted: set[str] = set()  # ids that W&B does not give away again
        self.requests: list[str] = []
        self.failure: Failure | None = None
        self.received = bytearray()
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listen; after `stop` on the same port again."""

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, request, client_address) -> None:
                pass  # a client that was killed

        handler = type("Handler", (_Handler,), {"wandb": self})
        self.http = Server(("127.0.0.1", self.port), handler)
        self.port = self.http.server_address[1]
        self.released.clear()
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Die: connections are refused from now on."""
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def fail(self, how: str, when: str | Callable[[str], bool] = "", times: float = float("inf")) -> None:
        """Fail requests whose name has `when` in it, `times` often."""
        self.released.clear()
        self.failure = Failure(how, when if callable(when) else lambda name: when in name, times)

    def mend(self) -> None:
        self.failure = None
        self.released.set()

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which wandb logs in here, and not as the user of this machine."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the server waited in vain"
            time.sleep(0.02)

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    # Answers; called with the lock held.

    def answer(self, operation: str, variables: dict) -> dict:
        """The `data` of a GraphQL operation."""
        answers = {
            "Viewer": self._viewer,
            "RunResumeStatus": self._resume_status,
            "UpsertBucket": self._upsert,
            "CreateRunFiles": self._create_files,
            "NotifyScriptableRunAlert": self._alert,
            "UpsertSweep": self._upsert_sweep,
            "SweepWithRuns": self._sweep,
            "CreateAgent": lambda variables: {"createAgent": {"agent": {"id": variables["sweep"]}}},
            "Heartbeat": self._heartbeat,
            "ArtifactType": lambda variables: {"project": None},
            "CreateArtifact": self._create_artifact,
            "CreateArtifactManifest": self._create_manifest,
            "CreateArtifactFiles": self._create_artifact_files,
            "CommitArtifact": self._commit,
            "ArtifactByID": self._artifact,
        }
        return answers[operation](variables) if operation in answers else {}

    def _viewer(self, variables: dict) -> dict:
        teams = {"edges": [{"node": {"name": "someone"}}, {"node": {"name": "team"}}]}
        return {"viewer": {"id": "U", "entity": "someone", "username": "someone", "flags": "{}", "teams": teams}}

    def _resume_status(self, variables: dict) -> dict:
        run = self.runs.get(variables["name"])
        if run and run.project != variables["project"]:
            run = None
        entity = {"id": "E", "name": variables["entity"] or "someone"}
        bucket = run and run.status(variables["name"])
        return {"model": {"id": "P", "name": variables["project"], "entity": entity, "bucket": bucket}}

    def _upsert(self, variables: dict) -> dict:
        name = variables["name"]
        is_new = name not in self.runs
        project, entity = variables["project"], variables["entity"] or "someone"
        run = self.runs.setdefault(name, StoredRun(project, entity))
        run.starts += variables["host"] is not None
        run.settings |= {key: value for key, value in variables.items() if value is not None}
        run.is_preempting |= variables.get("state") == "preempting"
        if variables["config"]:
            run.config = json.loads(variables["config"])
        if variables["summaryMetrics"]:
            run.summary = json.loads(variables["summaryMetrics"])
        bucket = {
            "id": "run",
            "name": name,
            "displayName": run.settings.setdefault("displayName", "sunny-hill-1"),
            "description": "",
            "config": json.dumps(run.config),
            "sweepName": None,
            "project": {"id": "P", "name": project, "entity": {"id": "E", "name": entity}},
            "historyLineCount": len(run.lines.get(HISTORY, ())),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _create_files(self, variables: dict) -> dict:
        url = f"http://127.0.0.1:{self.port}/storage/{variables['run']}"
        files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}

    def _alert(self, variables: dict) -> dict:
        self.runs[variables["runName"]].alerts.append(variables)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _upsert_sweep(self, variables: dict) -> dict:
        self.sweeps["sweep1"] = StoredSweep(variables["config"])
        entity = {"id": "E", "name": variables["entityName"] or "someone"}
        project = {"id": "P", "name": variables["projectName"], "entity": entity}
        return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []}}

    def _sweep(self, variables: dict) -> dict:
        return {"project": {"sweep": {"config": self.sweeps[variables["sweep"]].config, "runs": {"edges": []}}}}

    def _heartbeat(self, variables: dict) -> dict:
        """The next trial for an agent that is idle; the end where there is none."""
        trials, command = self.sweeps[variables["id"]].trials, []
        if not json.loads(variables["runState"]):
            command = [{"type": "exit"}]
        if command and trials:
            run_id = next(iter(trials))
            program = yaml.safe_load(self.sweeps[variables["id"]].config)["program"]
            command = [{"type": "run", "run_id": run_id, "program": program, "args": trials.pop(run_id)}]
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(command)}}

    # An artifact's id is that of its run and its number there, its files lie under that name.

    def _create_artifact(self, variables: dict) -> dict:
        wanted = variables["input"]
        run = self.runs[wanted["runName"]]
        run.artifacts.append(wanted | {"id": f"{wanted['runName']}.{len(run.artifacts)}", "state": "PENDING"})
        found = {"id": run.artifacts[-1]["id"], "state": "PENDING"}
        return {"createArtifact": {"artifact": found | {"artifactSequence": {"id": "S", "latestArtifact": None}}}}

    def _upload(self, artifact_id: str, name: str) -> dict:
        run_id = artifact_id.partition(".")[0]
        url = f"http://127.0.0.1:{self.port}/storage/{run_id}/{artifact_id}/{name}"
        return {"id": name, "name": name, "displayName": name, "uploadUrl": url, "uploadHeaders": []}

    def _create_manifest(self, variables: dict) -> dict:
        file = self._upload(variables["artifactID"], "wandb_manifest.json")
        return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": file}}}

    def _create_artifact_files(self, variables: dict) -> dict:
        edges = []
        for wanted in variables["input"]["artifactFiles"]:
            node = self._upload(wanted["artifactID"], wanted["name"])
            node |= {"uploadMultipartUrls": None, "storagePath": None, "artifact": {"id": wanted["artifactID"]}}
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _stored_artifact(self, artifact_id: str) -> dict:
        return next(a for run in self.runs.values() for a in run.artifacts if a["id"] == artifact_id)

    def _commit(self, variables: dict) -> dict:
        found = self._stored_artifact(variables["artifactID"])
        found["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": found["id"], "digest": found["digest"]}}}

    def _artifact(self, variables: dict) -> dict:
        found = self._stored_artifact(variables["id"])
        entity = {"id": "E", "name": found["entityName"]}
        project = {"id": "P", "internalId": "P", "name": found["projectName"], "entity": entity}
        collection = {"__typename": "ArtifactSequence", "id": "S", "name": found["artifactCollectionName"]}
        known = {name: found[name] for name in ("id", "digest", "state", "metadata")}
        return {
            "artifact": known
            | {"__typename": "Artifact", "artifactSequence": collection | {"project": project}, "versionIndex": 0}
            | {"artifactType": {"name": found["artifactTypeName"]}, "description": None, "ttlDurationSeconds": -1}
            | {"ttlIsInherited": False, "tags": [], "historyStep": None, "size": 1, "commitHash": "c", "fileCount": 1}
            | {"createdAt": "2026-01-01T00:00:00Z", "updatedAt": None, "aliases": []}
        }

    def stream(self, run_id: str, body: dict) -> None:
        """What `file_stream` brings: lines of files at an offset, and the end of the run."""
        run = self.runs[run_id]
        for name, part in (body.get("files") or {}).items():
            run.append(name, part["offset"], part["content"])
            if name == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
        run.is_preempting |= bool(body.get("preempting"))
        if body.get("complete"):
            run.exit_code = body["exitcode"]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wandb: WandbServer

    def log_message(self, *args) -> None:
        pass

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_graphql = self.path == "/graphql"
        query = json.loads(body) if is_graphql else {}
        if query and not query["operationName"]:  # as the commands of sweeps ask
            query["operationName"] = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])[1]
        name = query["operationName"] if is_graphql else f"{self.command} {self.path}"
        server = self.wandb
        if server.released.is_set() and server.failure is None and self.server is not server.http:
            self.close_connection = True  # a connection from before the server died
            return
        with server.lock:
            server.requests.append(name)
            server.received += body
            failure = server.failure
            is_failing = failure is not None and failure.times > 0 and failure.when(name)
            if is_failing:
                failure.times -= 1
        if is_failing:
            self._fail(failure.how)
        elif self.headers.get("Authorization", "") != _basic(KEY) and "/sdk/otel" not in self.path and is_graphql:
            self._send(401, b'{"errors": [{"message": "user is not logged in"}]}')
        else:
            with server.lock:
                self._send(200, self._result(query, body))

    def _result(self, query: dict, body: bytes) -> bytes:
        if query:
            variables = query.get("variables") or {}
            if query["operationName"] == "UpsertBucket" and variables["name"] in self.wandb.deleted:
                message = f"run ID {variables['name']} was previously created and deleted; try a new run name"
                return json.dumps({"errors": [{"message": message}], "data": {"upsertBucket": None}}).encode()
            return json.dumps({"data": self.wandb.answer(query["operationName"], variables)}).encode()
        parts = self.path.strip("/").split("/")
        if parts[-1] == "file_stream":
            self.wandb.stream(parts[-2], json.loads(body))
        elif self.command == "PUT" and parts[0] == "storage":
            self.wandb.runs[parts[1]].files["/".join(parts[2:])] = body
        return b"{}"

    def _fail(self, how: str) -> None:
        self.close_connection = True
        if how == "hang":
            self.wandb.released.wait(600)
        elif how == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"data": {"up')
        else:
            self._send(int(how), b'{"errors": [{"message": "told to fail"}]}')

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = _take


def _basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"api:{key}".encode()).decode()
