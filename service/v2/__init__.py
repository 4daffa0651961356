"""The Open Inference Protocol, version 2, with its binary tensor data extension.

A plug-in: only `service.app` imports it.
"""
