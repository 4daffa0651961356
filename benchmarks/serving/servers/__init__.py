"""The contenders that are not ours, each as its own documentation would have it written.

Each is told its model, port and threads by `MODEL`, `PORT` and `THREADS` in the environment, and
runs in any Python that has it and what `benchmarks.serving.pipeline` needs.
"""
