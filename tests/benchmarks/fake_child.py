"""Speaks what `benchmarks/peers/openvino_child.py` speaks: a token of every request a step, and noise before."""

import json
import queue
import sys
import threading


def main() -> None:
    write("a library says hello")
    write(json.dumps({"ready": True}))
    requests: queue.SimpleQueue[dict[str, int] | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        requests.put(None)

    threading.Thread(target=read, daemon=True).start()
    left: dict[int, int] = {}
    while True:
        while not left or not requests.empty():
            if (request := requests.get()) is None:
                return
            if request["output_len"] == 13:
                sys.exit("no luck")
            left[request["id"]] = request["output_len"]
        step = dict.fromkeys(left, 1)
        left = {id: count - 1 for id, count in left.items()}
        ended = [id for id, count in left.items() if count == 0]
        left = {id: count for id, count in left.items() if count}
        write(json.dumps({"tokens": step, "ended": ended}))


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
