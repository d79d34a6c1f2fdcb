"""The training loop, on one process or on many.

`run` is a run.run.Run: the model, the optimizer, the batches, and the current step. Its methods save it, report, and
agree with the other ranks on whether to go on. A step, forward, backward and update, is in step.py.
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
    """The whole run. If it is asked to stop early, `start` saves it at the end of the `with` and raises Stopped.

    Raises RunFailed, on all ranks, if the run cannot go on.
    """
    with start(cfg, dist) as run:  # --init_from: from scratch, a checkpoint, or another model's weights
        while run.agree_to_go_on():  # False, on all ranks, once any of them was asked to stop or has failed
            lr = lr_at(run.step, cfg)  # of the next update
            if run.evaluation_is_due():
                losses = run.measure(evaluate.losses)  # on the same batches each time
                run.record(losses, lr)  # and compare with the best so far: --patience
                run.save()  # in the background
            if run.is_finished():
                run.record_exact(evaluate.exact_validation)
                break
            optim.set_lr(run.optimizer, lr, cfg)
            metrics = train_step(run)  # run.step is one more from here on
            run.report(metrics, lr)  # read later, so that a GPU never waits for the host
