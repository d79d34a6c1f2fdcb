"""Memory, speed, time, and cost of a training run on GPUs that need not be there: `nanogpt estimate`.

Pure arithmetic, in run/forecast.py; PyTorch is not imported. docs/estimate.md says how far published runs are from it.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nanogpt import shape
from nanogpt.config import EstimateConfig
from nanogpt.run import forecast, gpus, settings
from nanogpt.run.forecast import GIB, Job, Plan
from nanogpt.run.gpus import FAST, SLOW
from nanogpt.shape import GPTConfig
from nanogpt.text.dataset import read_meta

GPT2_VOCABULARY = 50257
SHARDS = ("none", "hybrid", "full")


def main(argv: list[str]) -> None:
    """Run `nanogpt estimate` with these arguments."""
    cfg = settings.load(EstimateConfig, argv, "nanogpt estimate")
    for line in report(cfg):
        print(line)


def report(cfg: EstimateConfig) -> Iterator[str]:
    """Yield the lines of the estimate. Raises UserError if there is no such GPU."""
    name, _ = gpus.find_gpu(cfg.gpu)
    vocab_size, origin = vocabulary(cfg)
    job = make_job(cfg, vocab_size)
    plan = make_plan(cfg)
    yield from about_the_run(cfg, job, name, origin)
    yield ""
    yield from about_memory(cfg, job)
    yield ""
    yield from about_speed(job)
    yield ""
    yield from about_time(cfg, job, plan)
    yield ""
    yield from about_more_gpus(job)


def vocabulary(cfg: EstimateConfig) -> tuple[int, str]:
    """(size of the vocabulary, where it is from)."""
    if isinstance(cfg.vocab_size, int):
        return cfg.vocab_size, "--vocab_size"
    folder = Path(cfg.root) / cfg.dataset
    if (folder / "meta.json").exists():
        return read_meta(folder)["vocab_size"], f"{folder}'s"
    return GPT2_VOCABULARY, f"GPT-2's, since {folder} is not there; --vocab_size sets another"


def make_job(cfg: EstimateConfig, vocab_size: int) -> Job:
    """The Job that the settings describe; what is `auto` is decided by what fits."""
    model = GPTConfig(**shape.shape(cfg), dropout=cfg.dropout, vocab_size=shape.padded(vocab_size))
    _, gpu = gpus.find_gpu(cfg.gpu)
    if isinstance(cfg.network, float):
        gpu = replace(gpu, network=cfg.network / 8)
    job = Job(
        model,
        sequences=cfg.gradient_accumulation_steps * cfg.batch_size,
        micro_batch=cfg.batch_size,
        gpus=cfg.gpus,
        gpu=gpu,
        per_node=cfg.gpus_per_node,
        muon=cfg.optimizer == "muon",
        checkpointed=cfg.checkpoint_activations,
        compiled=cfg.compile is not False,
    )
    if cfg.shard != "auto":
        job = replace(job, shard=cfg.shard)
    elif cfg.gpus > 1 and not forecast.fits(replace(job, micro_batch=1) if cfg.auto_batch else job):
        job = replace(job, shard="full")
    return replace(job, micro_batch=forecast.largest_micro_batch(job)) if cfg.auto_batch else job


def make_plan(cfg: EstimateConfig) -> Plan:
    """What the run does besides its iterations."""
    hours = cfg.hours_between_failures
    return Plan(
        iterations=cfg.max_iters,
        interval=cfg.eval_interval,
        evaluated=2 * cfg.eval_iters * cfg.batch_size,  # of both splits
        hours_between_failures=hours if isinstance(hours, float) else gpus.HOURS_BETWEEN_FAILURES,
    )


def about_the_run(cfg: EstimateConfig, job: Job, name: str, origin: str) -> Iterator[str]:
    """Yield the model, the batch, and how the GPUs share it."""
    model = job.model
    yield (
        f"model        {job.counts.total / 1e6:,.2f}M parameters, {model.architecture}, {cfg.optimizer}; "
        f"vocabulary {model.vocab_size:,} ({origin})"
    )
    if cfg.init_from != "scratch":
        yield f"             as the settings describe it; the shape of --init_from={cfg.init_from} is not looked up"
    yield (
        f"iteration    {job.sequences:,} sequences x {model.block_size:,} = {job.tokens:,} tokens, "
        f"{job.tokens * job.flops_per_token / 1e12:,.1f} TFLOP"
    )
    machines = f"{job.nodes:,} machine{'s' if job.nodes > 1 else ''} of {job.local}"
    network = f", {job.gpu.network * 8:,.0f} Gbit/s each between machines (--network)" if job.nodes > 1 else ""
    yield f"GPUs         {job.gpus:,} x {name} in {machines}{network}"
    most, rest = job.share, job.sequences % job.gpus
    size = min(job.micro_batch, most)
    if rest:
        yield (
            f"share        {rest:,} GPUs take {most:,} sequences and {job.gpus - rest:,} take {most - 1:,}; an iteration "
            f"lasts as long as {most:,} take, so {1 - job.sequences / (job.gpus * most):.1%} of the GPUs' time is lost"
        )
    yield (
        f"share        {most:,} sequences a GPU, {size:,} at a time: {job.micro_steps:,} "
        f"micro-step{'s' if job.micro_steps > 1 else ''}"
    )


def about_memory(cfg: EstimateConfig, job: Job) -> Iterator[str]:
    """Yield the table of memory by part and sharding, and whether it fits."""
    kinds = SHARDS if job.nodes > 1 else (("none", "full") if job.gpus > 1 else ("none",))
    tables = {kind: forecast.memory(replace(job, shard=kind)) for kind in kinds}
    yield f"{'GiB per GPU':<24}" + "".join(f"{kind:>9}" for kind in kinds)
    for part in tables["none"]:
        yield f"  {part:<22}" + "".join(f"{tables[kind][part] / GIB:>9.2f}" for kind in kinds)
    totals = {kind: sum(table.values()) for kind, table in tables.items()}
    yield f"  {f'of {job.gpu.memory:.0f}':<22}" + "".join(f"{totals[kind] / GIB:>9.2f}" for kind in kinds)
    if forecast.fits(job):
        why = (
            "as asked"
            if cfg.shard != "auto"
            else "it fits"
            if job.shard == "none"
            else "what is not sharded does not fit"
        )
        yield f"sharding     {job.shard}, {why} (--shard)" if job.gpus > 1 else "fits"
        return
    size = forecast.largest_micro_batch(job)
    smaller = replace(job, micro_batch=size)
    if forecast.fits(smaller):
        yield f"does not fit: {size} sequences at a time would (--batch_size={size} or auto, with as many in all)"
    elif not job.checkpointed and forecast.fits(replace(smaller, checkpointed=True)):
        yield "does not fit: one sequence at a time with --checkpoint_activations=True would"
    else:
        yield "does not fit: more GPUs with --shard=full, larger GPUs, or a smaller model or context would be needed"


def about_speed(job: Job) -> Iterator[str]:
    """Yield the speed as a range, and where the time goes."""
    fast, slow = forecast.iteration(job, FAST), forecast.iteration(job, SLOW)
    ends = (slow, fast)
    peak = job.gpus * job.gpu.tflops * 1e12
    yield f"iteration    {span([1e3 * t.total for t in ends], 'ms')}"
    yield f"speed        {span([job.tokens / t.total for t in ends], 'tokens/s')}"
    yield f"MFU          {span([100 * job.flops_per_token * job.tokens / t.total / peak for t in ends], '%')}"
    shares = {
        "compute": [t.compute / t.total for t in ends],
        "memory": [t.memory / t.total for t in ends],
        "within a machine": [t.within / t.total for t in ends],
        "between machines": [t.between / t.total for t in ends],
        "host": [t.host / t.total for t in ends],
    }
    parts = [f"{name} {span([100 * s for s in share], '%')}" for name, share in shares.items() if max(share) > 0.005]
    yield f"time goes to {', '.join(parts)}"
    limits = dict.fromkeys((fast.bottleneck, slow.bottleneck))
    yield f"bottleneck   {' or '.join(limits)}"


def about_time(cfg: EstimateConfig, job: Job, plan: Plan) -> Iterator[str]:
    """Yield hours, costs, and what checkpoints take."""
    ends = (FAST, SLOW)
    runs = [forecast.whole_run(job, end, plan) for end in ends]
    tokens = plan.iterations * job.tokens / 1e9
    yield f"run          {period([r.seconds for r in runs])}: {plan.iterations:,} iterations, {tokens:,.1f} billion tokens"
    yield f"             of that, evaluations take {period([r.evaluation for r in runs])}"
    if cfg.price:
        costs = [r.seconds / 3600 * job.gpus * cfg.price for r in runs]
        yield f"cost         {span(costs, '')}, at {cfg.price:g} for a GPU and an hour (--price)"
    yield (
        f"checkpoint   {forecast.checkpoint_size(job) / 1e9:,.2f} GB; copying it stops the run for "
        f"{period([r.stall for r in runs])}, writing it takes {period([r.write for r in runs])} more, beside the run"
    )
    between = plan.hours_between_failures / job.gpus
    failures = [r.seconds / 3600 / between for r in runs]
    expected = span(failures, "") if max(failures) >= 0.01 else "fewer than 0.01"
    yield (
        f"failures     one in {two_digits(between)} hours, if a GPU has one in {plan.hours_between_failures:,.0f} "
        f"(--hours_between_failures); {expected} expected in the run"
    )
    steps = [r.best_interval / forecast.iteration(job, end).total for r, end in zip(runs, ends, strict=True)]
    yield (
        f"interval     a checkpoint every {period([r.best_interval for r in runs])}, {span(steps, 'iterations')}, "
        f"loses least time; here every {plan.interval:,} (--eval_interval)"
    )


def about_more_gpus(job: Job) -> Iterator[str]:
    """Yield how many GPUs this batch keeps busy, and which batch these GPUs would need."""
    yield f"this batch   feeds at most {job.sequences:,} GPUs, with a sequence each"
    if not forecast.fits(job):
        return
    helpful = counts([forecast.helpful_gpus(job, end) for end in (SLOW, FAST)])
    yield f"             no more than {helpful} GPUs keep {forecast.KEPT:.0%} of the speed of the first"
    if job.gpus > 1:
        batches = counts([forecast.helpful_batch(job, end) for end in (FAST, SLOW)])
        yield f"these GPUs   keep {forecast.KEPT:.0%} of the speed that any batch gives them from {batches} sequences on"


def counts(ends: list[int]) -> str:
    """'32 to 64', or one number."""
    return " to ".join(f"{n:,}" for n in sorted({*ends}))


def period(ends: list[float]) -> str:
    """A range of seconds in the unit that suits it."""
    unit, size = next(
        ((u, n) for u, n in (("days", 86400), ("hours", 3600), ("minutes", 60)) if ends[0] >= 2 * n), ("s", 1)
    )
    return span([seconds / size for seconds in ends], unit)


def span(ends: list, unit: str) -> str:
    """'120 to 180 ms' for the ends of a range; one number if both look the same."""
    low, high = map(two_digits, sorted(ends))
    return f"{low}{'' if low == high else f' to {high}'} {unit}".rstrip()


def two_digits(x: float) -> str:
    """0.032, 3.2, 32, 3,200."""
    return f"{float(f'{x:.2g}'):,.0f}" if abs(x) >= 10 else f"{float(f'{x:.2g}'):g}"
