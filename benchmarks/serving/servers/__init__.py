"""Contenders that are not ours, each written as its documentation recommends.

Model, port and threads are the environment variables `MODEL`, `PORT` and `THREADS`. Each runs in
any Python that has it and the requirements of `benchmarks.serving.pipeline`.
"""
