"""What servers did before: a batch is filled, runs until its last sequence ends, and memory is reserved in full."""

from benchmarks.simulation.device import Device, Model
from benchmarks.simulation.outcome import Outcome, Served
from benchmarks.simulation.replay import CONTEXT
from benchmarks.simulation.trace import Traffic


def replay_static(
    traffic: Traffic, device: Device, model: Model, *, max_running: int = 256, kv_tokens: int | None = None
) -> Outcome:
    """The trace under static batching with contiguous KV: every sequence reserves a whole context."""
    room = (kv_tokens or int(device.kv_memory / model.kv_bytes_per_token)) // CONTEXT
    size = max(1, min(max_running, room))
    outcome = Outcome()
    coming = list(traffic.arrivals())
    now, index, used, steps = 0.0, 0, 0.0, 0
    while index < len(coming):
        now = max(now, coming[index].at)
        batch = [arrival for arrival in coming[index : index + size] if arrival.at <= now]
        index += len(batch)
        prompts = sum(arrival.prompt for arrival in batch)
        now += model.step_seconds(device, prompts, prompts)
        first = now
        for generated in range(1, max(arrival.output for arrival in batch) + 1):
            running = [arrival for arrival in batch if arrival.output >= generated]
            context = sum(arrival.prompt + generated for arrival in running)
            used += context / (len(batch) * CONTEXT)
            steps += 1
            for arrival in running:
                if arrival.output == generated:
                    tpot = (now - first) / max(1, generated - 1)
                    outcome.served.append(
                        Served(arrival.tenant, arrival.priority, first - arrival.at, tpot, now - arrival.at)
                    )
            if any(arrival.output > generated for arrival in batch):
                now += model.step_seconds(device, len(batch), context)
    outcome.seconds = now
    outcome.steps = steps
    outcome.output_tokens = sum(arrival.output for arrival in coming)
    outcome.kv_waste = 1 - used / max(1, steps)
    return outcome
