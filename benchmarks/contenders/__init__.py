"""What a contender's process runs: one module per library and kind of work.

Each has `open_contender(job)`, which loads everything and returns a `worker.Contender`. Modules of
other libraries import nothing of ours, because they run in environments of their own.
"""
