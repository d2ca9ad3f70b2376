"""The nouns of stored files: purposes, and one file's row."""

from typing import Literal, get_args

import msgspec
from msgspec import Struct

UploadPurpose = Literal["fine-tune", "batch", "user_data", "evals", "assistants", "vision"]
"""Purposes of uploads, as OpenAI lists them. Fine-tuning jobs and batches read only files of their own purpose; files
of the others are stored and given back."""

UPLOAD_PURPOSES: tuple[UploadPurpose, ...] = get_args(UploadPurpose)

BATCH_OUTPUT = "batch_output"
"""Purpose of the files that a batch writes."""

PURPOSES: tuple[str, ...] = (*UPLOAD_PURPOSES, BATCH_OUTPUT)
"""Purposes that a stored file may have."""

FOLDER = "files"
"""Folder in the state directory; each file has a folder of its own there, named for its id."""
CONTENT, RECORD = "content", "file.json"
"""In a file's folder: its bytes, and a copy of its row, in case the row is lost."""

MAX_FILENAME = 255
"""Characters of a file's name."""

MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3600, 30 * 86400
"""Bounds of `expires_after.seconds`, OpenAI's."""


class StoredFile(Struct, frozen=True, kw_only=True):
    """One file. Times are seconds since the epoch."""

    id: str
    owner: str
    """Tenant label of the key that it belongs to; "" where no key is required."""
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None = None
    path: str
    """Path below the state directory. No client sees it."""

    def expired(self, now: float) -> bool:
        """True once it is to be deleted: from then on it is not found any more."""
        return self.expires_at is not None and self.expires_at <= now


def encode_record(file: StoredFile) -> bytes:
    """A file's row, as it lies beside the file."""
    return msgspec.json.format(msgspec.json.encode(file))
