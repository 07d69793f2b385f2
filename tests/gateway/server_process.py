"""A gateway as a process of its own, over the stand-in host: python -m tests.gateway.server_process DATA_DIR DELAY"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from dormouse.gateway.app import create_app
from dormouse.gateway.server import listen, serve_app
from tests.node.standin import StandInHost, configure, run_node


async def main(data_dir: Path, delay: float) -> None:
    config = configure(data_dir, grace=20)
    async with run_node(config, StandInHost(delay=delay)) as node:
        with listen("127.0.0.1", 0) as listener:
            await serve_app(
                create_app(node, config, {}),
                listener,
                grace=config.grace,
                announce=lambda url: print(f"listening on {url}", flush=True),
            )


asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2])))
