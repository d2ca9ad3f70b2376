"""Files that an upload brings, written to the disk as they arrive; and a tar archive as their source.

An upload is not trusted: its names never become paths, only the wanted files are written, and its size and number of
entries have limits, counted after decompression. All of this blocks, and belongs on a thread.
"""

import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from runtime.errors import InvalidRequest, PayloadTooLarge
from runtime.support.durable import create_file, move

MAX_ENTRIES = 1000
"""Most files and folders of an upload: a PEFT folder with a training run's checkpoints has a few dozen."""
MAX_NAME = 1024
"""Characters of an entry's name."""
_SHOWN = 200


def entry_error(name: str, problem: str) -> InvalidRequest:
    """Error that names an entry of an uploaded archive."""
    shown = name[:_SHOWN].encode("utf-8", "replace").decode()
    return InvalidRequest(f"The upload's entry `{shown}` {problem}.", param=shown, code="invalid_upload")


class UploadedFiles:
    """The files of one upload. Of each: `begin`, `write` in pieces, `end`; in the end `choose`."""

    def __init__(self, directory: Path, wanted: Collection[str], *, limit: int) -> None:
        """`wanted`: names of the files that are written; others are read over. `limit`: bytes of all entries."""
        self._directory = directory
        self._wanted = frozenset(wanted)
        self._limit = limit
        self._size = 0
        self._num_entries = 0
        self._seen: set[str] = set()
        self._kept: dict[str, Path] = {}
        """Path in the upload → where it was written: under a number, in `directory`."""
        self._file: BinaryIO | None = None

    def count(self, size: int) -> None:
        """Count bytes against the limit. Raises `PayloadTooLarge`."""
        self._size += size
        if self._size > self._limit:
            raise PayloadTooLarge(
                f"The upload, unpacked, is larger than {self._limit} bytes (adapters.max_adapter_upload)."
            )

    def note_folder(self, name: str) -> None:
        """Check the name of a folder, and count it."""
        _parts(name)
        self._count_entry(name)

    def begin(self, name: str) -> None:
        """Begin a file. Raises `InvalidRequest` naming the entry, and `OSError`."""
        parts = _parts(name)
        self._count_entry(name)
        path = "/".join(parts)
        if not parts:
            raise entry_error(name, "has no name")
        if path in self._seen:
            raise entry_error(name, "is there twice")
        self._seen.add(path)
        if parts[-1] in self._wanted:
            self._kept[path] = self._directory / f"{len(self._kept)}"
            self._file = create_file(self._kept[path])

    def write(self, data: bytes) -> None:
        if self._file is not None:
            self._file.write(data)

    def end(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def choose(self, marker: str, target: Path) -> list[str]:
        """Move the files that lie beside `marker` in the upload into the new folder `target`, under their own names.

        Where several folders hold a `marker`, the outermost is meant. Returns the paths that were left out. Raises
        `InvalidRequest` where there is no such folder, or no outermost one.
        """
        holders = sorted(
            (path.rpartition("/")[0] for path in self._kept if path.rpartition("/")[2] == marker),
            key=_depth,
        )
        if not holders:
            raise InvalidRequest(
                f"The upload has no {marker}: send the folder that PEFT's save_pretrained writes.", param=marker
            )
        if len(holders) > 1 and _depth(holders[0]) == _depth(holders[1]):
            raise entry_error(f"{holders[1]}/{marker}", f"is the second {marker}: send one adapter")
        target.mkdir()
        chosen = set[str]()
        for path, file in self._kept.items():
            folder, _, name = path.rpartition("/")
            if folder == holders[0]:
                move(file, target / name)
                chosen.add(path)
        return sorted(self._seen - chosen)

    def _count_entry(self, name: str) -> None:
        self._num_entries += 1
        if self._num_entries > MAX_ENTRIES:
            raise entry_error(name, f"is one too many: an upload may have {MAX_ENTRIES} files and folders")


def _depth(folder: str) -> int:
    return folder.count("/") + bool(folder)


def _parts(name: str) -> list[str]:
    """The parts of an entry's path; none for the top folder itself."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise entry_error(name, f"has a name of over {MAX_NAME} characters, or with some that cannot be printed")
    if name.startswith("/") or "\\" in name or name[1:2] == ":":
        raise entry_error(name, "has an absolute path, or one of another system; send relative paths")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise entry_error(name, "leads out of the upload (`..`)")
    return parts


# -- tar -------------------------------------------------------------------------------------------
#
# A tar archive, plain or gzipped, taken apart as it arrives.
#
# By hand around tarfile's parser of one header: TarFile itself reads a header's extensions into memory, whatever their
# size, and resolves links.

PIECE = 1024 * 1024
"""Bytes that are decompressed at once."""
MAX_EXTENSION = 64 * 1024
"""Bytes of a long name or a pax header."""
_GZIP = b"\x1f\x8b"
_KINDS = {
    tarfile.LNKTYPE: "is a hard link",
    tarfile.SYMTYPE: "is a symbolic link",
    tarfile.CHRTYPE: "is a device",
    tarfile.BLKTYPE: "is a device",
    tarfile.FIFOTYPE: "is a named pipe",
    tarfile.GNUTYPE_SPARSE: "is a sparse file",
}
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


class TarReader:
    """Feeds the files of an archive into an `UploadedFiles`."""

    def __init__(self, files: UploadedFiles) -> None:
        self._files = files
        self._head = b""
        """The first bytes, until there are enough to tell the format."""
        self._compressed = False
        self._unzip = zlib.decompressobj(31)
        self._unpack = _Unpacker(files)

    def feed(self, data: bytes) -> None:
        """Take the archive's next bytes. Raises `InvalidRequest`, `PayloadTooLarge`, `OSError`."""
        if len(self._head) < len(_GZIP):
            data = self._head + data
            self._head = data[: len(_GZIP)]
            if len(self._head) < len(_GZIP):
                return
            self._compressed = self._head == _GZIP
        if not self._compressed:
            self._pass_on(data)
            return
        while data:
            if self._unzip.eof:  # a further member; zeros after the last are padding
                data = data.lstrip(b"\0")
                if not data:
                    return
                self._unzip = zlib.decompressobj(31)
            try:
                self._pass_on(self._unzip.decompress(data, PIECE))
            except zlib.error as error:
                raise InvalidRequest(f"The archive is not valid gzip: {error}.", code="invalid_upload") from None
            data = self._unzip.unused_data if self._unzip.eof else self._unzip.unconsumed_tail

    def close(self) -> None:
        """Raise `InvalidRequest` where the archive is not complete."""
        if self._compressed and not self._unzip.eof:
            raise InvalidRequest("The archive is cut off: its gzip stream has no end.", code="invalid_upload")
        if len(self._head) < len(_GZIP):
            raise InvalidRequest("The archive is empty.", code="invalid_upload")
        self._unpack.close()

    def _pass_on(self, data: bytes) -> None:
        self._files.count(len(data))
        self._unpack.feed(data)


class _Unpacker:
    """Takes an uncompressed archive apart."""

    def __init__(self, files: UploadedFiles) -> None:
        self._files = files
        self._buffer = bytearray()
        self._ended = False
        self._kind = b""
        """Type of the entry whose data is being read; empty between entries."""
        self._left = 0
        """Bytes of its data that are missing."""
        self._padding = 0
        self._extension = b""
        self._name: str | None = None
        """Name and size of the next entry, from extensions before it."""
        self._size: int | None = None

    def feed(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while buffer and not self._ended:
            if self._kind:
                piece = bytes(buffer[: self._left])
                del buffer[: len(piece)]
                self._left -= len(piece)
                self._take(piece)
                if not self._left:
                    self._finish_entry()
            elif self._padding:
                dropped = min(self._padding, len(buffer))
                del buffer[:dropped]
                self._padding -= dropped
            elif len(buffer) >= tarfile.BLOCKSIZE:
                header = bytes(buffer[: tarfile.BLOCKSIZE])
                del buffer[: tarfile.BLOCKSIZE]
                self._begin_entry(header)
            else:
                break
        if self._ended:
            buffer.clear()

    def close(self) -> None:
        if self._kind or self._buffer:
            raise InvalidRequest("The archive is cut off in the middle of an entry.", code="invalid_upload")

    def _begin_entry(self, header: bytes) -> None:
        if not header.strip(b"\0"):
            self._ended = True
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise InvalidRequest(f"The upload is no tar archive: {error}.", code="invalid_upload") from None
        self._kind, self._left = info.type, info.size
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
            if not 0 < info.size <= MAX_EXTENSION:
                raise entry_error(info.name, f"has a header of {info.size} bytes; {MAX_EXTENSION} are allowed")
            self._extension = b""
        else:
            name = info.name if self._name is None else self._name
            self._left = info.size if self._size is None else self._size
            self._name = self._size = None
            self._begin_file(name, info)
        self._padding = -self._left % tarfile.BLOCKSIZE
        if not self._left:
            self._finish_entry()

    def _begin_file(self, name: str, info: tarfile.TarInfo) -> None:
        if info.type == tarfile.DIRTYPE:
            self._files.note_folder(name)
            self._left = 0
        elif info.type in _FILES:
            if self._left < 0:
                raise entry_error(name, "has no valid size")
            self._files.begin(name)
        else:
            kind = _KINDS.get(info.type, f"is of the type {info.type.decode('latin-1')!r}")
            raise entry_error(name, f"{kind}; an upload has files and folders only")

    def _take(self, piece: bytes) -> None:
        if self._kind in _FILES:
            self._files.write(piece)
        else:
            self._extension += piece

    def _finish_entry(self) -> None:
        kind, self._kind = self._kind, b""
        if kind in _FILES:
            self._files.end()
        elif kind == tarfile.GNUTYPE_LONGNAME:
            self._name = self._extension.rstrip(b"\0").decode("utf-8", "replace")
        elif kind in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            self._read_pax(kind == tarfile.XGLTYPE)

    def _read_pax(self, everywhere: bool) -> None:
        """Records of the form `LENGTH KEY=VALUE\\n`."""
        rest = self._extension
        while rest.strip(b"\0"):
            digits, _, record = rest.partition(b" ")
            length = int(digits) - len(digits) - 1 if digits.isdigit() and len(digits) < 10 else 0
            key, equals, value = record[: max(0, length - 1)].partition(b"=")
            if length < 1 or not equals or record[length - 1 : length] != b"\n":
                raise InvalidRequest("The archive has a pax header that cannot be read.", code="invalid_upload")
            rest = record[length:]
            if key == b"path" and not everywhere:
                self._name = value.decode("utf-8", "replace")
            elif key == b"size" and not everywhere and value.isdigit() and len(value) < 20:
                self._size = int(value)
            elif key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
                name = key.decode("utf-8", "replace")
                raise InvalidRequest(f"The archive has the pax header `{name}`, which is not taken.", param=name)
