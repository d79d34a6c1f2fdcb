"""`--minutes`: a run that takes as long as it is told to.

`choose_run` fills in the settings that the user left open, by plan.py. A Clock then fits the number of iterations to
the time, until the learning rate begins to fall; from there on the run keeps to its schedule.
"""

import time

from nanogpt import data
from nanogpt.config import TrainConfig, UserError
from nanogpt.run import memory, plan
from nanogpt.run.distributed import Dist
from nanogpt.run.speed import duration
from nanogpt.shape import SHAPE
from nanogpt.text.dataset import open_dataset

FEW = 3  # iterations before the first look at the clock
LOOKS = 50  # at the clock, in the whole run
EXACT = 0.2  # of the time, at most, for the exact loss at the end
LEAVE = 1.5  # seconds for the last checkpoint, the picture of the losses, and Python's end


def choose_run(cfg: TrainConfig, dist: Dist) -> "Clock":
    """Fill in what `--minutes` chooses and the user has not set; the Clock of the run. A collective operation.

    A model that is finetuned keeps its shape, and only the iterations follow from the time.
    """
    given = cfg.sources.get("max_iters", "")
    if given.startswith("--") and cfg.sources.get("minutes", "").startswith("--"):
        raise UserError(f"{given}: follows from --minutes={cfg.minutes:g}; give one of them")
    clock = Clock(cfg, dist)
    with dist.agree():
        train, val = (open_dataset(cfg.dataset, split, 1, cfg.root) for split in ("train", "val"))
    found, rate = None, 0.0
    if cfg.init_from in ("scratch", "auto"):
        with dist.agree():
            plans = plans_for(cfg, dist, plan.padded(train.vocab_size, dist), (len(train.tokens), len(val.tokens)))
            trial = plan.try_out(plans, 0.8 * memory.free_memory(), dist, clock.seconds)
            rate = trial.rate if trial else plan.UNMEASURED
        rate = dist.sum([rate])[0]
        found = plan.choose(plans, rate, dist, clock.seconds)
        found.in_bfloat16 = dist.max(int(any(p.in_bfloat16 for p in plans if p.params <= found.params))) > 0
        found.repeat(plan.MAX_EPOCHS)
        found.fit(rate, clock.left())
        for name, value in found.settings(dist.device.type).items():
            if name not in cfg.sources:
                setattr(cfg, name, value)
        for name, value in dict(eval_iters=20, log_interval=max(1, cfg.max_iters // 50)).items():
            if name not in cfg.sources:
                setattr(cfg, name, value)
        if problems := list(cfg.problems()):
            raise UserError(*(f"--minutes: {names[0]} = {getattr(cfg, names[0])} {what}" for names, what in problems))
    per_step = cfg.gradient_accumulation_steps * cfg.batch_size
    clock.most = max(1, plan.MAX_EPOCHS * data.epoch_windows(train, cfg.block_size) // per_step)
    clock.set(min(found.max_iters if found else cfg.max_iters, clock.most))
    if found:
        dist.say(
            f"minutes: {cfg.minutes:g}, for about {cfg.max_iters:,} iterations of {per_step * cfg.block_size:,} tokens; "
            f"{cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} channels, {cfg.block_size} tokens of context (--help)"
        )
        if cfg.max_iters == clock.most:
            ahead = duration(found.seconds(rate, cfg.max_iters))
            dist.say(f"minutes: {ahead} suffice to read this text {plan.MAX_EPOCHS} times; more would teach little")
    return clock


def plans_for(cfg: TrainConfig, dist: Dist, vocab_size: int, tokens: tuple[int, int]) -> list[plan.Plan]:
    """The plans whose shapes the user's settings allow. tokens: of the two splits. UserError if there is none."""
    fixed = {name: getattr(cfg, name) for name in (*SHAPE, "batch_size") if name in cfg.sources}
    found, wrong = [], ""
    for shape in plan.SHAPES:
        try:
            found.append(plan.Plan(shape | fixed, vocab_size, *tokens))
        except ValueError as e:  # such as channels that are no multiple of the heads
            wrong = str(e)
    if not found:
        raise UserError(f"--minutes: finds no model with the settings that are given: {wrong}")
    return found


class Clock:
    """Fits the number of iterations to `--minutes`."""

    def __init__(self, cfg: TrainConfig, dist: Dist) -> None:
        self.cfg, self.dist, self.seconds = cfg, dist, 60 * cfg.minutes
        self.end = time.perf_counter() - time.process_time() + self.seconds  # the run began with Python, not here
        self.most = cfg.max_iters  # iterations that the data are good for
        self.evaluations = self.evaluating = 0.0  # how many there were, and their seconds
        self.marks: list[tuple[int, float]] = []  # (steps done, the time, without evaluations)
        self.next: int | None = FEW  # the number of steps after which to look; None: the iterations are settled

    def left(self) -> float:
        """Seconds that are left for iterations and their evaluations."""
        return max(0.05 * self.seconds, self.end - time.perf_counter() - LEAVE)

    def set(self, iterations: int) -> None:
        """Set the number of iterations of the run."""
        self.cfg.max_iters = self.cfg.lr_decay_iters = iterations

    def evaluated(self, seconds: float) -> None:
        """Count an evaluation of both splits."""
        self.evaluations, self.evaluating = self.evaluations + 1, self.evaluating + seconds

    def exact_seconds(self, val_tokens: int) -> float:
        """Estimated seconds of the exact loss, at the rate of the evaluations before, each of which read both splits."""
        read = 2 * self.cfg.eval_iters * self.cfg.batch_size * self.cfg.block_size
        return self.evaluating / max(1, self.evaluations) * val_tokens / read

    def refuses_exact(self, val_tokens: int) -> str | None:
        """A line that says why the exact loss is left out, or None if there is time for it. A collective operation."""
        seconds = self.exact_seconds(val_tokens)
        if not self.dist.max(int(self.dist.is_main and seconds > EXACT * self.seconds)):
            return None
        return (
            f"exact val loss: left out, since it would take {duration(seconds)} of --minutes={self.cfg.minutes:g}; "
            f"nanogpt eval --out_dir={self.cfg.out_dir} computes it"
        )

    def follow(self, step: int, val_tokens: int) -> None:
        """After `step` steps, fit the iterations to the time that is left, unless they are settled.

        val_tokens: of the exact loss at the end. A collective operation at some steps.
        """
        if step == 1 or step == self.next:
            self.marks.append((step, time.perf_counter() - self.evaluating))
        if step != self.next:
            return
        cfg, recent = self.cfg, step - max(20, step // 4)
        before = max((mark for mark in self.marks if mark[0] <= recent), default=self.marks[0])
        each = (self.marks[-1][1] - before[1]) / (step - before[0])
        one = self.evaluating / max(1, self.evaluations)
        exact = self.exact_seconds(val_tokens)
        left = self.left() - one - (exact if exact <= EXACT * self.seconds else 0.0)
        fitting = step + int(max(0.0, left) / (each + one / cfg.eval_interval))
        self.set(self.dist.max(min(max(step + 1, fitting), self.most) if self.dist.is_main else 0))
        falls = (1 - cfg.cooldown_frac) * cfg.max_iters if cfg.lr_schedule == "linear" else cfg.warmup_iters
        self.next = step + max(1, cfg.max_iters // LOOKS)
        if self.next >= falls and step > FEW:
            self.next = None
            self.dist.say(
                f"minutes: {cfg.max_iters:,} iterations, at {1e3 * each:,.0f} ms each; that is settled, as the learning rate "
                "begins to fall"
            )
