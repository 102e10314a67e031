"""NVIDIA Dynamo's own runtime beside ours: interpreters that have it, and processes of it that tests drive.

RKMETRICS_DYNAMO_PYTHON names interpreters that have `ai-dynamo-runtime`, several as in PATH, each of another release.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

__all__ = [
    "PATIENCE_SECONDS",
    "RELEASES",
    "VARIABLE",
    "Interpreter",
    "Peer",
    "interpreter",
    "interpreters",
    "missing",
    "settles",
    "tiny_model",
]

VARIABLE = "RKMETRICS_DYNAMO_PYTHON"
#: A release to the version of it that tests are made for.
RELEASES = {"0.6": "0.6.0", "0.7": "0.7.1", "0.8": "0.8.1.post3", "0.9": "0.9.1"}
# For bugs only: a peer is up within a second or two.
PATIENCE_SECONDS = 60


class Interpreter(NamedTuple):
    """An interpreter, and the version of the runtime that it has."""

    python: str
    version: str


@cache
def interpreters() -> Mapping[str, Interpreter]:
    """Release, as "0.7", to the interpreter that has it. One that was named and has none fails the test."""
    found: dict[str, Interpreter] = {}
    for python in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        ask = "from importlib.metadata import version; print(version('ai-dynamo-runtime'))"
        answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, timeout=60, check=True)
        version = answer.stdout.strip()
        found[".".join(version.split(".")[:2])] = Interpreter(python, version)
    return found


def interpreter(release: str) -> str:
    """The interpreter of a release; without one the test is skipped."""
    if release not in interpreters():
        pytest.skip(missing(release))
    return interpreters()[release].python


def missing(release: str) -> str:
    """What to type for a release."""
    install = f"python3 -m venv dynamo && dynamo/bin/pip install ai-dynamo-runtime=={RELEASES[release]}"
    return f"no interpreter with Dynamo {release}: {install} && export {VARIABLE}=$PWD/dynamo/bin/python"


class Peer:
    """A process of Dynamo; its commands are the methods of the script's `Peer`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process, self._log = process, log
        self._asking = asyncio.Lock()

    @classmethod
    async def start(cls, release: str, script: Path, log: Path, environment: Mapping[str, str]) -> Peer:
        """Start one in a clean environment. log: where its runtime writes."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "PYTHON"))}
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                interpreter(release),
                str(script),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env=clean | dict(environment),
                limit=1 << 26,
            )
        return cls(process, log)

    async def ask(self, do: str, **arguments: Any) -> Any:
        """Run a command, one at a time; its answer."""
        reading, writing = self._process.stdout, self._process.stdin
        assert reading is not None
        assert writing is not None
        async with self._asking, asyncio.timeout(PATIENCE_SECONDS):
            writing.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            line = await reading.readline()
        assert line, self.log()
        answer = json.loads(line)
        assert "error" not in answer, f"{do}: {answer['error']}\n{self.log()}"
        return answer["ok"]

    def log(self) -> str:
        """The end of what its runtime wrote."""
        return self._log.read_text()[-4000:]

    async def kill(self) -> None:
        """End it as a crash would."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def end(self) -> None:
        """End it in order."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await self._process.wait()
        except TimeoutError:
            await self.kill()


async def settles(ask: Callable[[], Coroutine[Any, Any, Any]], expected: object) -> None:
    """Ask until the answer is as expected."""
    found: object = None
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (found := await ask()) != expected:  # noqa: ASYNC110 - what another process keeps
                await asyncio.sleep(0.05)
    except TimeoutError:
        assert found == expected


def tiny_model(folder: Path) -> Path:
    """A model that has a card and no weights."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 128, "vocab_size": 5}
    layers = {"num_attention_heads": 1, "num_hidden_layers": 1, "num_key_value_heads": 1}
    words = {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, "unk_token": "<unk>"}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        **nothing,
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}
    (folder / "config.json").write_text(json.dumps(config | sizes | layers))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": words}))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder
