"""The processes of a launched job: torchrun's agent, which dies with the server, and the ranks, which die with it."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import psutil
from msgspec.structs import replace

from runtime.support.durable import error_code, without_paths
from runtime.support.threads import die_with, outlive_parent
from runtime.trainer.launched.agent_process import AgentRecord
from runtime.trainer.launched.files import (
    FAILED,
    FAILED_CODE,
    KILLED,
    KILLED_CODE,
    RESTARTS,
    JobFolder,
    LaunchEnd,
)
from runtime.trainer.launched.stall import PlaceFile

PARENT = "EFT_LAUNCH_AGENT"
"""Environment variable with the process id of the agent."""
MEETING_SECONDS = 720.0
"""Time in which the nodes must have met and ranks begun. torchrun itself waits for ten minutes for nodes that are
missing, but without end for an answer of another program that listens where they should meet."""


def run_agent(parent: int, arguments: list[str], folder: JobFolder, *, lasting: bool = False) -> int:
    """Be torchrun until the ranks have ended; `parent` is the server's process, 0 on nodes without one. `arguments` are
    torchrun's. `lasting`: go on where the server is killed, once the next one can find this process. Returns the exit
    code."""
    if parent:
        die_with(parent, ignoring=(signal.SIGINT,))
    if lasting:
        started = psutil.Process().create_time()
        AgentRecord(pid=os.getpid(), started=started, attempt=folder.read_spec().attempt).write(folder.path)
        outlive_parent()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ[PARENT] = str(os.getpid())
    deadline = threading.Timer(MEETING_SECONDS, _end_without_ranks, (folder,))
    deadline.daemon = True
    deadline.start()
    try:
        main(arguments)
    except ChildFailedError as error:
        failures = [failure.exitcode for failure in error.failures.values()]
        # torchrun ends the other ranks by SIGTERM.
        crashed = any(code < 0 and code != -signal.SIGTERM for code in failures)
        unwritten = FAILED if FAILED_CODE in failures else None
        end = None if crashed else folder.first_error() or unwritten
    except Exception as error:  # of torchrun itself, as where another program has the port to meet at
        traceback.print_exc()
        end = _end_of(error)
        end = replace(end, message=end.message.replace("A rank of this job failed", "torchrun failed", 1))
    else:
        return 0
    finally:
        deadline.cancel()
    with contextlib.suppress(OSError):  # a disk may be full; the exit code says the most of it
        folder.write_end(end or KILLED)
    return KILLED_CODE if end is None else FAILED_CODE


def _end_without_ranks(folder: JobFolder) -> None:
    """End this process where no rank has begun. On a thread of its own: the other one hears of nothing."""
    if psutil.Process().children():
        return
    message = f"The nodes of this job have not met within {MEETING_SECONDS:.0f} seconds: see trainer.rendezvous."
    with contextlib.suppress(OSError):
        folder.write_end(LaunchEnd(crashed=False, message=message, code="nodes_not_met"))
    os._exit(FAILED_CODE)


def run_rank(folder: JobFolder) -> int:
    """Be one rank, from the environment that torchrun makes."""
    die_with(int(os.environ.get(PARENT, os.getppid())), ignoring=(signal.SIGINT,))
    rank = int(os.environ["RANK"])
    try:
        folder.reserve_error(rank)
        _train(folder, PlaceFile(folder.path, rank))
    except Exception as error:
        with contextlib.suppress(OSError):
            folder.write_error(rank, _end_of(error))
        with contextlib.suppress(OSError):
            traceback.print_exc()
        return FAILED_CODE
    return 0


def _train(folder: JobFolder, place: PlaceFile) -> None:
    import torch

    from runtime.trainer.launched.rank import DDP_TIMEOUT, LaunchedRank, RankReporter
    from runtime.trainer.launched.ranks import Ranks

    spec = folder.read_spec()
    attempt = spec.attempt * RESTARTS + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.recipe.seed)
    place.move("waits for all ranks to start")
    ranks = Ranks(spec.device, spec.recipe.ddp_timeout or DDP_TIMEOUT)
    if ranks.first:
        with folder.reports(attempt).open("ab", buffering=0) as file:
            LaunchedRank(folder, spec, ranks, attempt, RankReporter(file), place).run()
    else:
        LaunchedRank(folder, spec, ranks, attempt, RankReporter(None), place).run()
    # Not where an error ends this rank: the others would note that they lost it before it has noted why.
    ranks.close()


def _end_of(error: Exception) -> LaunchEnd:
    from runtime.trainer.run import is_out_of_memory

    if is_out_of_memory(error):
        message = "There is not enough memory for this job: lower micro_batch_size or sequence_len."
        return LaunchEnd(crashed=False, message=message, code="out_of_memory")
    if isinstance(error, OSError):
        # Libraries raise it without a number and with a text of their own.
        text = error.strerror or without_paths(str(error)[:500]) or type(error).__name__
        return LaunchEnd(crashed=False, message=f"The job cannot go on: {text}.", code=error_code(error))
    text = without_paths(str(error)[:500])
    return LaunchEnd(crashed=False, message=f"A rank of this job failed: {type(error).__name__}: {text}")


def main(arguments: list[str]) -> int:
    """`agent PARENT FOLDER TORCHRUN'S…`, the same of `lasting-agent`, or `rank FOLDER`."""
    match arguments:
        case ["rank", folder]:
            return run_rank(JobFolder(Path(folder)))
        case ["agent", parent, folder, *torchrun]:
            return run_agent(int(parent), torchrun, JobFolder(Path(folder)))
        case ["lasting-agent", parent, folder, *torchrun]:
            return run_agent(int(parent), torchrun, JobFolder(Path(folder)), lasting=True)
    sys.stderr.write("This is the program of launched jobs: see docs/launched-jobs.md.\n")
    return 2
