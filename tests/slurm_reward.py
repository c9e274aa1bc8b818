"""A reward that takes as long as the environment says, so that a job lasts without a busy processor."""

import os
import time
from typing import Any


def slow(completion: str, problem: Any) -> float:
    time.sleep(float(os.environ.get("REWARD_SECONDS", "0")))
    return float(sum(map(ord, completion)) % 3)
