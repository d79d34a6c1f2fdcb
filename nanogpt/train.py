"""THE loop: train a GPT on a dataset, on one process or on many.

`run` is the experiment: a model, an optimizer, batches of data, and where they stand. Its own methods keep it alive:
they save it, agree with the other processes, and work in smaller parts if the memory runs out (run/run.py).
"""

from nanogpt import evaluate, optim
from nanogpt.config import TrainConfig
from nanogpt.run import distributed, settings
from nanogpt.run.start import settings_to_resume, start
from nanogpt.schedule import lr_at
from nanogpt.step import train_step


def main(argv):
    """`train.py`, given its arguments."""
    cfg = settings.load(TrainConfig, argv, "train.py", inherit=settings_to_resume)
    with distributed.setup(cfg) as dist:
        train(cfg, dist)


def train(cfg, dist):
    """The whole run. Raises Stopped, saved, if it was asked to stop before its end; RunFailed if it cannot go on."""
    with start(cfg, dist) as run:  # from scratch, from a checkpoint, or from another model's weights: --init_from
        while run.agree_to_go_on():  # no process was asked to stop, and none has failed
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
