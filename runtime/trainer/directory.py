"""Where the state directory is: jobs, checkpoints, uploaded files and adapters. Imports nothing heavy."""

import os
from pathlib import Path

from settings.schema import Settings


def state_directory(settings: Settings) -> Path:
    """`trainer.state_dir`, else `eft` under XDG_STATE_HOME, else ~/.local/state/eft. Absolute."""
    if settings.trainer.state_dir is not None:
        return Path(settings.trainer.state_dir).expanduser().absolute()
    home = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not home.is_absolute():  # the XDG specification has relative ones ignored
        home = Path.home() / ".local" / "state"
    return home / "eft"
