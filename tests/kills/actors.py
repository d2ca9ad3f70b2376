"""Clients that keep a server at work while it is killed: jobs with files, adapters from outside, files, batches,
deletions.

Each notes in the ledger what it is about to ask for, and what was answered."""

import hashlib
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from runtime.api.openai.fine_tuning import TRAIN_FILE
from tests.jobs import newt_recipe
from tests.kills.ledger import ENDED, AdapterEntry, BatchEntry, FileEntry, JobEntry, Ledger

MAX_OPEN = 4
"""Jobs that wait or run at once."""

MAX_OPEN_BATCHES = 2
BATCH_LINES = 200


class Gone(Exception):
    """The server was killed before it answered."""


class Actor(threading.Thread):
    """Does one thing after the other until the server is gone."""

    def __init__(self, ledger: Ledger, url: str, seed: int, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self.ledger = ledger
        self.rng = random.Random(seed)
        self.failure: BaseException | None = None
        self._over = over
        self._http = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def run(self) -> None:
        try:
            while not self._over.is_set():
                self.act()
        except Gone:
            pass
        except BaseException as error:
            self.failure = error
        finally:
            self._http.close()

    def act(self) -> None:
        raise NotImplementedError

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Raises `Gone`."""
        try:
            answer = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            self.ledger.unanswered += 1
            raise Gone from error
        assert answer.status_code < 500, (method, path, answer.status_code, answer.text)
        self.ledger.acknowledged += answer.status_code < 300 and method != "GET"
        return answer

    def rest(self, most: float) -> None:
        self._over.wait(self.rng.uniform(0, most))


class Trainer(Actor):
    """Asks for jobs, under keys, so that a job whose answer was lost is not asked for twice; deletes and cancels some.
    What it asks for again is `owed`, by key."""

    def __init__(self, ledger: Ledger, url: str, seed: int, over: threading.Event, owed: dict[str, Any]) -> None:
        super().__init__(ledger, url, seed, over)
        self._owed = owed

    def act(self) -> None:
        if self._owed or len(self._open()) < MAX_OPEN:
            self._submit()
        ended = [job for job in self.ledger.jobs.values() if job.status in ENDED and not job.deleted]
        if len(ended) > 12 or (ended and self.rng.random() < 0.2):
            self._delete_job(self.rng.choice(ended))
        if (waiting := self._open()) and self.rng.random() < 0.1:
            self.ask("POST", f"/admin/jobs/{self.rng.choice(waiting).id}/cancel")
        self._look()
        self.rest(0.1)

    def _open(self) -> list[JobEntry]:
        return [job for job in self.ledger.jobs.values() if job.status not in ENDED and not job.deleted]

    def _submit(self) -> None:
        if not self._owed:
            key = f"key-{self.rng.getrandbits(48):x}"
            text = "the newt crosses the road at night "
            rows = "".join(
                json.dumps({"text": f"{text}{n} {key}"}) + "\n" for n in range(self.rng.choice((4, 40, 4000)))
            )
            recipe = newt_recipe(
                name=f"job-{self.rng.randrange(40)}-{key}",
                max_steps=self.rng.randint(1, 6),
                save_steps=self.rng.randint(1, 2),
                save_total_limit=2,
                loss_watchdog_threshold=100,
            )
            self._owed[key] = recipe, rows.encode()
        key, (recipe, data) = next(iter(self._owed.items()))
        files = [
            ("recipe", ("recipe.yaml", recipe.encode(), "application/yaml")),
            ("data", ("train.jsonl", data, "application/jsonl")),
        ]
        answer = self.ask("POST", "/admin/train", files=files, headers={"Idempotency-Key": key})
        assert answer.status_code in (200, 201, 202), answer.text
        job = answer.json()
        with self.ledger.lock:
            del self._owed[key]
            digest = hashlib.sha256(data).hexdigest()
            self.ledger.jobs[job["id"]] = JobEntry(job["id"], job["name"] or "", {"train.jsonl": digest})

    def _delete_job(self, job: JobEntry) -> None:
        job.deleting = True
        answer = self.ask("DELETE", f"/admin/jobs/{job.id}")
        assert answer.status_code == 200, answer.text
        job.deleted = True

    def _look(self) -> None:
        for job in self._open():
            found = self.ask("GET", f"/admin/jobs/{job.id}").json()
            if found["status"] in ENDED:
                job.adapter, job.status = found["adapter"], found["status"]


class Publisher(Actor):
    """Works on one adapter of its own."""

    def __init__(
        self, ledger: Ledger, url: str, seed: int, over: threading.Event, name: str, sources: list[Path]
    ) -> None:
        super().__init__(ledger, url, seed, over)
        self._sources = sources
        self._entry = ledger.adapters.setdefault(name, AdapterEntry(name, aliases={f"{name}-alias": False}))

    def act(self) -> None:
        entry = self._entry
        options: list[Callable[[], None]] = [self._publish]
        if entry.current is not None:
            options += [self._publish, self._alias, self._promote, self._delete_version]
            if self.rng.random() < 0.2:
                options = [self._delete_all]
        self.rng.choice(options)()
        self.rest(0.1)

    def _publish(self) -> None:
        entry = self._entry
        entry.pending = "publish"
        body = {"lora_name": entry.name, "lora_path": str(self.rng.choice(self._sources)), "load_inplace": True}
        answer = self.ask("POST", "/v1/load_lora_adapter", json=body)
        assert answer.status_code == 200, answer.text
        self._settle()

    def _promote(self) -> None:
        entry = self._entry
        entry.pending = "promote"
        answer = self.ask(
            "POST", f"/admin/adapters/{entry.name}/promote", json={"version": self.rng.choice(list(entry.versions))}
        )
        assert answer.status_code == 200, answer.text
        self._settle()

    def _alias(self) -> None:
        entry = self._entry
        (alias,) = entry.aliases
        there, entry.aliases[alias] = entry.aliases[alias], None
        path = f"/admin/adapters/{entry.name}/alias"
        answer = self.ask("DELETE", f"{path}/{alias}") if there else self.ask("POST", path, json={"alias": alias})
        assert answer.status_code == 200, answer.text
        entry.aliases[alias] = not there

    def _delete_version(self) -> None:
        entry = self._entry
        old = [number for number in entry.versions if number != entry.current]
        if not old:
            return
        number = self.rng.choice(old)
        entry.deleting = {number}
        answer = self.ask("DELETE", f"/admin/adapters/{entry.name}/versions/{number}?drain=1")
        assert answer.status_code == 200, answer.text
        with self.ledger.lock:
            del entry.versions[number]
            entry.deleting = set()

    def _delete_all(self) -> None:
        entry = self._entry
        entry.pending, entry.deleting = "delete", set(entry.versions)
        entry.aliases = dict.fromkeys(entry.aliases)
        answer = self.ask("DELETE", f"/admin/adapters/{entry.name}?drain=1")
        assert answer.status_code == 200, answer.text
        with self.ledger.lock:
            entry.versions, entry.current, entry.pending, entry.deleting = {}, None, "", set()
            entry.aliases = dict.fromkeys(entry.aliases, False)

    def _settle(self) -> None:
        """Note what the server says that there is after an acknowledged change."""
        found = self.ask("GET", f"/admin/adapters/{self._entry.name}").json()
        with self.ledger.lock:
            self._entry.versions = {version["number"]: version["sha256"] for version in found["versions"]}
            self._entry.current, self._entry.pending = found["current"], ""


class Uploader(Actor):
    """Works with files: uploads, reads and deletes them, and makes batches and fine-tuning jobs of some."""

    def act(self) -> None:
        options = [self._upload, self._upload, self._batch, self._fine_tune, self._delete_file, self._look]
        self.rng.choice(options)()
        self.rest(0.1)

    def _send(self, content: bytes, purpose: str) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        with self.ledger.lock:
            self.ledger.sent.add(sha256)
        files = {"file": ("input.jsonl", content, "application/octet-stream")}
        answer = self.ask("POST", "/v1/files", files=files, data={"purpose": purpose})
        assert answer.status_code == 200, answer.text
        entry = FileEntry(answer.json()["id"], sha256)
        with self.ledger.lock:
            self.ledger.files[entry.id] = entry
        return entry.id

    def _upload(self) -> None:
        length = self.rng.choice((1, 5_000, 3_000_000))
        self._send(self.rng.randbytes(length), "user_data")

    def _batch(self) -> None:
        if sum(batch.ended is None for batch in self.ledger.batches.values()) >= MAX_OPEN_BATCHES:
            return
        ids = [f"line-{number}" for number in range(BATCH_LINES)]
        lines = [
            {"custom_id": id, "method": "POST", "url": "/v1/completions", "body": {"prompt": id, "max_tokens": 4}}
            for id in ids
        ]
        file_id = self._send(b"".join(json.dumps(line).encode() + b"\n" for line in lines), "batch")
        asked = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
        answer = self.ask("POST", "/v1/batches", json=asked)
        assert answer.status_code == 200, answer.text
        batch = BatchEntry(answer.json()["id"], set(ids))
        with self.ledger.lock:
            self.ledger.batches[batch.id] = batch

    def _fine_tune(self) -> None:
        """Train on an uploaded file, which may be deleted afterwards."""
        open_jobs = [job for job in self.ledger.jobs.values() if job.status not in ENDED and not job.deleted]
        if len(open_jobs) >= MAX_OPEN:
            return
        turns = [{"role": "user", "content": "Where is the newt?"}, {"role": "assistant", "content": "On the road."}]
        rows = b"".join(json.dumps({"messages": turns, "n": n}).encode() + b"\n" for n in range(6))
        file_id = self._send(rows, "fine-tune")
        model = self.ask("GET", "/v1/models").json()["data"][0]["id"]
        asked = {"model": model, "training_file": file_id, "suffix": f"tuned-{self.rng.randrange(4)}"}
        asked["hyperparameters"] = {"n_epochs": 1, "batch_size": 2}
        answer = self.ask("POST", "/v1/fine_tuning/jobs", json=asked)
        assert answer.status_code == 200, answer.text
        id = answer.json()["id"]
        with self.ledger.lock:
            self.ledger.jobs[id] = JobEntry(id, "", {TRAIN_FILE: hashlib.sha256(rows).hexdigest()})

    def _delete_file(self) -> None:
        files = [file for file in self.ledger.files.values() if not file.deleted]
        if len(files) < 6:
            return
        file = self.rng.choice(files)
        file.deleting = True
        answer = self.ask("DELETE", f"/v1/files/{file.id}")
        assert answer.status_code in (200, 409), answer.text  # 409: a batch reads it
        file.deleted, file.deleting = answer.status_code == 200, False

    def _look(self) -> None:
        for batch in self.ledger.batches.values():
            if batch.ended is None:
                found = self.ask("GET", f"/v1/batches/{batch.id}").json()
                batch.answered = max(batch.answered, found["request_counts"]["completed"])
