"""How long each phase of an iteration takes: `bench.py`, for any config.

It trains as the loop in train.py does, but waits for the device after each phase and saves nothing. The yardstick is
the speed of the model's matrix products alone.
"""

import statistics
import time

import numpy as np
import torch

from nanogpt import data, optim, step
from nanogpt.config import BenchConfig, TrainConfig, UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import compile, distributed, health, memory, plan, products, settings, speed
from nanogpt.run.distributed import Dist
from nanogpt.run.run import Run, TrainState
from nanogpt.shape import shape
from nanogpt.text.dataset import open_dataset

PHASES = ("data", "forward", "backward", "optimizer")


def main(argv: list[str]) -> None:
    """Run `bench.py` with these arguments."""
    cfg = settings.load(BenchConfig, argv, "bench.py")
    with distributed.setup(cfg) as dist:
        distributed.choose_seed(cfg, dist)
        report(*measure(cfg, dist))


def measure(cfg: BenchConfig, dist: Dist) -> tuple[Run, float, list[dict[str, float]]]:
    """(Run, peak FLOP/s, for each of `iters` iterations the seconds of each phase)."""
    micro_steps, size = data.share_batch(cfg, dist.world_size)
    clock = Clock(dist)
    run = make_run(cfg, dist, clock)
    peak, flops = speed.device_peak(dist), run.gpt.flops_per_token(cfg.block_size) * tokens_per_iter(cfg)
    ahead = speed.expected_seconds(cfg.max_iters, flops, peak, micro_steps * cfg.n_layer)
    batch = size, cfg.block_size
    run.model = compile.compiled(dist.wrap(run.gpt), cfg, dist, batch, batch, dist.max(int(ahead)))
    dist.say(f"bench: {cfg.warmup} iterations to warm up, {cfg.iters} to measure")
    run.model.register_forward_hook(lambda *_: clock.ends("forward"))
    seconds = []
    for _ in range(cfg.warmup + cfg.iters):
        clock.restart()
        loss = step.gradients(run, size)
        clock.ends("backward")
        step.update(run, loss)
        run.advance()
        clock.ends("optimizer")
        seconds.append(clock.seconds)
    return run, peak, seconds[cfg.warmup :]


def make_run(cfg: BenchConfig, dist: Dist, clock: "Clock") -> Run:
    """A Run of a new model, on the dataset if it is prepared, otherwise on random tokens."""
    torch.manual_seed(cfg.seed)
    per_step, T = cfg.gradient_accumulation_steps * cfg.batch_size, cfg.block_size
    try:
        dataset = open_dataset(cfg.dataset, "train", T, cfg.root)
    except UserError as e:
        dist.say(f"data: {cfg.vocab_size} kinds of random tokens (--vocab_size); {e}")
        ids = np.random.default_rng(cfg.seed).integers(cfg.vocab_size, size=(per_step + 2) * T)
        dataset = data.Dataset(ids, cfg.vocab_size, None, "random tokens")
    batches = TimedBatches(dataset, "train", cfg.seed, T, dist, per_step=per_step)
    batches.clock = clock
    gpt_config = GPTConfig(**shape(cfg), dropout=cfg.dropout, vocab_size=plan.padded(dataset.vocab_size, dist))
    memory.choose_shards(cfg, gpt_config, dist)
    memory.check_size(gpt_config, "the settings", memory.bytes_to_train(cfg, dist), dist.device)
    model = dist.place(GPT(gpt_config))
    model.checkpoint_activations = cfg.checkpoint_activations
    products.choose_products(model, cfg, dist, cfg.batch_size * cfg.block_size)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
    judge = health.Health(cfg, dist.device)
    return Run(cfg, dist, model, optim.make_optimizer(model, cfg, dist), scaler, judge, TrainState(), batches, {})


def tokens_per_iter(cfg: TrainConfig) -> int:
    """Tokens in an iteration, over all processes."""
    return cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size


class Clock:
    """Adds up the seconds of each phase; waits for the device at the end of each."""

    def __init__(self, dist: Dist) -> None:
        self.device = dist.device
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        speed.synchronize(self.device)
        self.seconds, self.mark = dict.fromkeys(PHASES, 0.0), time.perf_counter()

    def ends(self, phase: str) -> None:
        """Count the time since the last phase as time of `phase`."""
        speed.synchronize(self.device)
        before, self.mark = self.mark, time.perf_counter()
        self.seconds[phase] += self.mark - before


class TimedBatches(data.Batches):
    """Batches whose reading is the phase `data`; the time before it belongs to the last backward pass."""

    clock: Clock

    def get(self, first: int, size: int, padded_to: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        self.clock.ends("backward")
        batch = super().get(first, size, padded_to)
        self.clock.ends("data")
        return batch


def report(run: Run, peak: float, seconds: list[dict[str, float]]) -> None:
    """Print the table: median times, and the speed relative to the peak and to the matrix products alone."""
    cfg, dist, model = run.cfg, run.dist, run.gpt
    rate = speed.products_rate(model, dist, data.share_batch(cfg, dist.world_size)[1] * cfg.block_size)
    if not dist.is_main:
        return
    tokens = tokens_per_iter(cfg)
    flops = model.flops_per_token(cfg.block_size) * tokens
    whole = statistics.median(sum(s.values()) for s in seconds)
    print(f"\nmodel        {model.num_params() / 1e6:.2f}M parameters, {cfg.architecture}, {cfg.optimizer}")
    print(f"iteration    {tokens:,} tokens, {flops / 1e9:,.2f} GFLOP, causal attention counted once\n")
    print(f"{'phase':<12} {'ms':>9} {'share':>7}")
    for phase in PHASES:
        ms = 1e3 * statistics.median(s[phase] for s in seconds)
        print(f"{phase:<12} {ms:>9.2f} {ms / 1e3 / whole:>7.0%}")
    print(f"{'iteration':<12} {1e3 * whole:>9.2f}\n")
    print(f"speed        {tokens / whole:,.0f} tokens a second, {flops / whole / 1e9:,.1f} GFLOP/s")
    peak = speed.peak_beside(flops / whole, peak, dist)
    if flops / whole <= peak:
        print(f"MFU          {flops / whole / peak:.1%} of the peak")
    print(
        f"yardstick    {rate * dist.world_size / 1e9:,.1f} GFLOP/s: the matrix products of this model alone, at its own shapes"
    )
    print(f"of that      {flops / whole / (rate * dist.world_size):.1%}")
    print(f"memory       {memory.peak_memory(dist.device) / 2**20:,.0f} MiB at the most")
