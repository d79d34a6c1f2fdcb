#!/bin/sh
""":"  # Measure where the time of an iteration goes. The room to read is nanogpt/commands/bench.py.

# A shell obeys the next three lines, which start Python on this file; Python takes them for a docstring.
python=$(dirname "$0")/.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$0" "$@"
"""

from nanogpt.commands.cli import enter

if __name__ == "__main__":
    enter("bench")
