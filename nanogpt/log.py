"""Logging of a process: one line an event on stderr, with the process's part in the cluster."""

import logging
import sys


class _OneLine(logging.Formatter):
    """Keeps an entry on one line, whatever text a client put into it. Tracebacks keep theirs."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        record.message, record.asctime = safe, self.formatTime(record, self.datefmt)
        text = self.formatMessage(record)
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def set_up(level: str, part: str) -> None:
    """Log from `level` ("info") up; `part` names this process ("rank 1", "front end")."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _OneLine(f"%(asctime)s %(levelname)-7s {part} %(name)s: %(message)s", datefmt="%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
