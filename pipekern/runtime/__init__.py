"""The run of a pipeline: micro-batches, the executor, and what users call."""
