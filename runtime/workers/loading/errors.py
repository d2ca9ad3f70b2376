"""What every loader raises."""


class ModelLoadError(Exception):
    """The model cannot be loaded. The message says what is wrong, in which file, and what to do about it."""
