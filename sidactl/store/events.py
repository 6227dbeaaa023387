"""How far a live directory has come, by its events."""

import json
import math


def nimg_of(line: bytes) -> float:
    """The images seen at an event; infinity for what is no event, such as the half line that a killed process left."""
    try:
        return int(json.loads(line)["nimg"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf
