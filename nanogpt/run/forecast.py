"""Memory, time, and failures of a training run on GPUs, by arithmetic alone. Never imports torch.

docs/estimate.md explains the arithmetic and compares it with published runs. Sizes are in bytes, times in seconds.
"""

import bisect
import math
from dataclasses import dataclass, replace
from functools import cached_property

from nanogpt import shape
from nanogpt.run.gpus import GPU, RESERVED, Reached
from nanogpt.shape import GPTConfig

GIB = 2**30
BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at a time
LATENCY = 30e-6  # of a collective operation within a machine, and again each time that the number of machines doubles
UPDATE = 40  # bytes that an update moves per parameter: clipping, the moments, the weight
OPERATIONS = {False: 120, True: 30}  # that the host starts per block and micro-step, by whether the model is compiled
PASSES = {False: 7.0, True: 3.5}  # bytes moved per byte of activations kept for the backward pass
LOGIT_BYTES = {False: 28, True: 12}  # bytes moved per logit
LOGIT_KEPT = {
    False: 10,
    True: 6,
}  # bytes per logit at the peak: in bfloat16, and their gradient; uncompiled in float32, too
NEWTON_SCHULZ = 5  # steps of Muon's iteration


@dataclass(frozen=True)
class Job:
    """A training run and the GPUs that it uses."""

    model: GPTConfig
    sequences: int  # in the global batch
    micro_batch: int  # sequences that a GPU processes at a time, at most
    gpus: int
    gpu: GPU
    per_node: int = 8
    shard: str = "none"
    muon: bool = False
    checkpointed: bool = False  # --checkpoint_activations
    compiled: bool = True

    @property
    def share(self) -> int:
        """Sequences of the GPU that has most."""
        return -(-self.sequences // self.gpus)

    @property
    def micro_steps(self) -> int:
        """Micro-steps of an iteration."""
        return -(-self.share // self.micro_batch)

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return -(-self.gpus // self.per_node)

    @property
    def local(self) -> int:
        """GPUs of a machine that are used."""
        return min(self.gpus, self.per_node)

    @property
    def sharded(self) -> int:
        """Number of GPUs that divide weights, gradients, and the optimizer's state among them."""
        return {"none": 1, "hybrid": self.local, "full": self.gpus}[self.shard]

    @property
    def tokens(self) -> int:
        """Tokens of an iteration."""
        return self.sequences * self.model.block_size

    @cached_property
    def counts(self) -> shape.Counts:
        """Numbers of parameters."""
        return shape.count_parameters(self.model)

    @property
    def flops_per_token(self) -> float:
        """Operations of a token, forward and backward, as `GPT.flops_per_token`."""
        return shape.flops_per_token(self.model, shape.linear_weights(self.model), self.model.block_size)


# -- memory


def optimizer_state(counts: shape.Counts, muon: bool) -> int:
    """Bytes of the optimizer's state, without AdamW's step counts: two moments, or one for what Muon updates."""
    return 8 * counts.total - 4 * counts.matrices * muon


def checkpoint_size(job: Job) -> int:
    """Bytes of a checkpoint: the weights in float32 and the optimizer's state."""
    return 4 * job.counts.total + optimizer_state(job.counts, job.muon)


def activations_kept(model: GPTConfig, compiled: bool = False) -> int:
    """Bytes per token that a block keeps for its backward pass in mixed precision.

    The stream that norms read is in float32, what products read in bfloat16. Uncompiled, each linear layer casts its
    input on its own; compiled, it is cast once, and what follows cheaply from something kept is computed again.
    """
    C, F, H = model.n_embd, model.hidden, model.n_head
    queries, keys = H * model.head_size, model.kv_heads * model.head_size
    kept = 2 * 4 * C + 2 * C * bool(model.dropout)  # what two norms read; masks of two dropouts
    kept += 2 * (2 * queries + 2 * keys) + 4 * H  # queries, keys, values, their result; log-sum-exp
    if compiled or not model.modern:
        kept += 2 * 2 * C + (6 if model.modern else 4) * F  # what the layers after the norms read; in the MLP
    else:
        kept += 5 * 2 * C + 8 * F
    if model.norm_gain and not compiled:
        kept += 2 * 4 * C
    if model.architecture == "qwen3":  # what the norms of queries and keys read
        kept += (2 if compiled else 4 + 4 * model.norm_gain) * (queries + keys)
    return kept


def memory(job: Job) -> dict[str, float]:
    """Bytes on the fullest GPU at the peak, by part."""
    model, counts, parts = job.model, job.counts, job.sharded
    tokens = min(job.micro_batch, job.share) * model.block_size
    block = counts.matrices // model.n_layer
    linear = shape.linear_weights(model)
    copies = 2.0 * linear if job.shard == "none" else 2.0 * (2 * block + counts.embeddings)
    gradients = 4 * counts.total / parts + (0 if job.shard == "none" else 2 * block)
    kept = activations_kept(model, job.compiled)
    layers = kept + model.n_layer * 4 * model.n_embd if job.checkpointed else (model.n_layer + 1) * kept
    return {
        "weights in float32": 4 * counts.total / parts,
        "copies for products": copies,
        "gradients": gradients,
        "optimizer state": optimizer_state(counts, job.muon) / parts,
        "activations": float(tokens * layers),
        "logits": float(tokens * model.vocab_size * LOGIT_KEPT[job.compiled]),
        "CUDA and libraries": RESERVED * GIB,
    }


def fits(job: Job) -> bool:
    """Whether the GPU has enough memory."""
    return sum(memory(job).values()) <= job.gpu.memory * GIB


def largest_micro_batch(job: Job) -> int:
    """The most sequences of a GPU's share that fit at a time; 1 if none do."""
    sizes = range(1, job.share + 1)
    return max(1, bisect.bisect_left(sizes, True, key=lambda size: not fits(replace(job, micro_batch=size))))


# -- time


@dataclass(frozen=True)
class Times:
    """Seconds of an iteration by what they are spent on; communication that computing hides is not in them."""

    compute: float
    memory: float
    within: float  # communication within a machine
    between: float  # communication between machines
    host: float  # waiting for the host to start operations

    @property
    def device(self) -> float:
        """Seconds without communication and the host."""
        return self.compute + self.memory

    @property
    def total(self) -> float:
        """Seconds of an iteration."""
        return self.device + self.within + self.between + self.host

    @property
    def bottleneck(self) -> str:
        """What takes most of the time."""
        names = dict(
            compute="compute",
            memory="memory bandwidth",
            within="communication within a machine",
            between="communication between machines",
            host="the host, which starts operations",
        )
        return names[max(names, key=lambda name: getattr(self, name))]


def iteration(job: Job, reached: Reached) -> Times:
    """The time of an iteration."""
    compute, moving = micro_step(job, reached)
    update_compute, update_moving = update(job, reached)
    window = compute + moving
    compute, moving = job.micro_steps * compute + update_compute, job.micro_steps * moving + update_moving
    within, between = communication(job, reached, window)
    operations = job.micro_steps * (job.model.n_layer * OPERATIONS[job.compiled] + 50) + 300
    host = max(0.0, operations * reached.launch - compute - moving)
    return Times(compute, moving, within, between, host)


def micro_step(job: Job, reached: Reached) -> tuple[float, float]:
    """(seconds of arithmetic, seconds of moving data) of a forward and backward pass of a micro-batch."""
    model, tokens = job.model, job.share / job.micro_steps * job.model.block_size
    rate, bandwidth = job.gpu.tflops * 1e12 * reached.products, job.gpu.bandwidth * 1e9 * reached.memory
    again = 4 / 3 if job.checkpointed else 1  # blocks compute their forward pass twice
    head = (model.n_embd, model.vocab_size)
    layers = [(head, 1.0), *((linear, model.n_layer * again) for linear in shape.block_linears(model))]
    compute = moving = 0.0
    for (n_in, n_out), times in layers:
        arithmetic = 6 * n_in * n_out * tokens / rate
        traffic = 3 * 2 * ((n_in + n_out) * tokens + n_in * n_out) / bandwidth  # three products of bfloat16
        compute += times * arithmetic * (arithmetic >= traffic)
        moving += times * traffic * (arithmetic < traffic)
    attention = 6 * shape.attention_flops(model, model.block_size) * tokens * again
    compute += attention / (job.gpu.tflops * 1e12 * reached.attention)
    elementwise = PASSES[job.compiled] * activations_kept(model) * model.n_layer * again
    moved = tokens * (elementwise + LOGIT_BYTES[job.compiled] * model.vocab_size)
    moved += 6 * shape.linear_weights(model) + 10 * job.counts.total  # casting weights, adding to gradients
    return compute, moving + moved / bandwidth


def update(job: Job, reached: Reached) -> tuple[float, float]:
    """(seconds of arithmetic, seconds of moving data) of the optimizer; Muon's is divided among the GPUs."""
    flops = sum(
        NEWTON_SCHULZ * (4 * small**2 * large + 2 * small**3)
        for small, large in map(sorted, shape.block_linears(job.model))
    )
    arithmetic = job.muon * job.model.n_layer * flops / job.gpus / (job.gpu.tflops * 1e12 * reached.products)
    return arithmetic, UPDATE * job.counts.total / job.sharded / (job.gpu.bandwidth * 1e9 * reached.memory)


def communication(job: Job, reached: Reached, window: float) -> tuple[float, float]:
    """(within a machine, between machines): seconds of communication that computing does not hide.

    window: seconds of a micro-step. Rings: each GPU sends (N - 1) / N of the bytes to gather or to reduce and scatter
    them, and twice that to reduce them everywhere. All GPUs of a machine use their share of its network at a time.
    """
    if job.gpus == 1:
        return 0.0, 0.0
    link = job.gpu.link * 1e9 * reached.network
    network = job.gpu.network * 1e9 * reached.network * job.local
    everywhere = link if job.nodes == 1 else min(link, network)
    delay = LATENCY * (1 + math.log2(job.nodes))
    total, blocks = job.counts.total, job.model.n_layer + 1

    def ring(size: float, n: int, bandwidth: float) -> float:
        return size * (n - 1) / n / bandwidth

    def exposed(seconds: float, hidden_by: float) -> float:
        return max(reached.exposed * seconds, seconds - hidden_by)

    local = far = 0.0
    backward = 2 / 3 * window  # of the last micro-step, in which gradients are averaged
    if job.shard == "none":
        far = exposed(2 * ring(4 * total, job.gpus, everywhere) + delay * -(-4 * total // BUCKET), backward)
    else:  # gather weights in bfloat16 twice, then reduce and scatter gradients in float32
        size, n, bandwidth = 8 * total, job.sharded, link if job.shard == "hybrid" else everywhere
        far = job.micro_steps * exposed(ring(size, n, bandwidth) + 3 * blocks * delay, window)
        if job.shard == "hybrid" and job.nodes > 1:
            local, far = far, exposed(2 * ring(4 * total, job.nodes, network) + blocks * delay, backward)
    if job.muon:  # nothing hides the exchange of the orthogonal matrices; sharded, gradients come to their owners, too
        far += (1 if job.shard == "none" else 2) * ring(2 * job.counts.matrices, job.gpus, everywhere)
    return (local + far, 0.0) if job.nodes == 1 or everywhere == link and job.shard != "hybrid" else (local, far)


# -- a whole run


@dataclass(frozen=True)
class Run:
    """What a run takes from its start to its end."""

    seconds: float  # of all
    evaluation: float
    stall: float  # of one checkpoint
    write: float  # seconds in the background for one checkpoint
    best_interval: float  # seconds from a checkpoint to the next


def whole_run(job: Job, reached: Reached, plan: "Plan") -> Run:
    """The time of a run, with evaluations, checkpoints and failures."""
    times = iteration(job, reached)
    stall = checkpoint_size(job) / (reached.copy * 1e9)
    write = checkpoint_size(job) / (reached.disk * 1e9)
    share = plan.evaluated * job.model.block_size / job.tokens  # of an iteration's tokens, forward only
    evaluation = times.device * share / 3
    rounds = plan.iterations / plan.interval + 1
    seconds = plan.iterations * times.total + rounds * (evaluation + stall)
    between = plan.hours_between_failures * 3600 / job.gpus
    lost = min(plan.interval, plan.iterations) * times.total / 2 + reached.restart  # by a failure, on average
    seconds *= 1 + lost / between
    return Run(seconds, rounds * evaluation, stall, write, max(write, best_interval(stall, between)))


@dataclass(frozen=True)
class Plan:
    """What a run does besides its iterations."""

    iterations: int
    interval: int  # iterations from one evaluation and checkpoint to the next
    evaluated: int  # sequences in an evaluation
    hours_between_failures: float  # of one GPU


def best_interval(cost: float, between: float) -> float:
    """Seconds from one checkpoint to the next at which least time is lost (Daly 2006, eq. 37; Young 1974 is its first term).

    cost: seconds that a checkpoint takes. between: mean seconds between failures.
    """
    if cost >= 2 * between:
        return between
    x = cost / (2 * between)
    return math.sqrt(2 * cost * between) * (1 + math.sqrt(x) / 3 + x / 9) - cost


KEPT = 0.8  # of the speed per GPU: with more GPUs than keep it, the rest hardly helps


def helpful_gpus(job: Job, reached: Reached, plan: Plan | None = None) -> int:
    """The most GPUs, doubling from one, that keep KEPT of the speed of the first number that fits."""
    best, first = 0, 0.0
    n = 1
    while n <= job.sequences:
        tried = replace(job, gpus=n)
        if n == job.gpus or fits(tried) or first:
            speed = 1 / iteration(tried, reached).total / n
            first = first or speed
            best = n if speed >= KEPT * first else best
        n *= 2
    return best


def helpful_batch(job: Job, reached: Reached) -> int:
    """The fewest sequences, doubling from one per GPU, with which these GPUs keep KEPT of their speed in the limit."""
    tried = replace(job, sequences=job.gpus)
    limit = replace(job, sequences=job.gpus * 4096)
    target = KEPT * limit.sequences / iteration(limit, reached).total
    while tried.sequences / iteration(tried, reached).total < target:
        tried = replace(tried, sequences=2 * tried.sequences)
    return tried.sequences
