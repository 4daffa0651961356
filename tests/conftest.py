import contextlib
import sys

# absl, which TensorBoard brings, keeps the stderr of the moment it is first imported, and closes it
# when logging is configured anew: inside a test that would be pytest's own.
with contextlib.suppress(ImportError):
    from absl import logging as absl_logging

    absl_logging.get_absl_handler().python_handler.setStream(sys.__stderr__)
