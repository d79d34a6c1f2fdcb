"""The processes of a run and their collective operations.

There is one process unless `torchrun` started several (LOCAL_RANK is set). device.py chooses what they compute on.
"""

import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TextIO

import torch
import torch.distributed as td

from nanogpt.config import RunFailed, UserError
from nanogpt.optim import local
from nanogpt.run import launch
from nanogpt.run.device import choose_device, choose_dtype, operand_dtype, prepare_device
from nanogpt.run.shards import Shards
from nanogpt.run.signals import Stopped
from nanogpt.run.threads import choose_threads
from nanogpt.step import forward_backward


@dataclass
class Dist:
    """This process among all: its rank, its device, and the collective operations that the loop needs."""

    device: torch.device
    dtype: torch.dtype  # of the matrix products
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    out: TextIO = sys.stdout  # where `say` prints
    host_group: Any = None  # connects the hosts; their devices go on meanwhile
    shards: Shards | None = None  # how the model is divided among the processes, if it is: see memory.choose_shards
    asked: bool = False  # whether this process was asked to stop: see signals.py
    failure: Exception | None = None  # what this process failed at, until all processes know: see `fail`
    flags: list[tuple] = field(default_factory=list)  # of the latest two steps, unless they are read: see `may_stop`

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and saves."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line on the main process."""
        if self.is_main:
            print(line, file=self.out, flush=True)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device; the copy to a GPU is asynchronous."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    @property
    def operand_dtype(self) -> torch.dtype:
        """The dtype of the operands of matrix products: see device.py."""
        return operand_dtype(self.device, self.dtype)

    def autocast(self) -> AbstractContextManager:
        """Autocast to `dtype`; a no-op if the operands of matrix products are float32."""
        if self.operand_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def place(self, model: Any) -> Any:
        """The model on the device, or its shards. A collective operation if it is sharded: see `Shards.split`."""
        if self.shards is None:
            return model.to(self.device)
        # on a GPU, autocast computes norms in float32, whatever format their gains have; on a CPU it does not
        self.shards.split(model, self.device, self.operand_dtype if self.device.type == "cuda" else torch.float32)
        return model

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with its gradients averaged over all processes, or the model itself if that is not DDP's task.

        A collective operation. DDP arranges gradients in buckets, and anew after its first backward pass, in the order
        in which they became ready. From three processes on the order of additions depends on it, so that pass is made
        here, with one token: a resumed run then adds in the same order as one that was never stopped. From here on each
        `.grad` is a view of a bucket: see `clear_gradients`.
        """
        if self.world_size == 1 or self.shards:
            return model
        from torch.nn.parallel import DistributedDataParallel

        ids = [self.device.index] if self.device.type == "cuda" else None
        ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        ddp.broadcast_buffers = False  # at each step: the RoPE tables stay the same on all ranks
        ddp.register_comm_hook(self.world_size, average)
        idx = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        forward_backward(ddp, idx, idx, self)
        with ddp.no_sync(), self.autocast():
            ddp(idx, idx)  # buckets are arranged anew when the next forward pass begins
        self.clear_gradients(ddp)
        return ddp

    def clear_gradients(self, model: Any) -> None:
        """Forget the gradients of a model that `wrap` returned.

        DDP keeps its buckets in any case. If `.grad` were None, the first micro-batches would be added up beside them.
        """
        model.zero_grad(set_to_none=self.world_size == 1 or self.shards is not None)

    def averaging(self, model: Any, when: bool) -> AbstractContextManager:
        """Context of a backward pass, which averages the gradients over all processes only if `when` is true.

        Gradients of a sharded model are divided in each pass, since they are not to be held as a whole.
        """
        if self.shards:
            model.set_requires_all_reduce(when)  # over its copies
            return nullcontext()
        return nullcontext() if when or self.world_size == 1 else model.no_sync()

    def mean_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The mean of a step's loss over all processes, without waiting for the device.

        The same reduction says whether a process wants all to stop: see `may_stop`.
        """
        if self.world_size == 1:
            return loss
        both = torch.stack([loss, torch.full_like(loss, self.asked or self.failure is not None)])
        td.all_reduce(both)
        flag, copied = both[1], None
        if flag.is_cuda:
            flag, copied = flag.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self.flags = [*self.flags[-1:], (flag, copied)]
        return both[0] / self.world_size

    def may_stop(self) -> bool:
        """Whether to ask all processes if they stop; the same on all. True, unless the loss's reductions say no.

        A flag is read once the next step has been queued on a GPU, so that it does not run dry; on a CPU, at once.
        """
        if not self.flags:
            return True
        late = int(self.device.type == "cuda")
        ready, self.flags = self.flags[: len(self.flags) - late], self.flags[len(self.flags) - late :]
        for _, copied in ready:
            if copied:
                copied.synchronize()
        return any(flag.item() > 0 for flag, _ in ready)

    def norm(self, norm: torch.Tensor) -> torch.Tensor:
        """The norm of a vector, given that of its part here, if the model is sharded; else the same."""
        if self.shards is None:
            return norm
        square = norm.square()
        td.all_reduce(square, group=self.shards.group)
        return square.sqrt()

    def whole(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A tensor of the state, with all its rows on the main process. A collective operation if it is sharded."""
        return self.shards.whole(tensor) if self.shards else tensor

    def sum(self, numbers: list) -> list:
        """Python numbers, each summed over all processes in float64."""
        if self.world_size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        td.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, which have one shape, concatenated along the first dimension."""
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        td.all_gather(parts, tensor)
        return torch.cat(parts)

    def complete(self, parts: Sequence[torch.Tensor]) -> None:
        """Fill in place what other processes have made: part i is made by process i. The last may be shorter."""
        for work in [td.broadcast(part, src=rank, async_op=True) for rank, part in enumerate(parts)]:
            work.wait()

    def max(self, number: int) -> int:
        """The largest of an integer over all processes."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number)
        td.all_reduce(tensor, op=td.ReduceOp.MAX, group=self.host_group)
        return int(tensor)

    def of_main(self, value: Any) -> Any:
        """What the main process passes, on all processes: something small."""
        values = [value]
        if self.world_size > 1:
            td.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def fail(self, failure: Exception) -> None:
        """Record what this process failed at where it must not raise: in a thread, or between collective operations.

        The first failure counts. All processes stop after this step or the next, and raise at the next `agree`.
        """
        self.failure = self.failure or failure

    @contextmanager
    def agree(self) -> Iterator[None]:
        """If a process fails within this context, or has failed before it (`fail`), all processes raise at its end.

        The process that failed raises its own error; the others raise PeerFailed with its rank and reason. There must
        be no collective operation within the context.
        """
        try:
            yield
        except Exception as e:
            self.fail(e)
        failure, self.failure = self.failure, None
        if self.max(int(failure is not None)):
            reasons: list[str | None] = [None] * self.world_size
            if self.world_size > 1:
                td.all_gather_object(reasons, failure and (str(failure) or type(failure).__name__), self.host_group)
            told = (f"process {i} could not go on: {reason}" for i, reason in enumerate(reasons) if reason)
            raise failure or launch.PeerFailed(*told)

    def require_same(self, facts: dict[str, Any]) -> None:
        """Raise UserError, on all processes, with a line for each fact that is not what process 0 has."""
        if self.world_size == 1:
            return
        found: list[Any] = [None] * self.world_size
        td.all_gather_object(found, (socket.gethostname(), facts), self.host_group)
        _, first = found[0]
        wrong = [
            f"process {rank} on {host}: {name} is {facts.get(name)}, and on process 0 it is {first.get(name)}"
            for rank, (host, facts) in enumerate(found)
            for name in first.keys() | facts.keys()
            if facts.get(name) != first.get(name)
        ]
        if wrong:
            raise UserError(*sorted(wrong))

    def require_same_bits(self, tensors: Iterable[torch.Tensor], what: str) -> None:
        """Raise RunFailed, on all processes, if the checksums of float32 tensors are not the same on all of them.

        Shards of one copy of the model are compared with those of the first copy.
        """
        count = self.shards.count if self.shards else 1
        if self.world_size == count:
            return
        found = self.gather(torch.stack([checksum(local(t)) for t in tensors])[None])
        odd = [
            (rank, rank % count) for rank in range(self.world_size) if not torch.equal(found[rank], found[rank % count])
        ]
        if odd:
            ranks = " and ".join(str(rank) for rank, _ in odd)
            raise RunFailed(f"{what} on process {ranks} are not those on process {odd[0][1]}: the run stops")

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            td.barrier(group=self.host_group)


def average(world_size: int, bucket: td.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients over all processes; DDP calls this in the backward pass.

    DDP itself multiplies by 1 / world_size or divides by world_size, depending on where a gradient was before: from three
    processes on, not the same bits.
    """
    work = td.all_reduce(bucket.buffer().mul_(1 / world_size), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Two int64s that depend on the bits of a float32 tensor and on their places, computed on its device."""
    bits = tensor.detach().view(torch.int32).reshape(-1, max(tensor.shape[-1], 1))
    sums = [bits.sum(dim, dtype=torch.int64) for dim in (0, 1)]  # by column and by row
    return torch.stack([(s * (2 * torch.arange(len(s), device=s.device) + 1)).sum() for s in sums])


@contextmanager
def setup(cfg: Any, out: TextIO | None = None) -> Iterator[Dist]:
    """The Dist of this process, with its process group open within the context.

    out: where announcements are printed; standard output by default.
    """
    out = out or sys.stdout
    several = "LOCAL_RANK" in os.environ  # some clusters set the other two for a single process
    rank, local_rank, world_size = place() if several else (0, 0, 1)
    say = partial(print, file=out, flush=True) if rank == 0 else lambda line: None
    if not several and (os.environ.get("WORLD_SIZE") or "1") != "1":
        say("processes: one, because LOCAL_RANK is not set, whatever RANK and WORLD_SIZE say; torchrun sets all three")
    choose_threads(getattr(cfg, "threads", "auto"), say)
    device = choose_device(cfg, say, local_rank, several)
    dist = Dist(device, choose_dtype(cfg, device, say), rank, local_rank, world_size, out)
    prepare_device(device, dist.dtype, getattr(cfg, "deterministic", False), say)
    if not several:
        yield dist
        return
    backend = getattr(cfg, "backend", "auto")
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
        say(f"backend: {backend}, the one for {device.type} devices (--backend)")
    if backend == "nccl" and device.type != "cuda":
        raise UserError(f"--backend=nccl: needs GPUs, and the device is {device.type}; --backend=gloo")
    timeout = timedelta(seconds=getattr(cfg, "timeout", 600))
    launch.choose_interface(say)
    try:
        store, failures = launch.meet(rank, timeout)
        group = dict(store=store, rank=rank, world_size=world_size, timeout=timeout)
        td.init_process_group(backend, device_id=device if backend == "nccl" else None, **group)
        dist.host_group = td.new_group(backend="gloo", timeout=timeout) if backend != "gloo" else td.group.WORLD
        told = launch.Failures(failures, rank, world_size).told() if world_size > 1 else nullcontext()
    except (RuntimeError, ValueError, OSError) as e:
        where = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
        why = str(e).strip().partition("\n")[0]
        raise RunFailed(f"{where}: the {world_size} processes did not meet there ({why}); torchrun sets both") from None
    sound = False
    try:
        with told:
            try:
                yield dist
                dist.barrier()
            except Stopped:  # all processes raise it
                dist.barrier()
                sound = True
                raise
        sound = True
    finally:
        close_group(sound or world_size == 1)


def close_group(sound: bool) -> None:
    """Close the process group. After a failure, don't wait for other processes, which may not answer."""
    if sound:
        td.destroy_process_group()
    elif td.get_backend() == "nccl":
        td.distributed_c10d._abort_process_group()


def place() -> tuple[int, int, int]:
    """(rank, local rank, number of processes) from torchrun's variables. UserError if one is missing or wrong."""
    names = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if len(given) < len(names):
        missing = " and ".join(name for name in names if name not in given)
        raise UserError(
            f"LOCAL_RANK={os.environ['LOCAL_RANK']}: {missing} must be set too, as torchrun does; "
            "without LOCAL_RANK, the run has one process"
        )
    least = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_PORT=0, LOCAL_WORLD_SIZE=1)
    wrong = [
        f"{name}={text}: expected a whole number from {low} on, as torchrun sets it"
        for name, low in least.items()
        if (text := os.environ.get(name, str(low))) and not (text.isascii() and text.isdigit() and int(text) >= low)
    ]
    if wrong:
        raise UserError(*wrong)
    rank, local_rank, world_size = (int(given[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    for name, number in dict(RANK=rank, LOCAL_RANK=local_rank).items():
        if number >= world_size:
            raise UserError(f"{name}={number}: expected less than WORLD_SIZE={world_size}, as torchrun sets them")
    return rank, local_rank, world_size


def choose_seed(cfg: Any, dist: Dist) -> None:
    """Replace `seed=auto` in the config by a number, the same on all processes, so that it is saved with the run."""
    if cfg.seed == "auto":
        drawn = int.from_bytes(os.urandom(4), "little") if dist.is_main else 0
        cfg.seed = int(dist.sum([drawn])[0])
        dist.say(f"seed: {cfg.seed}, from the operating system (--seed={cfg.seed} repeats this run)")
