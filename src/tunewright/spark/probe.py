"""`python -m tunewright.spark.probe SETTINGS`: does this cluster run us? One line of JSON on standard output.

It starts a session as a stage would, compares versions on every executor, and counts slots.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tunewright.errors import TunewrightError
from tunewright.spark import session
from tunewright.spark.settings import settings


def main() -> None:
    print(json.dumps(probe(json.loads(sys.argv[1]))))


def probe(table: dict[str, Any]) -> dict[str, Any]:
    """What is wrong (`problems`), how many `slots` there are, and what each executor has."""
    asked = settings(table)
    try:
        with session.session(asked, "tunewright check", None) as spark:
            session.wait_for_slots(spark, asked.processes, asked.wait_s)
            return {"problems": [], "slots": session.num_slots(spark), "executors": session.compare(spark)}
    except TunewrightError as error:
        return {"problems": [str(error)]}


if __name__ == "__main__":
    main()
