"""What reading an adapter raises."""

from runtime.errors import InvalidRequest


class AdapterInvalid(InvalidRequest):
    """An adapter's files are broken, unsafe, or do not fit the base model. Names files, never folders: whoever
    sent the adapter reads this."""

    default_code = "invalid_adapter"
