"""Micro-batches in the order of the stream, made ahead by worker processes.

Micro-batch m of rank r in step b is a run of positions of the stream: the batch of the step is cut into as many equal
slices as there are ranks, each slice into micro-batches. All randomness of a sample is seeded by its position. So a
step has the same pictures, views and masks whatever the number of ranks, micro-batches and workers.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import NamedTuple, cast

import numpy as np
import torch

from training.config import ConfigError, Resolved
from training.data.augment import Views
from training.data.collate import Batch, Viewed, collate
from training.data.index import Index
from training.data.masks import plan_ratios
from training.data.samples import BadSample, DataError, Reader, decode_shortest_px

_VIEWS = 0x56  # purpose of randomness
_PATIENCE_S = 10.0  # with a worker that was told to end


class MicroBatches:
    """All micro-batches of one rank by number: step x num_micros + micro.

    Args:
        resolved: of the stage.
        index: the pictures.
        rank: of this process.
        world: number of processes.

    Raises:
        ConfigError: the batch cannot be cut that way.
    """

    def __init__(self, resolved: Resolved, index: Index, *, rank: int, world: int) -> None:
        self._resolved, self._index = resolved, index
        self._size, self.num_micros = micro_batches(resolved, world)
        self._first = rank * self._size * self.num_micros  # of this rank in a step
        gram = resolved.objective.gram
        gram_px = gram.global_px if gram.weight else None
        self._views = Views(resolved.views, gram_px=gram_px)
        self._shortest_px = decode_shortest_px(resolved.views, gram_px)
        side = resolved.views.global_px // resolved.model.patch_px
        self._grid = (side, side)
        self._reader: Reader | None = None

    def __getitem__(self, number: int) -> Batch:
        """A micro-batch.

        Raises:
            DataError: too many pictures in a row cannot be read, or a disk or a bucket fails.
            ConfigError: the pictures are no longer what they were when the run began.
        """
        resolved = self._resolved
        step, micro = divmod(number, self.num_micros)
        if self._reader is None:  # in the worker
            self._reader = Reader(self._index, resolved.data, seed=resolved.seed, shortest_px=self._shortest_px)
        batch_size = resolved.data.batch_size
        first = self._first + micro * self._size  # in the step
        samples: list[Viewed] = []
        for position in range(step * batch_size + first, step * batch_size + first + self._size):
            decoded = self._reader.read(position)
            seeds = np.random.SeedSequence((resolved.seed % 2**64, _VIEWS, position))
            crops = self._views.draw(decoded.rgb, np.random.Generator(np.random.PCG64(seeds)))
            samples.append(Viewed(crops, position, decoded.key, decoded.bad))
        # Planned for the whole step, so that no slice of it is masked more than another on purpose.
        ratios = plan_ratios(2 * batch_size, seed=resolved.seed, step=step, config=resolved.masks)
        mine = ratios.reshape(2, batch_size)[:, first : first + self._size].flatten()
        return collate(samples, mine, self._grid, seed=resolved.seed, config=resolved.masks)


def micro_batches(resolved: Resolved, world: int) -> tuple[int, int]:
    """Pictures of a micro-batch, and micro-batches of a rank in a step.

    Raises:
        ConfigError: the batch is no multiple of them.
    """
    data = resolved.data
    if data.batch_size % world:
        raise ConfigError(f"data.batch_size {data.batch_size} must be a multiple of the number of processes, {world}")
    share = data.batch_size // world
    size = data.micro_batch_size or share
    if share % size:
        allowed = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise ConfigError(
            f"data.micro_batch_size {size} must divide the {share} pictures of a process in a step "
            f"(data.batch_size {data.batch_size} over {world}); allowed: {allowed}"
        )
    return size, share // size


class Loader:
    """The micro-batches of one rank, from one step on; an iterator, and a context that ends the workers.

    Args:
        resolved: of the stage.
        index: the pictures.
        rank: of this process.
        world: number of processes.
        start_step: the step to begin with: steps done so far.
        device: of the training; for CUDA, batches come in page-locked memory.

    Raises:
        ConfigError: the batch cannot be cut that way.
    """

    def __init__(
        self,
        resolved: Resolved,
        index: Index,
        *,
        rank: int,
        world: int,
        start_step: int,
        device: torch.device | None = None,
    ) -> None:
        made = MicroBatches(resolved, index, rank=rank, world=world)
        self.num_micros = made.num_micros
        numbers = range(start_step * self.num_micros, resolved.num_steps * self.num_micros)
        self._workers = [_start_worker(made) for _ in range(resolved.data.num_workers)]
        self._batches: Iterator[Batch] = map(made.__getitem__, numbers)
        if self._workers:
            self._batches = _in_order(self._workers, numbers, resolved.data.prefetch)
        if device is not None and device.type == "cuda":
            self._batches = _pinned(self._batches)
        self._wait_s = 0.0
        self._bad: list[BadSample] = []

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            DataError: too many pictures in a row cannot be read; a disk, a bucket or a worker fails.
            ConfigError: the pictures are no longer what they were when the run began.
        """
        start = time.monotonic()
        try:
            batch = next(self._batches)
        finally:
            self._wait_s += time.monotonic() - start
        self._bad += batch.bad
        return batch

    def take_wait_s(self) -> float:
        """Seconds that the training waited for batches, since the last call."""
        taken, self._wait_s = self._wait_s, 0.0
        return taken

    def take_bad(self) -> list[BadSample]:
        """Pictures that could not be read, since the last call."""
        taken, self._bad = self._bad, []
        return taken

    def close(self) -> None:
        """End the workers, whatever they are at; no batch comes any more."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_PATIENCE_S)
        self._batches = iter(())

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pinned(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same in page-locked memory, one batch ahead in a thread."""

    def take() -> Batch | None:
        batch = next(batches, None)
        return batch.pin_memory() if batch is not None else None

    with ThreadPoolExecutor(1, "pin batches") as thread:
        ahead = thread.submit(take)
        while (batch := ahead.result()) is not None:
            ahead = thread.submit(take)
            yield batch


# Workers. Each has a pipe of its own and shares nothing with the others: where one is killed, whatever it was at, its
# pipe ends. (torch's own loader and a pool of processes share locks and pipes, and may then wait for ever.)


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


def _start_worker(made: MicroBatches) -> _Worker:
    # Not fork: this process has threads (of torch, of checkpoints, of a bucket's client). The server that workers are
    # forked from loads torch once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(made, theirs), daemon=True)
    process.start()
    theirs.close()  # else the pipe would not end with the worker
    return _Worker(process, ours)


def _work(made: MicroBatches, pipe: Connection) -> None:
    """Make the micro-batches whose numbers come, until the training is gone."""
    import pyarrow as pa

    torch.set_num_threads(1)
    pa.set_cpu_count(1)  # OpenCV is held to one thread elsewhere
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training ends its workers
    with suppress(EOFError, ConnectionError):
        while True:
            number = pipe.recv()
            result: Batch | Exception
            try:
                result = made[number]
            except Exception as error:
                error.add_note(f"in a worker of the loader:\n{traceback.format_exc()}")
                result = error
            pipe.send(result)


def _in_order(workers: Sequence[_Worker], numbers: range, prefetch: int) -> Iterator[Batch]:
    """Micro-batches by number, which workers make in turn, each ``prefetch`` ahead."""
    num_ahead = prefetch * len(workers)
    for place, number in enumerate(numbers[:num_ahead]):
        with suppress(OSError):  # of a worker that is gone already, which its answer will tell
            workers[place % len(workers)].pipe.send(number)
    return _answers(workers, numbers, num_ahead)


def _answers(workers: Sequence[_Worker], numbers: range, num_ahead: int) -> Iterator[Batch]:
    for place in range(len(numbers)):
        worker = workers[place % len(workers)]
        try:
            result = worker.pipe.recv()
            for following in numbers[place + num_ahead : place + num_ahead + 1]:
                worker.pipe.send(following)
        except (EOFError, OSError) as error:
            raise DataError(_what_happened(worker.process, error)) from None
        if isinstance(result, Exception):
            raise result
        yield cast(Batch, result)


def _what_happened(process: BaseProcess, error: Exception) -> str:
    process.join(1)
    if process.exitcode is None:
        return f"a batch cannot be taken from a worker of the loader: {error}"
    return (
        f"a worker of the loader is gone (exit code {process.exitcode}); -9 is often a want of memory: "
        "data.num_workers and data.prefetch say how many batches are made at once"
    )
