"""What the endpoints for adapters share: the library, and which folders may be read."""

from pathlib import Path
from typing import TYPE_CHECKING

from runtime.api.handle import Api
from runtime.errors import Forbidden, NotFound, StorageUnavailable
from runtime.trainer.directory import state_directory

if TYPE_CHECKING:
    from runtime.trainer.adapters.library import AdapterLibrary


def library_of(api: Api) -> "AdapterLibrary":
    """Raises `StorageUnavailable` where this server has none."""
    library = api.handle.require().adapters
    if library is None:
        raise StorageUnavailable(
            "This server keeps no adapters: its state directory could not be opened when it started (another server "
            "may have it; the log says why). Set trainer.state_dir."
        )
    return library


def allowed_folder(path: str, api: Api, *, param: str) -> Path:
    """The folder that `path` names, links resolved. Blocks.

    Only from trainer.data_roots and from the state directory: who may load adapters may not read the whole disk.
    Raises `Forbidden` for others, there or not, and `NotFound`.
    """
    roots = [Path(root).expanduser() for root in api.settings.trainer.data_roots] + [state_directory(api.settings)]
    try:
        real = Path(path).expanduser().resolve()
        inside = any(real.is_relative_to(root.resolve()) for root in roots)
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL, no such user
        inside = False
    if not inside:
        raise Forbidden(
            f"{param} must be in a folder that the setting trainer.data_roots names, or in the state directory.",
            param=param,
        )
    if not real.is_dir():
        raise NotFound(f"{param}: there is no such folder.", param=param)
    return real
