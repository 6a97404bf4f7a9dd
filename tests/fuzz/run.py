"""The long run: `python -m tests.fuzz.run --seconds 600 [--only safetensors] [--corpus DIR]`.

A loop guided by coverage: an input that reaches a line of ckptd nobody reached before, or one often
enough more than before, joins the corpus, and inputs of the corpus are changed at random. Whatever
breaks the promise of a target (`targets.check`), takes too long or too much memory is cut down to
the least that still breaks it in the same way, saved under `DIR/NAME/found/`, and told; the exit
status is 1 then. A find becomes a test beside those of the module that it is in.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ckptd
from tests.fuzz.mutate import json_bytes, mutate, mutate_json
from tests.fuzz.targets import TARGETS, Target, Violation, check

LIMIT_S = 5.0
"""No input of 64 KiB may take longer, traced as it is."""
MEMORY_BYTES = 6 << 30
"""Address space of the whole process: an input that asks for more fails with a MemoryError."""
_OURS = str(Path(ckptd.__file__).parent)


class TooSlow(BaseException):
    """The time of one input is up; not an Exception, so that no reader takes it for its own."""


class Coverage:
    """Lines of ckptd that one run reached, each with how often as a power of two."""

    def __init__(self) -> None:
        self.lines: Counter[tuple[str, int]] = Counter()

    def found(self) -> set[tuple[str, int, int]]:
        """Return (file, line, power) of all of them."""
        return {(file, line, count.bit_length()) for (file, line), count in self.lines.items()}

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if _OURS in frame.f_code.co_filename else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines[frame.f_code.co_filename, frame.f_lineno] += 1
        return self._line

    @contextmanager
    def on(self) -> Iterator[None]:
        """Count while the block runs."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)


class Fuzzer:
    """One target, its corpus, and what was found in it."""

    def __init__(self, name: str, target: Target, corpus_path: Path, seed: int) -> None:
        self.name = name
        self.target = target
        self.path = corpus_path / name
        self.source = random.Random(seed)
        self.corpus: list[bytes] = []
        self.seen: set[tuple[str, int, int]] = set()
        self.failures: dict[str, bytes] = {}
        self.num_runs = 0
        self.slowest_s = 0.0
        (self.path / "found").mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="ckptd-fuzz-"))

    def begin(self) -> None:
        """Run the seeds and what an earlier run kept."""
        kept = [file.read_bytes() for file in sorted(self.path.glob("*.input"))]
        for data in (*self.target.seeds(), *kept):
            self.corpus.append(data)
            self._one(data)

    def step(self) -> None:
        """Change one input and run it."""
        self._one(self._changed())

    def close(self) -> None:
        """Remove the folder of the inputs."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _changed(self) -> bytes:
        recent = self.corpus[-20:] if self.source.random() < 0.5 else self.corpus
        data = self.source.choice(recent)
        if self.target.is_json and self.source.random() < 0.6:
            try:
                return json_bytes(mutate_json(json.loads(data), self.source), self.source)
            except (ValueError, RecursionError):
                pass  # it is no JSON any more: change its bytes
        if self.name == "safetensors" and self.source.random() < 0.6:
            return reheaded(data, self.source)
        return mutate(data, self.source, self.corpus)

    def _one(self, data: bytes) -> None:
        coverage = Coverage()
        begin = time.monotonic()
        failure = self._failure(data, coverage)
        self.slowest_s = max(self.slowest_s, time.monotonic() - begin)
        self.num_runs += 1
        if failure is not None:
            if failure not in self.failures:
                self.failures[failure] = self._least(data, failure)
                self._tell(failure)
            return
        fresh = coverage.found() - self.seen
        if fresh:
            self.seen |= fresh
            self.corpus.append(data)
            name = hashlib.sha256(data).hexdigest()[:16]
            (self.path / f"{name}.input").write_bytes(data)

    def _failure(self, data: bytes, coverage: Coverage) -> str | None:
        """Return in which way `data` breaks the promise, None if it does not."""
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        try:
            with coverage.on():
                check(self.target, data, self.folder)
        except Violation as violation:
            cause = violation.__cause__ or violation
            frames = [f for f in traceback.extract_tb(cause.__traceback__) if _OURS in f.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
            return f"{type(cause).__name__} in {where}"
        except TooSlow as slow:
            frames = [f for f in traceback.extract_tb(slow.__traceback__) if _OURS in f.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
            return f"TooSlow in {where}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return None

    def _least(self, data: bytes, failure: str) -> bytes:
        """Return the shortest input found that fails in the same way; slow ones are kept whole."""
        if failure.startswith("TooSlow"):
            return data
        end = time.monotonic() + 20
        width = max(1, len(data) // 2)
        while width and time.monotonic() < end:
            at = 0
            while at < len(data) and time.monotonic() < end:
                shorter = data[:at] + data[at + width :]
                if self._failure(shorter, Coverage()) == failure:
                    data = shorter
                else:
                    at += width
            width //= 2
        return data

    def _tell(self, failure: str) -> None:
        data = self.failures[failure]
        name = hashlib.sha256(failure.encode()).hexdigest()[:8]
        path = self.path / "found" / name
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(f"{failure}\n{data!r}\n")
        print(f"{self.name}: {failure}: {data[:160]!r} ({len(data)} bytes, {path})", flush=True)


def reheaded(data: bytes, source: random.Random) -> bytes:
    """Return a safetensors file whose header is another JSON and whose length is right."""
    length = int.from_bytes(data[:8], "little")
    try:
        entries = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return mutate(data, source)
    raw = json_bytes(mutate_json(entries, source), source)
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


def _time_is_up(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def main(arguments: list[str] | None = None) -> int:
    """Run all targets in turn, a second each, until the time is over; 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--only", choices=sorted(TARGETS), action="append")
    parser.add_argument("--corpus", type=Path, default=Path(tempfile.gettempdir(), "ckptd-fuzz"))
    parser.add_argument("--seed", type=int, default=None)
    chosen = parser.parse_args(arguments)
    seed = random.randrange(1 << 32) if chosen.seed is None else chosen.seed
    print(f"seed {seed}, corpus {chosen.corpus}", flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, _time_is_up)
    names = chosen.only or list(TARGETS)
    fuzzers = [Fuzzer(name, TARGETS[name], chosen.corpus, seed) for name in names]
    end = time.monotonic() + chosen.seconds
    for fuzzer in fuzzers:
        fuzzer.begin()
    while time.monotonic() < end:
        for fuzzer in fuzzers:
            turn = min(end, time.monotonic() + 1)
            while time.monotonic() < turn:
                fuzzer.step()
    for fuzzer in fuzzers:
        fuzzer.close()
        print(
            f"{fuzzer.name}: {fuzzer.num_runs} runs, {len(fuzzer.corpus)} inputs, "
            f"{len({line[:2] for line in fuzzer.seen})} lines, slowest {fuzzer.slowest_s:.2f} s, "
            f"{len(fuzzer.failures)} found"
        )
    return 1 if any(fuzzer.failures for fuzzer in fuzzers) else 0


if __name__ == "__main__":
    sys.exit(main())
