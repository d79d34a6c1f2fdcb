"""THE loop: train a GPT on a dataset, on one process or on many.

`run` is the experiment: a model, an optimizer, batches of data, and the step that it has reached. Its methods keep it
alive: they save it, agree with the other ranks on whether to go on, and report (run/run.py). `train_step` is in step.py.
"""

from nanogpt import evaluate, optim
from nanogpt.config import TrainConfig
from nanogpt.run import distributed, settings
from nanogpt.run.start import settings_to_resume, start
from nanogpt.schedule import lr_at
from nanogpt.step import train_step


def main(argv: list[str]) -> None:
    """`train.py`, given its arguments."""
    cfg = settings.load(TrainConfig, argv, "train.py", inherit=settings_to_resume)
    with distributed.setup(cfg) as dist:
        train(cfg, dist)


def train(cfg: TrainConfig, dist: distributed.Dist) -> None:
    """The whole run. Raises Stopped, saved, if it was asked to stop before its end; RunFailed if it cannot go on."""
    with start(cfg, dist) as run:  # from scratch, from a checkpoint, or from another model's weights: --init_from
        while run.agree_to_go_on():  # no rank was asked to stop, and none failed to write
            lr = optim.set_lr(run.optimizer, lr_at(run.step, cfg), cfg)
            if run.evaluation_is_due():
                losses = run.measure(evaluate.losses)  # always on the same batches
                run.record(losses, lr)
                run.save()  # in the background
            if run.is_finished():
                run.record_exact(run.measure(evaluate.exact_validation))
                break
            metrics = train_step(run)
            run.report(lr, metrics)
