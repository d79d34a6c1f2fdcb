"""The fixtures are in support.py, beside the functions that tests share."""

pytest_plugins = ["support"]
