"""A stand-in for W&B's server on this machine: it keeps what the real client sends, and answers what it asks.

It knows the requests that `wandb sync`, `wandb.init` and `wandb.Api` make of a run, and of its history's lines each at
the offset that the client names: a client that sends a line twice, or over another, shows here. Artifacts are taken
without their files.
"""

from __future__ import annotations

import gzip
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "team"
KEY = "0123456789" * 4


@dataclass
class StoredRun:
    """lines: {"wandb-history.jsonl": {offset: line}, ...}"""

    project: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    exit_code: int | None = None

    def history(self) -> list[dict[str, Any]]:
        stored = self.lines.get("wandb-history.jsonl", {})
        return [json.loads(stored[offset]) for offset in sorted(stored)]

    def summary(self) -> str:
        stored = self.lines.get("wandb-summary.json", {})
        return stored[max(stored)] if stored else "{}"


class Server(ThreadingHTTPServer):
    """runs: by id, in the order in which they came; requests: what was asked, by name; unknown: what it has no answer
    to; overwritten: lines sent twice; artifacts: type/name of each"""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, StoredRun] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.overwritten: list[str] = []
        self.artifacts: list[str] = []
        self.refuses_key = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    # --- GraphQL ------------------------------------------------------------------------------------------------------

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        for name, function in {
            "upsertBucket": self.upsert,
            "RunResumeStatus": self.resume_status,
            "createRunFiles": self.create_files,
            "createArtifact(": self.create_artifact,
            "useArtifact(": lambda _: {"useArtifact": {"artifact": {"id": "A"}}},
            "viewer": self.viewer,
            "serverInfo": lambda _: {"serverInfo": {"features": []}},
            "query Runs(": self.list_runs,
            "historyKeys": self.one_run,
            "parquetHistory": self.parquet,
            "history(": self.history_page,
        }.items():
            if name in query:
                self.requests.append(name)
                return function(variables)
        self.unknown.append(query)
        return {}

    def viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "V", "entity": ENTITY, "username": "user", "name": "user", "email": "", "flags": "{}"}
        viewer |= {"admin": False, "deletedAt": None, "teams": {"edges": []}, "apiKeys": {"edges": []}}
        return {"viewer": viewer, "serverInfo": {"features": []}}

    def upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables["name"]
        inserted = run_id not in self.runs
        run = self.runs.setdefault(run_id, StoredRun(variables.get("project") or ""))
        run.values |= {key: value for key, value in variables.items() if value is not None}
        return {"upsertBucket": {"bucket": self.bucket(run_id), "inserted": inserted}}

    def bucket(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        history = run.lines.get("wandb-history.jsonl", {})
        events = run.lines.get("wandb-events.jsonl", {})
        return {
            "id": run_id,
            "name": run_id,
            "displayName": run.values.get("displayName") or run_id,
            "description": None,
            "notes": None,
            "tags": run.values.get("tags") or [],
            "group": run.values.get("groupName"),
            "jobType": run.values.get("jobType"),
            "config": run.values.get("config") or "{}",
            "wandbConfig": "{}",
            "sweepName": None,
            "state": {None: "running", 0: "finished"}.get(run.exit_code, "failed"),
            "commit": None,
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00Z",
            "heartbeatAt": "2026-01-01T00:00:00Z",
            "projectId": "1",
            "user": {"name": "user", "username": "user"},
            "project": {"id": "1", "name": run.project, "entity": {"id": "E", "name": ENTITY}},
            "summaryMetrics": run.summary(),
            "systemMetrics": "{}",
            "historyKeys": {"lastStep": max((row.get("_step", 0) for row in run.history()), default=-1), "keys": {}},
            "historyLineCount": max(history, default=-1) + 1,
            "eventsLineCount": max(events, default=-1) + 1,
            "logLineCount": 0,
            "historyTail": json.dumps([history[max(history)]] if history else []),
            "eventsTail": json.dumps([events[max(events)]] if events else []),
        }

    def resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        bucket = self.bucket(variables["name"]) if variables["name"] in self.runs else None
        return {"model": {"id": "P", "name": "p", "entity": {"id": "E", "name": ENTITY}, "bucket": bucket}}

    def create_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        """As if its files were there already: the client then uploads none."""
        wanted = variables["input"]
        self.artifacts.append(f"{wanted['artifactTypeName']}/{wanted['artifactCollectionName']}")
        artifact = {"id": "A", "state": "COMMITTED", "artifactSequence": {"id": "S", "latestArtifact": {"id": "A"}}}
        return {"createArtifact": {"artifact": artifact}}

    def list_runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        group = (json.loads(variables["filters"]) or {}).get("group")
        chosen = [
            run_id
            for run_id, run in self.runs.items()
            if run.project == variables["project"] and group in (None, run.values.get("groupName"))
        ]
        if not any(run.project == variables["project"] for run in self.runs.values()):
            return {"project": None}
        edges = [{"node": self.bucket(run_id), "cursor": run_id} for run_id in chosen]
        page = {"endCursor": None, "hasNextPage": False}
        return {
            "project": {
                "internalId": "1",
                "runCount": len(chosen),
                "readOnly": False,
                "runs": {"edges": edges, "pageInfo": page},
            }
        }

    def one_run(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"id": "P", "internalId": "1", "run": self.bucket(variables["name"])}}

    def parquet(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}

    def history_page(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Rows by W&B's own _step, from minStep up to but without maxStep."""
        stored = self.runs[variables["run"]].lines.get("wandb-history.jsonl", {})
        steps = range(variables["minStep"], variables["maxStep"])
        lines = [line for _, line in sorted(stored.items()) if json.loads(line).get("_step") in steps]
        return {"project": {"run": {"history": lines}}}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send({})

    def do_PUT(self) -> None:
        self.read()
        self.send({})

    def do_POST(self) -> None:
        body = self.read()
        if self.server.refuses_key:
            self.send({"errors": [{"message": "user is not logged in"}]}, 401)
        elif self.path.endswith("/graphql"):
            request = json.loads(body)
            self.send({"data": self.server.answer(request["query"], request.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self.store(self.path.split("/")[-2], json.loads(body))
            self.send({})
        else:
            self.send({})

    def read(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def store(self, run_id: str, sent: dict[str, Any]) -> None:
        run = self.server.runs[run_id]
        for name, chunk in (sent.get("files") or {}).items():
            stored = run.lines.setdefault(name, {})
            for number, line in enumerate(chunk["content"], start=chunk["offset"]):
                if name == "wandb-history.jsonl" and number in stored:
                    self.server.overwritten.append(line)
                stored[number] = line
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")

    def send(self, answer: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
