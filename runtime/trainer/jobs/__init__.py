"""Training jobs: what is asked for is stored first, runs one at a time in order, and survives the process.

Knows neither HTTP nor tensors: what prepares, trains and publishes comes in through `runtime.trainer.jobs.ports`.
"""
