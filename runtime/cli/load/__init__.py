"""The parts of the load generator (`runtime.cli.loadgen`): what to send, sending it, what came of it."""
