"""Training jobs: they are stored first, run one at a time in order, and survive the process.

Uses neither HTTP nor tensors: `runtime.trainer.jobs.records` connects the parts that prepare, train and publish.
"""
