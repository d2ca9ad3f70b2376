"""Jobs in processes of their own: torchrun, on devices that are set aside (docs/launched-jobs.md)."""
