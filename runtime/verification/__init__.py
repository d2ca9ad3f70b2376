"""Is a checkpoint whole, and does it compute here what it computes in transformers? For `eft models verify`."""

from runtime.verification.report import Check, Report
from runtime.verification.verify import verify

__all__ = ["Check", "Report", "verify"]
