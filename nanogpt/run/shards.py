"""A model that is sharded over processes, by FSDP2: where the rows of its tensors are, and how they move.

Each parameter, its gradient and its moments are divided by rows: of `count` shards, number i has the i-th ceil(n / count)
of n rows, and the last ones may be short or empty (as torch.chunk does). With several copies, as many nodes hold one each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from nanogpt.model import GPT


@dataclass
class Shards:
    """How a model is divided. Rank r holds shard r % count of copy r // count."""

    count: int  # shards of a copy
    copies: int  # copies of the model
    rank: int  # of this process
    group: Any = None  # the processes that hold one copy with this one

    @property
    def mine(self) -> int:
        """The number of the shard that this process holds."""
        return self.rank % self.count

    def rows(self, n: int, shard: int | None = None) -> range:
        """The rows, of n, in a shard: by default in the one that this process holds."""
        size, i = -(-n // self.count), self.mine if shard is None else shard
        return range(min(i * size, n), min((i + 1) * size, n))

    def split(self, model: GPT, device: torch.device, operands: torch.dtype) -> None:
        """Shard a model: each block, then the rest. A collective operation.

        The weights are those of rank 0, on the CPU; on the other ranks the model may be on the device `meta`. Blocks are
        gathered in the number format of the operands of matrix products; masters and the reduction of gradients are in
        float32. Autocast alone would keep a cast copy of each weight from the forward pass to the backward pass.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        names = ("copies", "shards")[self.copies == 1 :]
        mesh = init_device_mesh(device.type, (self.copies, self.count)[-len(names) :], mesh_dim_names=names)
        self.group = mesh.get_group("shards")
        whole = {name: p.detach() for name, p in model.named_parameters()} if self.rank == 0 else {}
        if self.rank:
            materialize(model)
        in_products = MixedPrecisionPolicy(operands, torch.float32, cast_forward_inputs=False)
        in_float32 = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
        for block in model.transformer["h"]:  # type: ignore[attr-defined]
            fully_shard(block, mesh=mesh, mp_policy=in_products)
        # after an evaluation, too, the root's parameters are to be shards again
        fully_shard(model, mesh=mesh, mp_policy=in_float32, reshard_after_forward=True)
        for name, p in model.named_parameters():
            self.scatter(p, whole.pop(name, None))
        for buffer in model.buffers():
            td.broadcast(buffer, src=0)

    @torch.no_grad()
    def scatter(self, sharded: Any, whole: Tensor | None) -> None:
        """Copy a tensor that rank 0 holds into one that is sharded. A collective operation."""
        local = sharded.to_local()
        size = -(-sharded.shape[0] // self.count)
        parts, mine = None, local.new_empty(size, *sharded.shape[1:])
        if whole is not None:
            padded = local.new_zeros(size * self.count, *sharded.shape[1:])
            padded[: len(whole)] = whole
            parts = list(padded.chunk(self.count)) * self.copies
        td.scatter(mine, parts, src=0)
        local.copy_(mine[: len(local)])

    def whole(self, tensor: Any) -> Tensor | None:
        """A tensor with the rows of all shards, on rank 0 alone, if it is sharded; else as it is.

        A collective operation. The shards of the first copy are gathered.
        """
        if not is_sharded(tensor):
            return tensor
        if self.rank >= self.count:
            return None
        local = tensor.to_local().detach()
        mine = local.new_zeros(-(-tensor.shape[0] // self.count), *tensor.shape[1:])
        mine[: len(local)] = local
        parts = [torch.empty_like(mine) for _ in range(self.count)] if self.rank == 0 else None
        td.gather(mine, parts, dst=0, group=self.group)
        return torch.cat(parts)[: tensor.shape[0]] if parts else None

    def slices(self, tensors: Mapping[str, Tensor]) -> dict[str, slice]:
        """The rows that this process holds of those tensors that are sharded, by name."""
        ranges = {name: self.rows(t.shape[0]) for name, t in tensors.items() if is_sharded(t)}
        return {name: slice(rows.start, rows.stop) for name, rows in ranges.items()}

    def by_owners(
        self, pieces: list[Tensor], held: list[list[int]], first: int, work: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Apply `work` to matrices (R, C), each whole on one process, its owner. A collective operation.

        pieces: the rows of each matrix that this process holds. held: for each matrix, how many each shard holds. first:
        the owner of the first matrix; the others follow in turn. work: of a stack (N, R, C). Returns the same rows of the
        results. The rows go to the owners in one all-to-all, and return in another.
        """
        count, me, numbers = self.count, self.mine, range(len(pieces))
        owned = [[j for j in numbers if (first + j) % count == owner] for owner in range(count)]
        order, mine = [j for js in owned for j in js], owned[me]
        to_send = [sum(held[j][me] for j in js) for js in owned]
        to_get = [sum(held[j][shard] for j in mine) for shard in range(count)]
        sent = torch.cat([pieces[j] for j in order])
        got = sent.new_empty(sum(to_get), sent.shape[1])
        td.all_to_all_single(got, sent, to_get, to_send, group=self.group)
        parts = got.split([held[j][shard] for shard in range(count) for j in mine])
        done = got
        if mine:
            results = work(torch.stack([torch.cat(parts[k :: len(mine)]) for k in range(len(mine))]))
            rows = [result.split(held[j]) for j, result in zip(mine, results, strict=True)]
            done = torch.cat([of_matrix[shard] for shard in range(count) for of_matrix in rows])
        td.all_to_all_single(sent, done, to_send, to_get, group=self.group)
        returned = dict(zip(order, sent.split([held[j][me] for j in order]), strict=True))
        return [returned[j] for j in numbers]


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor, of which a process holds some rows."""
    return hasattr(tensor, "to_local")


def materialize(model: torch.nn.Module) -> None:
    """Give the tensors of a model on `meta` memory on the CPU, which is not touched yet. Shared parameters stay shared."""
    made: dict[Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if p not in made:
                    made[p] = torch.nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad)
                module._parameters[name] = made[p]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
