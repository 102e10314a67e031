"""What `rkmetrics rpc` does: call an endpoint, and list who serves it; for trying out.

    rkmetrics rpc call backend.generate '{"prompt": "hello"}' --instances 10.0.1.5:9999
    rkmetrics rpc instances backend.generate

The plane and who is asked come from the settings, as for any program; see rkmetrics/rpc.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any

from rkmetrics import rpc
from rkmetrics.errors import RpcError
from rkmetrics.planes.base import EndpointName, Instance
from rkmetrics.planes.instances import PLANE_OF
from rkmetrics.registry import Registry
from rkmetrics.settings import Settings

__all__ = ["call", "list_instances"]

#: How long somebody is waited for who serves it: a source tells within milliseconds who there is.
WAIT_SECONDS = 2.0


async def call(
    settings: Settings,
    endpoint: str,
    request: Any,
    show: Callable[[str], object],
    *,
    instances: Iterable[str] | None = None,
    instance_id: int | None = None,
    timeout_seconds: float | None = None,
) -> None:
    """Call an endpoint once, and show each item of the answer as a line of JSON. Raises RpcError and SettingsError."""
    registry = Registry(settings, builtin=False)
    async with rpc.client(registry) as client, rpc.router(client, endpoint, instances=instances) as router:
        await router.wait_for_instances(WAIT_SECONDS)
        if instance_id is None:
            response = await router.generate(request, timeout_seconds=timeout_seconds)
        else:
            response = await router.direct(request, instance_id, timeout_seconds=timeout_seconds)
        async with response:
            async for item in response:
                show(json.dumps(item, ensure_ascii=False))


async def list_instances(
    settings: Settings, endpoint: str, *, instances: Iterable[str] | None = None
) -> list[dict[str, str]]:
    """Return who serves an endpoint, of all planes; an empty list where nobody does. Raises SettingsError, and RpcError
    where nobody could be asked."""
    registry = Registry(settings, builtin=False)
    name = EndpointName.parse(endpoint, settings.namespace)
    told: asyncio.Future[tuple[Instance, ...]] = asyncio.get_running_loop().create_future()

    def hear(instances: tuple[Instance, ...]) -> None:
        if not told.done():
            told.set_result(instances)

    following = asyncio.create_task(rpc.source(registry, instances).follow(name, hear))
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            found = await told
    except TimeoutError:
        raise RpcError(str(name), f"nobody said in {WAIT_SECONDS:g} s who serves it") from None
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    return [_row(each) for each in sorted(found)]


def _row(instance: Instance) -> dict[str, str]:
    kind, place = instance.transport
    return {
        "endpoint": ".".join(instance[:3]),
        "instance": f"{instance.instance_id:x}",
        "plane": PLANE_OF.get(kind, kind),
        "place": place,
    }
