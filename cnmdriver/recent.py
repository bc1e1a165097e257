"""The daemon's last log lines, kept in memory for a report."""

import json
from collections import deque
from collections.abc import MutableMapping
from typing import Any

KEPT = 1000
LONGEST = 2000
"""Characters of a line."""

lines: deque[str] = deque(maxlen=KEPT)
"""The last lines, oldest first, each a JSON object; a long one is cut."""


def remember(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Keep an event, as a step of structlog's."""
    known = {key: value for key, value in event.items() if key != "exc_info"}
    lines.append(json.dumps(known, default=str)[:LONGEST])
    return event
