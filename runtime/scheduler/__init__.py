"""Who runs in the next step, and how many tokens of it. Imports no torch: it tests in milliseconds."""

from runtime.scheduler.drafts import Speculation
from runtime.scheduler.request import Request, State
from runtime.scheduler.scheduler import Committed, Scheduler

__all__ = ["Committed", "Request", "Scheduler", "Speculation", "State"]
