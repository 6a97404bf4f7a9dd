"""Is the upload hidden behind the work? A push through links of several speeds; run by hand.

    python tests/benchmarks/bench_upload.py --gb 1 [--links 20 100 500] [--folder DIR] [--xet]

A loopback Hub in a process of its own stands behind a link of the given MB/s (a proxy that reads no
faster than that). For each link: the seconds of `ckptd run` without a push (work), the seconds the
bytes alone need on the link, the seconds of the whole push, start-up included, and the ratio of
these to the longer of the two; 1.0 would be perfect overlap and no start-up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import synthetic

CHUNK_BYTES = 256 << 10
CKPTD = str(Path(sys.executable).with_name("ckptd"))
SHARD_BYTES = 100_000_000


class Link:
    """A proxy in a thread that passes at most `rate` bytes a second towards the Hub."""

    def __init__(self, hub_port: int, rate: float) -> None:
        self._hub_port = hub_port
        self._rate = rate
        self._free_at = 0.0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.port = 0
        self.passed_bytes = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Link:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._connect, "127.0.0.1", 0, limit=4 * CHUNK_BYTES)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _connect(self, near: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        far, onward = await asyncio.open_connection("127.0.0.1", self._hub_port)
        await asyncio.gather(self._pass(near, onward, limited=True), self._pass(far, answer))

    async def _pass(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, limited: bool = False
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(CHUNK_BYTES):
                if limited:
                    self.passed_bytes += len(data)
                    now = time.monotonic()
                    self._free_at = max(self._free_at, now) + len(data) / self._rate
                    await asyncio.sleep(self._free_at - now)
                target.write(data)
                await target.drain()
        target.close()


@contextlib.contextmanager
def hub(root: Path, *, xet: bool) -> Iterator[tuple[int, dict[str, str]]]:
    """Run the loopback Hub in its own process; give its port and the environment for clients."""
    command = [CKPTD, "hub", "serve", "--json", "--port", "0"]
    command += ["--root", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            announced = json.JSONDecoder().raw_decode(_first_value(process.stdout))[0]
            environment = os.environ | announced["environment"]
            if not xet:
                environment["HF_HUB_DISABLE_XET"] = "1"
            yield urlsplit(announced["url"]).port or 0, environment
        finally:
            process.terminate()


def _first_value(lines: Iterator[str]) -> str:
    text = ""
    for line in lines:
        text += line
        with contextlib.suppress(json.JSONDecodeError):
            json.loads(text)
            return text
    raise SystemExit("the Hub did not start")


def definition(folder: Path, repo: str, *, push: bool) -> Path:
    """Write a definition that reshards, and pushes where asked; return its path."""
    path = folder / f"{repo}.yaml"
    lines = [f"pipeline: {repo}", "stages:", "  - tie", "  - reshard:"]
    lines += [f"      max_shard_size: {SHARD_BYTES}"]
    if push:
        lines += ["push:", f"  repo_id: ckptd/{repo}"]
    path.write_text("\n".join(lines) + "\n")
    return path


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, dict[str, object]]:
    """Run `ckptd` with --json; return the wall seconds of the process and what it said."""
    began = time.perf_counter()
    done = subprocess.run(
        [CKPTD, *command, "--json"],
        env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr + done.stdout)
    return time.perf_counter() - began, json.loads(done.stdout)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--links", type=float, nargs="*", default=[20, 100, 500], metavar="MB/s")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ckptd-bench-upload"))
    parser.add_argument("--xet", action="store_true", help="over Xet; default LFS")
    asked = parser.parse_args()
    folder: Path = asked.folder
    source = folder / "run" / "checkpoint-1"
    specs = synthetic.llama_specs(int(asked.gb * 1e9))
    synthetic.write(source, specs, sparse=False, shard_bytes=synthetic.SHARD_BYTES)
    print(f"{'link MB/s':>9}{'work s':>9}{'link s':>9}{'push s':>9}{'ratio':>7}{'peak MB':>9}")
    for rate in asked.links:
        with (
            hub(folder / "hub", xet=asked.xet) as (port, environment),
            Link(port, rate * 1e6) as link,
        ):
            environment |= {
                "HF_ENDPOINT": f"http://127.0.0.1:{link.port}",
                "XDG_STATE_HOME": str(folder / "state"),
                "HF_HOME": str(folder / "home"),
            }
            plain = definition(folder, "plain", push=False)
            command = ["run", str(source), "-p", str(plain), "-o", str(folder / "out")]
            work_s, _ = timed(command, environment)
            pushed = definition(folder, f"link-{rate:g}", push=True)
            push_s, said = timed(["run", str(source), "-p", str(pushed)], environment)
            link_s = link.passed_bytes / (rate * 1e6)
        peak = int(str(said["peak_bytes"])) / 1e6
        ratio = push_s / max(work_s, link_s)
        print(f"{rate:>9g}{work_s:>9.2f}{link_s:>9.2f}{push_s:>9.2f}{ratio:>7.2f}{peak:>9.0f}")
        for used in ("out", "hub", "state", "home"):
            shutil.rmtree(folder / used, ignore_errors=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
