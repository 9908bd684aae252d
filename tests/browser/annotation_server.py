"""A server of the annotation pages in a process of its own, to be killed and started again."""

from __future__ import annotations

import json
import sys

import uvicorn

from rlhf.config import Config, Paths, Service
from rlhf.service.annotation.journal import restore
from rlhf.service.app import create_app
from rlhf.service.state import open_state


def main() -> None:
    """Serve with the settings of the first argument until the process is ended."""
    given = json.loads(sys.argv[1])
    service = Service(folder=given["folder"], port=given["port"])
    config = Config(recipe="none", paths=Paths(given["runs"], given["store"]), service=service)
    state = open_state(config)
    restore(state)
    uvicorn.run(create_app(state), host=service.host, port=service.port, log_level="warning")


if __name__ == "__main__":
    main()
