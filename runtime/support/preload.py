"""Loading of torch's largest library on a thread of its own, while Python imports other modules.

An import holds Python's lock while the system maps a library and its initialisers run: a third of a second for this
one. A foreign function does not hold it.
"""

import ctypes
import importlib.util
import os
import threading
from pathlib import Path


def preload_torch() -> threading.Thread | None:
    """Begin to load it. None where it is not found: `import torch` then does all of the work, or says what is wrong."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    library = Path(found.origin).parent / "lib" / "libtorch_cpu.so"
    if not library.is_file():
        return None
    arguments = (os.fsencode(library), os.RTLD_NOW)
    thread = threading.Thread(target=ctypes.CDLL(None).dlopen, args=arguments, name="preload", daemon=True)
    thread.start()
    return thread
