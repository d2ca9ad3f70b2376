"""What servers did before: a batch is filled, runs until its last sequence ends, and memory is reserved in full."""

from benchmarks.simulation.device import Device, Model
from benchmarks.simulation.outcome import Outcome
from benchmarks.simulation.replay import CONTEXT, Coming
from benchmarks.simulation.trace import Arrival, Traffic


def replay_static(
    traffic: Traffic, device: Device, model: Model, *, max_running: int = 256, kv_tokens: int | None = None
) -> Outcome:
    """The trace under static batching with contiguous KV: every sequence reserves a whole context."""
    room = (kv_tokens or int(device.kv_memory / model.kv_bytes_per_token)) // CONTEXT
    size = max(1, min(max_running, room))
    outcome = Outcome()
    coming = Coming(traffic.arrivals())
    waiting: list[Arrival] = []
    now, used = 0.0, 0.0
    while coming or waiting:
        if not waiting:
            now = max(now, coming.next_at)
        waiting += coming.until(now)
        batch, waiting = waiting[:size], waiting[size:]
        prompts = sum(arrival.prompt for arrival in batch)
        now += model.step_seconds(device, prompts, prompts)
        first = now
        running = sorted(batch, key=lambda arrival: arrival.output)
        done, context = 0, prompts
        for generated in range(1, running[-1].output + 1):
            context += len(running) - done
            used += context / (len(batch) * CONTEXT)
            outcome.steps += 1
            ended = done
            while ended < len(running) and running[ended].output == generated:
                arrival = running[ended]
                tpot = (now - first) / max(1, generated - 1)
                outcome.served.add(priority=arrival.priority, ttft=first - arrival.at, tpot=tpot)
                outcome.output_tokens += generated
                ended += 1
            if ended < len(running):
                now += model.step_seconds(device, len(batch), context)
            context -= sum(arrival.prompt + generated for arrival in running[done:ended])
            done = ended
    outcome.seconds = now
    outcome.kv_waste = 1 - used / max(1, outcome.steps)
    return outcome
