"""Recipes for launched jobs of a tiny model, and the processes of such a job."""

import json
from pathlib import Path

PROGRAM = b"runtime.trainer.launched"

WORDS = ("newt", "eft", "pond", "rain", "road", "moss", "fern", "leaf")
ROWS = "".join(
    json.dumps(
        {
            "messages": [
                {"role": "user", "content": f"Say {word} {number}"},
                {"role": "assistant", "content": f"{word} " * (1 + number % 5)},
            ]
        }
    )
    + "\n"
    for number, word in enumerate(WORDS * 4)
).encode()
"""32 rows of several lengths."""

RECIPE = """
name: words
datasets: [{path: rows.jsonl, type: chat_template}]
sequence_len: 64
micro_batch_size: 2
learning_rate: 1e-2
optimizer: adamw_torch
warmup_steps: 0
seed: 7
"""
LORA = RECIPE + "adapter: lora\nlora_r: 4\n"


def ranks_of(state: Path) -> list[int]:
    """Process ids of the ranks that run for jobs of this state directory."""
    return _processes(state, b"rank")


def agents_of(state: Path) -> list[int]:
    """The same of torchrun's agents."""
    return _processes(state, b"agent", b"lasting-agent")


def _processes(state: Path, *kinds: bytes) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        at = words.index(PROGRAM) if PROGRAM in words else len(words)
        # torchrun's own command line names the program too, behind its arguments.
        if at + 1 < len(words) and words[at + 1] in kinds and any(word.startswith(bytes(state)) for word in words):
            found.append(int(path.name))
    return found
