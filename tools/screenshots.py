"""Pictures of every shipped dashboard for docs/images/, as `rkmetrics preview` shows them against the demo.

    python -m tools.screenshots                     the demo for some minutes, then pictures into docs/images/
    python -m tools.screenshots --minutes 5         for a shorter time
    python -m tools.screenshots --prometheus URL    of what a Prometheus has already (--range, --into, --scheme)

Needs prometheus and chromium. A picture has 128 colours, which no eye tells from all of them on a dashboard, and so
less than 250 kB. Who changes a dashboard or the preview makes them anew and looks at each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from rkmetrics.runtime import Plan, balancing, previewing
from rkmetrics.settings import Settings
from tests.services.chromium import Chromium
from tests.services.nats_server import free_port

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
WIDTH = 1400
COLOURS = 128
SCRAPE_SECONDS = 5
SETTLED = 'location.href !== "about:blank" && document.body.dataset.round && !document.querySelector("[aria-busy]")'


@contextmanager
def demo(folder: Path) -> Generator[str]:
    """Two demo nodes, announced to a balancer, and a Prometheus that scrapes them; its address."""
    own = Settings(port=0, metrics_enabled=True)
    url = f"http://127.0.0.1:{free_port()}"
    with balancing(Plan(own, open=True)) as balancer:
        command = [sys.executable, "-m", "rkmetrics", "serve", "--demo", "--open"]
        ports = [free_port(), free_port()]
        nodes = [
            subprocess.Popen([*command, "--port", str(port), "--discovery-lb", balancer.url], stdout=subprocess.DEVNULL)
            for port in ports
        ]
        targets = {"demo": [f"127.0.0.1:{port}" for port in ports], "balancer": [balancer.url.partition("//")[2]]}
        prometheus = _prometheus(folder, url, targets)
        try:
            yield url
        finally:
            for process in (prometheus, *nodes):
                process.terminate()
                process.wait()


def _prometheus(folder: Path, url: str, targets: dict[str, list[str]]) -> subprocess.Popen[bytes]:
    jobs = [{"job_name": job, "static_configs": [{"targets": each}]} for job, each in targets.items()]
    config = {"global": {"scrape_interval": f"{SCRAPE_SECONDS}s"}, "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(json.dumps(config))
    flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    listen = f"--web.listen-address={url.partition('//')[2]}"
    quiet = subprocess.DEVNULL
    return subprocess.Popen(["prometheus", *flags, listen], stdout=quiet, stderr=quiet)


def pictures(prometheus: str, into: Path, since: str, scheme: str, folder: Path) -> None:
    """Write one picture of each dashboard."""
    browser = Chromium(shutil.which("chromium") or "chromium", folder / "profile")
    settings = Settings(prometheus_url=prometheus)
    with previewing(settings, scrape_interval_seconds=SCRAPE_SECONDS) as server:
        page = browser.open(width=WIDTH, scheme=scheme)
        page.go(f"{server.url}/")
        page.wait("document.querySelector('.overview a')")
        keys = page.js(
            "[...document.querySelectorAll('.overview a')].map((each) => new URL(each).searchParams.get('d'))"
        )
        for key in keys:
            page.go(f"{server.url}/?d={key}&from={since}&to=now&refresh=")
            page.wait(f"location.search.includes({key!r}) && {SETTLED}")
            path = into / f"dashboard-{key.removeprefix('rkmetrics-')}.png"
            path.write_bytes(fewer_colours(browser, page.picture()))
            print(f"{path} {path.stat().st_size // 1024} kB, {page.js(TOLD)}")
            for trouble in page.troubles():
                print(f"  {trouble}", file=sys.stderr)
    browser.close()


TOLD = """Object.entries(Object.groupBy(document.querySelectorAll("article.panel"), (each) => each.dataset.state))
    .map(([state, list]) => `${list.length} ${state}`).join(", ")"""


# --- PNG (W3C, "Portable Network Graphics", third edition) with a palette ---------------------------------------------

# The browser reads the picture: the colours that many pixels have, no two of them nearly the same, become the palette;
# rows begin with their filter, which is none.
TO_PALETTE = """async (text, most) => {
    const bitmap = await createImageBitmap(new Blob([Uint8Array.from(atob(text), (each) => each.charCodeAt(0))]));
    const { width, height } = bitmap;
    const context = new OffscreenCanvas(width, height).getContext("2d");
    context.drawImage(bitmap, 0, 0);
    const pixels = new Uint32Array(context.getImageData(0, 0, width, height).data.buffer);
    const counts = new Map();
    for (const each of pixels) counts.set(each, (counts.get(each) ?? 0) + 1);
    const common = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a));
    const rgb = (each) => [each & 255, (each >> 8) & 255, (each >> 16) & 255];
    const apart = (a, b) => rgb(a).reduce((sum, each, at) => sum + (each - rgb(b)[at]) ** 2, 0);
    const palette = [];
    for (const least of [100, 30, 0])
        for (const each of common.slice(0, 4000))
            if (palette.length < most && palette.every((other) => apart(each, other) > least)) palette.push(each);
    const nearer = (each) => (best, other, at) => (apart(each, other) < apart(each, palette[best]) ? at : best);
    const places = new Map(common.map((each) => [each, palette.reduce(nearer(each), 0)]));
    const rows = new Uint8Array((width + 1) * height);
    pixels.forEach((each, at) => (rows[at + Math.floor(at / width) + 1] = places.get(each)));
    const packed = new Response(new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate")));
    const base64 = (bytes) => btoa(bytes.reduce((text, each) => text + String.fromCharCode(each), ""));
    return [width, height, base64(palette.flatMap(rgb)), base64(new Uint8Array(await packed.arrayBuffer()))];
}"""


def fewer_colours(browser: Chromium, png: bytes) -> bytes:
    """Return the picture with COLOURS colours, each pixel the nearest of them."""
    page = browser.open()
    width, height, palette, packed = page.js(f"({TO_PALETTE})('{b64encode(png).decode()}', {COLOURS})")
    page.close()
    rows = zlib.compress(zlib.decompress(b64decode(packed)), 9)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", b64decode(palette)),
        (b"IDAT", rows),
        (b"IEND", b""),
    ]
    return png[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", metavar="URL")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--range", default="now-15m", dest="since")
    parser.add_argument("--into", type=Path, default=IMAGES)
    parser.add_argument("--scheme", choices=("dark", "light"), default="dark")
    told = parser.parse_args()
    told.into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if told.prometheus:
            pictures(told.prometheus, told.into, told.since, told.scheme, folder)
            return
        with demo(folder) as url:
            time.sleep(told.minutes * 60)
            pictures(url, told.into, told.since, told.scheme, folder)


if __name__ == "__main__":
    main()
