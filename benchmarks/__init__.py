"""Our stages and other libraries side by side on the same work: `python -m benchmarks --help`."""
