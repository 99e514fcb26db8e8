"""The only file that knows of processes and meshes.

One path for all modes: FSDP2 over a mesh. ``ddp`` is a mesh whose shard dimension is 1, ``fsdp`` one whose replicate
dimension is 1, ``hsdp`` anything between. A single process without a mode is not wrapped at all. Backbone and heads are
roots of their own, since the step calls each of them several times.

Order: activation checkpointing -> compile -> shard. Every rank builds the same weights from the same seed before that,
so that the number of ranks changes none.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from training.config import ConfigError, ParallelConfig
from training.models.network import Network

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    mesh: Any = None  # DeviceMesh (replicate, shard); None without sharding
    writers: Any = None  # group of all ranks for checkpoints, which are written while training talks over the other one

    @property
    def group(self) -> Any:
        """Group of all ranks for collectives; None where there is one rank only."""
        return dist.group.WORLD if self.size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def from_main(self, value: Any) -> Any:
        """What rank 0 holds, on every rank; JSON-like values."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of float [n] over ranks."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        if self.size == 1:
            return flag
        box = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return bool(box.item())


def start(config: ParallelConfig) -> World:
    """Join the processes that torchrun started, or be the only one.

    Raises:
        ConfigError: the device is not there, or the ranks do not fit the mode.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("parallel.device: got 'cuda', and torch sees no GPU here; allowed: cpu, auto")
    kind = "cuda" if has_cuda and config.device != "cpu" else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    mode = "ddp" if config.mode == "none" and size > 1 else config.mode
    if mode == "none":
        return World(rank=0, size=1, device=device)
    _init_group(size, kind)
    mesh = _mesh(mode, size, config.shard_size, kind)
    return World(rank=rank, size=size, device=device, mesh=mesh, writers=dist.new_group(backend="gloo"))


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _init_group(size: int, kind: str) -> None:
    if dist.is_initialized():
        return
    # gloo beside nccl: checkpoints are staged to the CPU and agreed upon there
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    store: Store
    if size == 1:
        store, rank = HashStore(), 0
    else:
        # torchrun's store outlives a restart of the ranks, and with it the addresses of the dead ones.
        shared, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        store = PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)


def _mesh(mode: str, size: int, shard_size: int | None, kind: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    shard = {"ddp": 1, "fsdp": size, "hsdp": shard_size or min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))}[
        mode
    ]
    if size % shard:
        raise ConfigError(f"parallel.shard_size: got {shard}, which does not divide the {size} ranks")
    return init_device_mesh(kind, (size // shard, shard), mesh_dim_names=("replicate", "shard"))


def distribute(network: Network, world: World, config: ParallelConfig, *, is_trained: bool = True) -> Network:
    """Lay a network over the devices, in place.

    Args:
        network: on the CPU, the same weights on every rank.
        world: from ``start``.
        config: what to do.
        is_trained: False for a teacher, which needs no activation checkpointing.
    """
    if config.activation_checkpointing and is_trained:
        from torch.distributed._composable.checkpoint_activation import checkpoint

        for block in network.backbone.blocks:
            checkpoint(block)
    if config.compile:
        for block in network.backbone.blocks:
            block.compile()
    if world.mesh is None:
        return network.to(world.device)
    _shard(network, world, config, is_trained=is_trained)
    return network


def _shard(network: Network, world: World, config: ParallelConfig, *, is_trained: bool) -> None:
    # Tokens are views of one tensor; nothing changes them in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    is_half = config.precision == "bf16" and world.device.type == "cuda"
    # Blocks compute in half precision under autocast; the stream between them stays fp32, as without sharding.
    body = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if is_half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    full = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32)
    network.to(world.device)
    # A root keeps its parameters whole from forward to backward; without a backward that would be for ever.
    root = None if is_trained else True
    for block in network.backbone.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=body)
    fully_shard(network.backbone, mesh=world.mesh, mp_policy=full, reshard_after_forward=root)
    register_fsdp_forward_method(network.backbone, "intermediate")
    for head in network.heads().values():
        fully_shard(head, mesh=world.mesh, mp_policy=full, reshard_after_forward=root)
        for method in ("dino_loss", "ibot_loss"):  # what is called from outside; forward calls project itself
            register_fsdp_forward_method(head, method)
    if network.feature_map is not None:
        fully_shard(network.feature_map, mesh=world.mesh, mp_policy=full, reshard_after_forward=root)


def slow_precision(precision: str, device: torch.device) -> str | None:
    """A warning where a CPU has no instructions for bf16: torch then multiplies it one number at a time.

    Args:
        precision: fp32 or bf16.
        device: that computes.

    Returns:
        One line, None where there is nothing to say, as for processors that torch does not describe so.
    """
    if precision == "fp32" or device.type != "cpu":
        return None
    able = torch.cpu.get_capabilities()
    if able.get("architecture") != "x86_64" or able.get("avx512_bf16") or able.get("amx_bf16"):
        return None
    return (
        "parallel.precision is bf16, which this CPU has no instructions for; fp32 is about ten times as fast here "
        "(parallel.precision=fp32 evaluation.precision=auto)"
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of a tensor that lies on this rank, sharing its memory; the tensor itself where it is not sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
