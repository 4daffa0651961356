"""Cost of serving: the same detector behind several servers on one machine.

    python -m benchmarks.serving --model detector.onnx --images FOLDER
    python -m benchmarks.serving --table

`pipeline` processes an image as every contender does, without a server; `servers` has the
contenders that are not ours; `load` has the clients; `processes` starts, pins and weighs servers;
`__main__` runs them in turns and writes the rows.
"""
