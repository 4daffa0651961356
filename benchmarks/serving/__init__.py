"""What does serving cost? The same detector behind several servers, on one machine.

    python -m benchmarks.serving --model detector.onnx --images FOLDER
    python -m benchmarks.serving --table

`pipeline` is what every contender does with an image, and the yardstick when nothing serves it;
`servers` holds the contenders that are not ours; `load` asks them; `processes` starts, pins and
weighs them; `__main__` lets them take turns and writes the rows.
"""
