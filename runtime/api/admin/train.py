"""POST /admin/train: a recipe becomes a job."""

from litestar import Response, post

from runtime.api.admin.query import check_names, flag
from runtime.api.admin.uploads import receive_submission
from runtime.api.admin.views import DryRun, JobDetail, job_detail
from runtime.api.auth import ADMIN
from runtime.api.handle import AnyRequest, api_of
from runtime.errors import InvalidRequest
from runtime.trainer.jobs.manager import JobManager

MAX_KEY = 255
"""Characters of an idempotency key."""


@post("/admin/train", opt={ADMIN: True}, status_code=201)
async def train(request: AnyRequest) -> Response[JobDetail | DryRun]:
    """Start a job from a recipe in YAML, alone or in a form with its data files. 201: it is queued; 202: its data
    is still being read; 200: this Idempotency-Key made it before, or `dry_run=1` asked what it would do."""
    api = api_of(request)
    jobs = api.handle.require_jobs()
    check_names(request, ("dry_run",))
    dry_run = flag(request, "dry_run")
    key = _idempotency_key(request)
    job_id = jobs.new_id()
    try:
        folder = jobs.directories.uploads(job_id)
        asked = await receive_submission(request, api.settings, job_id=job_id, folder=folder, idempotency_key=key)
    except BaseException:
        jobs.directories.discard(job_id)
        raise
    if dry_run:
        prepared = await jobs.dry_run(asked)
        plan = DryRun(name=prepared.name, total_steps=prepared.total_steps, summary=prepared.summary)
        return Response(plan, status_code=200)
    job, created = await jobs.submit(asked)
    location = {"Location": f"/admin/jobs/{job.id}"}
    status = 202 if job.state == "validating" else 201 if created else 200
    return Response(await detail_of(jobs, job.id), status_code=status, headers=location)


async def detail_of(jobs: JobManager, job_id: str) -> JobDetail:
    """Everything about one job. Raises `NotFound`."""
    job, progress = await jobs.store.describe(job_id)
    return job_detail(job, progress, await jobs.store.files(job_id), await jobs.store.checkpoints(job_id))


def _idempotency_key(request: AnyRequest) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not (1 <= len(key) <= MAX_KEY and key.isprintable()):
        raise InvalidRequest(
            f"Idempotency-Key: expected 1 to {MAX_KEY} printable characters, got {len(key)}.", param="Idempotency-Key"
        )
    return key
