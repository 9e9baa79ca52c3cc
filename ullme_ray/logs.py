"""Structured logs: with ULLME_LOG_FORMAT=json every line of a run on stderr is one JSON object with job and run.

Progress and notes go through here too, so that a collector sees one format. Rendered manifests set it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

VARIABLE = "ULLME_LOG_FORMAT"
LOGGER = logging.getLogger("ullme_ray")
_OWN = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """One object a line: time, level, message, where from, the fields of the run, and those given as `extra`."""

    def __init__(self, **fields: str) -> None:
        super().__init__()
        self.fields = fields

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "logger": record.name,
            **self.fields,
            **{key: value for key, value in record.__dict__.items() if key not in _OWN},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def is_json() -> bool:
    return os.environ.get(VARIABLE) == "json"


def set_up(**fields: str) -> None:
    """Gives the package's logger its format, and every line the fields, such as job and run; plain lines stay as they are."""
    if not is_json():
        return
    LOGGER.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(**fields))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
