"""OpenVINO GenAI behind a pair of pipes. Run by the Python of the environment that it is installed in, where none
of our packages are.

openvino_child.py NETWORK TOKENIZER AT_ONCE THREADS: a GGUF file, or a directory with an OpenVINO network; a GGUF
file for the tokenizer. Reads a request a line from its input, `{"id", "prompt": [token ids], "output_len"}`. Writes a
line when it can be used, `{"ready": true}`, and one after each step, `{"tokens": {id: new tokens}, "ended": [ids]}`.
"""

import json
import queue
import sys
import threading
from typing import Any

import numpy as np
import openvino
import openvino_genai

CACHE_GB = 2
"""For keys and values."""


def main() -> None:
    network, tokenizer, at_once, threads = sys.argv[1:]
    config = openvino_genai.SchedulerConfig()
    config.max_num_seqs = int(at_once)
    config.enable_prefix_caching = True
    config.cache_size = CACHE_GB
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        network, openvino_genai.Tokenizer(tokenizer), config, "CPU", INFERENCE_NUM_THREADS=int(threads)
    )
    write({"ready": True})
    serve(pipeline, lines())


def serve(pipeline: Any, requests: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    """Until the input ends."""
    running: dict[int, Any] = {}
    while True:
        while not running or not requests.empty():
            if (request := requests.get()) is None:
                return
            running[request["id"]] = add(pipeline, request)
        pipeline.step()
        tokens, ended = {}, []
        for id, handle in running.items():
            if handle.can_read():
                tokens[id] = sum(len(output.generated_ids) for output in handle.read().values())
            if handle.get_status() != openvino_genai.GenerationStatus.RUNNING and not handle.can_read():
                ended.append(id)
        for id in ended:
            del running[id]
        write({"tokens": tokens, "ended": ended})


def add(pipeline: Any, request: dict[str, Any]) -> Any:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = request["output_len"]
    config.ignore_eos = True
    config.do_sample = False
    return pipeline.add_request(request["id"], openvino.Tensor(np.array([request["prompt"]])), config)


def lines() -> "queue.SimpleQueue[dict[str, Any] | None]":
    """The requests as they come; None is the end."""
    requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        requests.put(None)

    threading.Thread(target=read, daemon=True).start()
    return requests


def write(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
