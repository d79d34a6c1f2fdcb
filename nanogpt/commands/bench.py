"""Where the time of an iteration goes: `bench.py`, for any config.

It trains as the loop in train.py does, waits for the device after each phase, and leaves nothing behind. The yardstick
is what the machine does with the matrix products of this model alone.
"""

import statistics
import time

import torch

from nanogpt import config, data, optim
from nanogpt.config import BenchConfig, UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import distributed, memory, metrics, start

PHASES = ("data", "forward", "backward", "optimizer")


def main(argv):
    """`bench.py`, given its arguments."""
    cfg = config.load(BenchConfig, argv, "bench.py")
    with distributed.setup(cfg) as dist:
        distributed.choose_seed(cfg, dist)
        report(cfg, dist, *measure(cfg, dist))


def measure(cfg, dist):
    """(model, peak FLOP/s, for each of `iters` iterations the seconds of each phase)."""
    micro_steps, size = distributed.share_batch(cfg, dist.world_size)
    torch.manual_seed(cfg.seed)
    vocab_size, batches = open_data(cfg, dist)
    shape = {name: getattr(cfg, name) for name in start.SHAPE}
    gpt_config = GPTConfig(**shape, dropout=cfg.dropout, vocab_size=start.padded(vocab_size, dist))
    memory.check_size(gpt_config, "the settings", memory.TO_TRAIN[cfg.optimizer], dist.device)
    model = GPT(gpt_config).to(dist.device)
    optimizer = optim.make_optimizer(model, cfg, dist)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
    peak, flops = metrics.device_peak(dist), model.flops_per_token(cfg.block_size) * tokens_per_iter(cfg)
    ahead = metrics.expected_seconds(cfg.max_iters, flops, peak, micro_steps * cfg.n_layer)
    batch = size, cfg.block_size
    fast_model = dist.wrap(distributed.compiled(model, cfg, dist, batch, batch, dist.max(int(ahead))))
    dist.say(f"bench: {cfg.warmup} iterations to warm up, {cfg.iters} to measure")
    seconds = []
    for iteration in range(cfg.warmup + cfg.iters):
        clock = Clock(dist)
        for micro_step in range(micro_steps):
            x, y = batches.get((iteration * micro_steps + micro_step) * size, size)
            clock.ends("data")
            with dist.synchronised(fast_model, last=micro_step == micro_steps - 1):
                with dist.autocast():
                    loss = fast_model(x, y)[1] / micro_steps
                clock.ends("forward")
                scaler.scale(loss).backward()
            clock.ends("backward")
        scaler.unscale_(optimizer)
        optim.clip_gradients(model, cfg.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        clock.ends("optimizer")
        if iteration >= cfg.warmup:
            seconds.append(clock.seconds)
    return model, peak, seconds


def open_data(cfg, dist):
    """(vocabulary size, batches): of the dataset where it is prepared, otherwise of random tokens."""
    try:
        dataset = data.Dataset(cfg.dataset, "train", cfg.block_size, cfg.root)
        return dataset.vocab_size, data.Batches(dataset, "train", cfg.seed, cfg.block_size, dist)
    except UserError as e:
        dist.say(f"data: {cfg.vocab_size} kinds of random tokens (--vocab_size); {e}")
        return cfg.vocab_size, RandomBatches(cfg, dist)


class RandomBatches:
    """What `data.Batches` is, of tokens that mean nothing."""

    def __init__(self, cfg, dist):
        self.cfg, self.dist = cfg, dist

    def get(self, first, size):
        """Inputs and targets (B=size, T), on the device."""
        ids = torch.randint(self.cfg.vocab_size, (size, self.cfg.block_size + 1))
        return self.dist.to_device(ids[:, :-1].contiguous()), self.dist.to_device(ids[:, 1:].contiguous())


def tokens_per_iter(cfg):
    """Tokens in an iteration, over all processes."""
    return cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size


class Clock:
    """Adds up the seconds of each phase; waits for the device at the end of each."""

    def __init__(self, dist):
        self.dist, self.seconds = dist, dict.fromkeys(PHASES, 0.0)
        metrics.synchronize(dist.device)
        self.mark = time.perf_counter()

    def ends(self, phase):
        """What was done since the last call belongs to this phase."""
        metrics.synchronize(self.dist.device)
        now = time.perf_counter()
        self.seconds[phase] += now - self.mark
        self.mark = now


def report(cfg, dist, model, peak, seconds):
    """Print the table: medians, and the share of what the products alone would take."""
    rate = metrics.products_rate(model, dist, distributed.share_batch(cfg, dist.world_size)[1] * cfg.block_size)
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
    peak = metrics.peak_beside(flops / whole, peak, dist)
    if flops / whole <= peak:
        print(f"MFU          {flops / whole / peak:.1%} of the peak")
    print(
        f"yardstick    {rate * dist.world_size / 1e9:,.1f} GFLOP/s: the matrix products of this model alone, at its own shapes"
    )
    print(f"of that      {flops / whole / (rate * dist.world_size):.1%}")
    print(f"memory       {memory.peak_memory(dist.device) / 2**20:,.0f} MiB at the most")
