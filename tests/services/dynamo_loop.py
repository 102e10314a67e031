"""How a test talks to a script that another interpreter runs beside this file: JSON lines, in turn.

{"do": name, ...} comes in on stdin and is a call of the script's object, {"ok": value} or {"error": text} goes out.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

# The runtime's log goes to stderr, and whatever else prints too: stdout is for answers.
ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


async def answer(peer: object) -> None:
    """Answer until nobody asks any more, and end the process."""
    reader = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        asked: dict[str, Any] = json.loads(line)
        do: Callable[..., Awaitable[Any]] = getattr(peer, asked.pop("do"))
        try:
            found: dict[str, Any] = {"ok": await do(**asked)}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        ANSWERS.write(json.dumps(found) + "\n")
    os._exit(0)  # the runtime's own threads need not end in order
