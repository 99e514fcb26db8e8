"""Micro-batches in the order of the stream, made ahead by worker processes.

Micro-batch m of rank r in step b is a run of positions of the stream: the batch of the step is cut into as many equal
slices as there are ranks, each slice into micro-batches. All randomness of a sample is seeded by its position. So a
step has the same pictures, views and masks whatever the number of ranks, micro-batches and workers.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

import numpy as np
import torch

from training.config import ConfigError, Resolved
from training.data.augment import Views
from training.data.collate import Batch, Viewed, collate
from training.data.index import Index
from training.data.masks import plan_ratios
from training.data.samples import BadSample, DataError, Reader, decode_shortest_px

_VIEWS = 0x56  # purpose of randomness


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
        self._made = MicroBatches(resolved, index, rank=rank, world=world)
        self.num_micros = self._made.num_micros
        self._numbers = iter(range(start_step * self.num_micros, resolved.num_steps * self.num_micros))
        self._ahead: deque[Future[Batch]] = deque()  # asked for and not handed out, in order
        self._num_ahead = resolved.data.num_workers * resolved.data.prefetch
        self._workers = _start_workers(resolved.data.num_workers, self._made) if resolved.data.num_workers else None
        is_pinned = device is not None and device.type == "cuda"
        self._pinner = ThreadPoolExecutor(1, "pin batches") if is_pinned else None
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
            batch = self._next()
        except BrokenProcessPool:
            raise DataError(
                "a worker of the loader is gone: it was killed, perhaps for want of memory; "
                "data.num_workers and data.prefetch say how many batches are made at once"
            ) from None
        finally:
            self._wait_s += time.monotonic() - start
        self._bad += batch.bad
        return batch

    def _next(self) -> Batch:
        if self._workers is None:
            batch = self._made[next(self._numbers)]
            return batch.pin_memory() if self._pinner is not None else batch
        for number in itertools.islice(self._numbers, self._num_ahead - len(self._ahead)):
            future = self._workers.submit(_make, number)
            self._ahead.append(self._pinner.submit(_pinned, future) if self._pinner is not None else future)
        if not self._ahead:
            raise StopIteration
        return self._ahead.popleft().result()

    def take_wait_s(self) -> float:
        """Seconds that the training waited for batches, since the last call."""
        taken, self._wait_s = self._wait_s, 0.0
        return taken

    def take_bad(self) -> list[BadSample]:
        """Pictures that could not be read, since the last call."""
        taken, self._bad = self._bad, []
        return taken

    def close(self) -> None:
        """End the workers, each after the batch that it is making; no batch comes any more."""
        self._numbers = iter(range(0))
        self._ahead.clear()
        if self._workers is not None:
            self._workers.shutdown(cancel_futures=True)
        if self._pinner is not None:
            self._pinner.shutdown(cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pinned(future: Future[Batch]) -> Batch:
    return future.result().pin_memory()


# Workers. torch's own loader shares locks with them, and waits for ever where one is killed while it holds one.

_MADE: list[MicroBatches] = []  # of a worker, one


def _start_workers(num_workers: int, made: MicroBatches) -> ProcessPoolExecutor:
    # Not fork: this process has threads (of torch, of checkpoints, of a bucket's client). The server that workers are
    # forked from loads torch once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker, initargs=(made,))


def _start_worker(made: MicroBatches) -> None:
    import pyarrow as pa

    torch.set_num_threads(1)
    pa.set_cpu_count(1)  # OpenCV is held to one thread elsewhere
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _MADE.append(made)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a killed training leaves no worker behind


def _make(number: int) -> Batch:
    return _MADE[0][number]
