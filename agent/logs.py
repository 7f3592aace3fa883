"""How the agent logs: lines or JSON objects, each with the instruction and domain it is about, secrets taken out.

A line is one line whatever is in the message: a sender cannot forge a second one.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from agent.context import ContextFilter
from agent.redact import redact_text

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s [%(instruction)s %(domain)s %(request)s]%(traced)s %(message)s"
FORMATS = ("text", "json")

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F, 0x85, 0x2028, 0x2029)} | {10: "\\n", 13: "\\r"}
_CONTROL[9] = "\t"


class TextFormatter(logging.Formatter):
    """`TEXT_FORMAT`; a traceback keeps its lines."""

    def __init__(self) -> None:
        super().__init__(TEXT_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        if not record.message.isprintable():
            record.message = record.message.translate(_CONTROL)
        trace = getattr(record, "traceparent", "")
        record.traced = f" {trace}" if trace else ""
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line.

    ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``; ``instruction``, ``domain``, ``request`` and
    ``traceparent`` where there is one; ``exception`` with a traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        data: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact_text(record.getMessage()),
        }
        for name in ("instruction", "domain", "request", "traceparent"):
            value = getattr(record, name, "")
            if value and value != "-":
                data[name] = value
        if record.exc_info:
            data["exception"] = redact_text(self.formatException(record.exc_info))
        return json.dumps(data)


def setup(level: str, file: str, form: str = "text") -> None:
    """Log to `file`, or to standard error. :raises OSError: the file cannot be opened."""
    handler: logging.Handler = logging.FileHandler(file) if file else logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(form))
    handler.addFilter(ContextFilter())
    # What the format does not show is not looked up either: it is most of what a line costs (logging's HOWTO).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Connection chatter that our own lines already tell.
    for name in ("amqp", "kombu", "stevedore"):
        logging.getLogger(name).setLevel(logging.WARNING)


def reconfigure(level: str, form: str) -> None:
    """Another level or form; a log file is opened again, under the name it has (it may have been rotated)."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    for handler in root.handlers:
        if not any(isinstance(item, ContextFilter) for item in handler.filters):
            continue  # not one that `setup` made
        handler.setFormatter(_formatter(form))
        if isinstance(handler, logging.FileHandler):
            handler.close()  # opened again by the next line


def _formatter(form: str) -> logging.Formatter:
    return JsonFormatter() if form == "json" else TextFormatter()
