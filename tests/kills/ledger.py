"""A record of what a server has acknowledged, and checks that the next one still knows it.

An operation whose answer never came may have happened or not: both are right, and afterwards it is known which.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from runtime.adapters.versions import RECORD, digest
from runtime.trainer.course import read_snapshot

PATIENCE = 50
"""Looks at what may be under way, 0.2 s apart."""

ENDED = {"succeeded", "failed", "cancelled"}


@dataclass
class JobEntry:
    """A job that was acknowledged."""

    id: str
    name: str
    files: dict[str, str]
    """Name → SHA-256 of what was sent."""
    status: str = "queued"
    """The last end that was seen, else anything."""
    adapter: str | None = None
    deleting: bool = False
    """It was asked for, and not answered."""
    deleted: bool = False


@dataclass
class AdapterEntry:
    """A name that one actor alone works on, so that what it must be is known."""

    name: str
    versions: dict[int, str] = field(default_factory=dict)
    """Acknowledged: number → SHA-256."""
    current: int | None = None
    pending: str = ""
    """The operation whose answer has not come."""
    deleting: set[int] = field(default_factory=set)
    """Versions of which a deletion may have happened."""
    aliases: dict[str, bool | None] = field(default_factory=dict)
    """Alias → it is there, it is not there, not known."""


@dataclass
class FileEntry:
    """A file of /v1/files that was acknowledged."""

    id: str
    sha256: str
    deleting: bool = False
    deleted: bool = False


@dataclass
class BatchEntry:
    """A batch that was acknowledged."""

    id: str
    custom_ids: set[str]
    answered: int = 0
    """The most answers that were seen."""
    ended: dict[str, Any] | None = None
    """The batch, once it was seen to have ended."""


class Lost(AssertionError):
    """Something that was acknowledged is not there, or something is half there."""


def expect(condition: object, *what: object) -> None:
    if not condition:
        raise Lost(" ".join(map(str, what)))


class Ledger:
    """Written by the actors while a server runs, checked when none is at work."""

    def __init__(self, state: Path) -> None:
        self.lock = threading.RLock()
        self.state = state
        self.jobs: dict[str, JobEntry] = {}
        self.adapters: dict[str, AdapterEntry] = {}
        self.files: dict[str, FileEntry] = {}
        self.batches: dict[str, BatchEntry] = {}
        self.sent: set[str] = set()
        """SHA-256 of everything that was ever sent as a file."""
        self.acknowledged = 0
        self.unanswered = 0

    def check(self, http: httpx.Client) -> None:
        """Raises `Lost`."""
        with self.lock:
            self._check_jobs(http)
            self._check_adapters(http)
            self._check_files(http)
            for batch in self.batches.values():
                self._check_batch(http, batch)
            self._check_lost_found()

    # -- jobs ----------------------------------------------------------------------------------

    def _check_jobs(self, http: httpx.Client) -> None:
        listed = set(_all_jobs(http))
        folders = {path.name for path in (self.state / "jobs").glob("*")}
        expect(folders <= listed, "folders without a job:", folders - listed)
        for entry in self.jobs.values():
            answer = http.get(f"/admin/jobs/{entry.id}")
            if answer.status_code == 404 and (entry.deleting or entry.deleted):
                entry.deleted = True
                expect(not (self.state / "jobs" / entry.id).exists(), "deleted, and files are left:", entry.id)
                continue
            expect(answer.status_code == 200, "lost job", entry, answer.text)
            expect(not entry.deleted, "a deleted job is back:", entry)
            entry.deleting = False
            self._check_job(entry, answer.json())

    def _check_job(self, entry: JobEntry, job: dict[str, Any]) -> None:
        if entry.status in ENDED:
            expect(job["status"] == entry.status, "another end than before:", entry, job)
            expect(job["adapter"] == entry.adapter, "another adapter than before:", entry, job)
        expect({file["name"] for file in job["files"]} == set(entry.files), "other files:", entry, job["files"])
        folder = self.state / "jobs" / entry.id
        stored = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "uploads").iterdir()}
        expect(stored == set(entry.files.values()), "the uploads of", entry.id, "are not what was sent")
        expect(json.loads((folder / "job.json").read_text())["job"]["id"] == entry.id, "another record", entry)
        steps = {f"step-{checkpoint['step']}" for checkpoint in job["checkpoints"]}
        if job["status"] in ENDED:
            present = {path.name for path in (folder / "checkpoints").glob("*")}
            expect(present == steps, "checkpoints", present, "and rows", steps, "of", entry.id)
        for step in steps if job["status"] in ENDED else ():
            read_snapshot(folder / "checkpoints" / step)
        if job["status"] in ENDED:
            entry.status, entry.adapter = job["status"], job["adapter"]
        if job["status"] == "failed":
            code = job["error"]["code"]
            expect(code == "crash_loop", "a job failed:", entry.id, job["error"])

    # -- adapters ------------------------------------------------------------------------------

    def _check_adapters(self, http: httpx.Client) -> None:
        unknown: set[tuple[str, str]] | None = None
        for _ in range(PATIENCE):  # a job may be publishing now: its folder is there before its row
            listed = [found["name"] for found in http.get("/admin/adapters").json()["adapters"]]
            shown = {name: http.get(f"/admin/adapters/{name}").json() for name in listed}
            present = {(name, v["number"]): v["sha256"] for name in shown for v in shown[name]["versions"]}
            folders = {(path.parent.name, path.name) for path in (self.state / "adapters").glob("[!.]*/*")}
            rows = {(name, str(number)) for name, number in present}
            expect(rows <= folders, "versions without a folder:", rows - folders)
            unknown = folders - rows if unknown is None else unknown & (folders - rows)
            if not unknown:
                break
            time.sleep(0.2)
        expect(not unknown, "folders without a version:", unknown)
        for (name, number), sha256 in present.items():
            folder = self.state / "adapters" / name / str(number)
            expect(digest(folder) == sha256, "the files of", name, number, "are not what they were")
            expect(json.loads((folder / RECORD).read_text())["sha256"] == sha256, "another record", name, number)
        for entry in self.adapters.values():
            self._check_adapter(entry, shown.get(entry.name))
        for job in self.jobs.values():
            if job.adapter is not None:
                name, _, number = job.adapter.partition("@")
                expect((name, int(number)) in present, "published, and not there:", job)
        for name in list(shown)[:3]:
            body = {"model": name, "prompt": "The newt", "max_tokens": 1}
            answer = http.post("/v1/completions", json=body)
            expect(answer.status_code == 200, name, "does not answer:", answer.text)

    def _check_adapter(self, entry: AdapterEntry, found: dict[str, Any] | None) -> None:
        numbers = {version["number"]: version["sha256"] for version in found["versions"]} if found else {}
        lost = {number for number, sha in entry.versions.items() if numbers.get(number) != sha} - entry.deleting
        expect(not lost, "lost versions", lost, "of", entry, found)
        more = set(numbers) - set(entry.versions)
        expect(not more or entry.pending == "publish", "versions that were never asked for:", more, entry)
        current = found["current"] if found else None
        if entry.pending:
            expect(current is None or current in numbers, "the name points to nothing:", entry, found)
        else:
            expect(current == entry.current, "the name points elsewhere:", entry, found)
        aliases = set(found["aliases"]) if found else set()
        for alias, there in entry.aliases.items():
            expect(there is None or (alias in aliases) == there, "the alias", alias, there, entry, found)
        entry.versions, entry.current, entry.pending, entry.deleting = numbers, current, "", set()
        entry.aliases = {alias: alias in aliases for alias in entry.aliases}

    # -- files and batches ---------------------------------------------------------------------

    def _check_files(self, http: httpx.Client) -> None:
        listed = {file["id"]: file for file in http.get("/v1/files", params={"limit": 10_000}).json()["data"]}
        folders = {path.name for path in (self.state / "files").glob("*")}
        uploads = {id for id, file in listed.items() if file["purpose"] != "batch_output"}
        expect(folders == uploads, "folders of files", folders, "and rows", uploads)
        for id, file in listed.items():
            content = http.get(f"/v1/files/{id}/content").content
            expect(len(content) == file["bytes"], "a file is not whole:", file, len(content))
            sha256 = hashlib.sha256(content).hexdigest()
            expect(id not in uploads or sha256 in self.sent, "a file that was never sent:", file)
            expect(id not in self.files or self.files[id].sha256 == sha256, "another content than before:", file)
        for entry in self.files.values():
            expect(entry.id in listed or entry.deleting or entry.deleted, "lost file", entry)
            expect(entry.id not in listed or not entry.deleted, "a deleted file is back:", entry)
            entry.deleting, entry.deleted = False, entry.id not in listed

    def _check_batch(self, http: httpx.Client, entry: BatchEntry) -> None:
        answer = http.get(f"/v1/batches/{entry.id}")
        expect(answer.status_code == 200, "lost batch", entry.id, answer.text)
        batch = answer.json()
        counts = batch["request_counts"]
        expect(counts["completed"] >= entry.answered, "answers are lost:", entry.id, entry.answered, batch)
        entry.answered = counts["completed"]
        if entry.ended is not None:
            expect(batch == entry.ended, "another end than before:", entry.ended, batch)
        elif batch["status"] not in ("validating", "in_progress", "finalizing"):
            entry.ended = batch
            expect(batch["status"] == "completed", "a batch failed:", batch)
            self._check_answers(http, entry, batch)

    def _check_answers(self, http: httpx.Client, entry: BatchEntry, batch: dict[str, Any]) -> None:
        text = http.get(f"/v1/files/{batch['output_file_id']}/content").text
        lines = [json.loads(line) for line in text.splitlines()]
        found = [line["custom_id"] for line in lines]
        expect(len(found) == len(set(found)), "lines that were answered twice:", entry.id)
        expect(set(found) == entry.custom_ids, "lines without an answer:", entry.custom_ids - set(found))
        expect(batch["request_counts"]["failed"] == 0, "lines that failed:", batch)
        for line in lines:
            expect(bool(line["response"]["body"]["choices"]), "an empty answer:", line)
        record = json.loads((self.state / "batches" / entry.id / "batch.json").read_text())
        expect(record["batch"]["output_file_id"] == batch["output_file_id"], "another record", record)

    def _check_lost_found(self) -> None:
        for batch in self.state.glob("lost+found/*"):
            for folder in batch.glob("jobs/*"):
                entry = self.jobs.get(folder.name)
                whole = entry is not None and (folder / "job.json").exists()
                expect(not whole, "an acknowledged job is in lost+found:", folder)
            for folder in batch.glob("adapters/*/*"):
                known = self.adapters.get(folder.parent.name)
                kept = known is not None and int(folder.name) in known.versions
                expect(not kept, "an acknowledged version is in lost+found:", folder)
            for folder in batch.glob("files/*"):
                expect(folder.name not in self.files, "an acknowledged file is in lost+found:", folder)
            for folder in batch.glob("batches/*"):
                expect(folder.name not in self.batches, "an acknowledged batch is in lost+found:", folder)


def _all_jobs(http: httpx.Client) -> Iterable[str]:
    after: str | None = None
    while True:
        params: dict[str, Any] = {"limit": 100} | ({} if after is None else {"after": after})
        page = http.get("/admin/jobs", params=params).json()
        for job in page["data"]:
            yield job["id"]
            after = job["id"]
        if not page["has_more"]:
            return
