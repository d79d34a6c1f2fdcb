"""metrics.jsonl: one JSON object per line, one line per report of a run."""

import json
import os
from pathlib import Path

from nanogpt import files


def drop_after(path: Path | str, step: int, evaluated: int) -> None:
    """Remove the records after `step`, from which a run resumes, from metrics.jsonl.

    evaluated: the last step whose evaluation is not repeated.
    """
    if not os.path.lexists(path):
        return
    kept = [
        r for r in read_metrics(path) if r["step"] <= (evaluated if "val_loss" in r else step) and "exact_loss" not in r
    ]
    files.write(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def read_metrics(path: Path | str) -> list[dict]:
    """The records of a metrics.jsonl, without a last line that a crash has cut short."""
    records = []
    for line in files.read(path).decode(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
