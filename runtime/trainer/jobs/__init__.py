"""Training jobs: they are stored first, start in order, and survive the process.

Uses neither HTTP nor tensors: `runtime.trainer.jobs.records` connects the parts that prepare, train and publish.
"""
