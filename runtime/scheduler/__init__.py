"""Choice of the requests in the next step, and of their number of tokens. Imports no torch: it tests in
milliseconds."""

from runtime.scheduler.drafts import Speculation
from runtime.scheduler.planner import INTERNAL_ERROR
from runtime.scheduler.request import Request, RequestState
from runtime.scheduler.scheduler import Committed, Scheduler

__all__ = ["INTERNAL_ERROR", "Committed", "Request", "RequestState", "Scheduler", "Speculation"]
