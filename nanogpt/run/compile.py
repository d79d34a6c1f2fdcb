"""torch.compile: whether it pays, trying it out before the run depends on it, and going on without it."""

import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from nanogpt.run.distributed import out_of_memory
from nanogpt.step import forward_backward

COMPILE_PAYS = {"cuda": 60, "cpu": 600}  # from so many seconds of work on; docs/speed.md has the figures


def choose_compile(cfg, device, say, seconds):
    """Whether to compile for so many seconds of training: `cfg.compile`, or for `auto` what pays on this device."""
    if cfg.compile != "auto":
        return cfg.compile
    least = COMPILE_PAYS.get(device.type, math.inf)
    if least == math.inf or not seconds:
        why = f"it does not pay {'without training' if not seconds else 'on ' + device.type}"
    else:
        ahead = f"about {seconds / 60:.0f} minutes" if seconds >= 90 else "a minute or less"
        why = f"on {device.type} it pays in runs of more than {least} seconds, and this one takes {ahead}"
    say(f"compile: {seconds >= least}, because {why} (--compile)")
    return seconds >= least


def compiled(model, cfg, dist, eval_shape=None, train_shape=None, seconds=0.0):
    """`torch.compile` of the model where `compile` says so, tried out on batches of these shapes; the same weights.

    `eval_shape`: of a batch with targets. `train_shape`: of one whose backward pass is needed too. Without them nothing
    is tried out, as for writing text. `seconds`: how much training lies ahead, about.
    Where compilation fails, one line says so, and the model runs uncompiled; but not where the memory runs out.
    """
    if not choose_compile(cfg, dist.device, dist.say, seconds):
        return model
    errors = CompileErrors()
    dist.say(f"compile: takes a while before the first {'step' if eval_shape else 'token'}")
    began = time.perf_counter()
    finding = threading.Thread(target=find_vector_units, daemon=True)
    if dist.device.type == "cpu":
        finding.start()
    fast = torch.compile(model)
    if finding.ident:
        finding.join()
    if eval_shape:
        try:
            try_out(fast, model, dist, eval_shape, train_shape)
        except Exception as e:  # of any kind: a compiler, its driver, or PyTorch's own
            if out_of_memory(e):
                raise
            errors.note(e)
        if errors.reasons:
            dist.say(f"compile: failed, going on without it ({errors.reasons[0]})")
            return model
        dist.say(f"compile: took {time.perf_counter() - began:.0f} s")
    errors.say = dist.say
    return fast


def try_out(fast, model, dist, eval_shape, train_shape):
    """Have a compiled model compiled for what a run does. Targets of their own: else it would be for that alone."""
    try:
        if train_shape:
            idx = torch.zeros(train_shape, dtype=torch.int64, device=dist.device)
            forward_backward(fast, idx, idx.clone(), dist)
        model.eval()
        idx = torch.zeros(eval_shape, dtype=torch.int64, device=dist.device)
        with torch.no_grad(), dist.autocast():
            fast(idx, idx.clone())
    finally:
        model.train(train_shape is not None)
        model.zero_grad(set_to_none=True)


def find_vector_units():
    """Have the compiler find out what the CPU and its C++ compiler can do, which it remembers.

    Left to itself it loads small libraries in ten processes, one after the other, for 1.5 s before the first step.
    """
    with suppress(Exception):  # the compiler will ask again, and what is wrong then is told
        from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker

        flags = x86_isa_checker()
        with ThreadPoolExecutor() as threads:
            list(threads.map(bool, (isa for isa in supported_vec_isa_list if set(str(isa).split()) <= set(flags))))


class CompileErrors(logging.Filter):
    """Lets what cannot be compiled run uncompiled, and keeps the reasons instead of logging pages of them."""

    def __init__(self):
        super().__init__()
        import torch._dynamo

        torch._dynamo.config.suppress_errors = True
        self.reasons, self.say = [], None
        logging.getLogger("torch._dynamo.convert_frame").addFilter(self)

    def note(self, error):
        """Keep an error's first line; later than at the start, say it."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        self.reasons.append(lines[0] if lines else type(error).__name__)
        if self.say and len(self.reasons) == 1:
            self.say(f"compile: a part runs uncompiled ({self.reasons[0]})")

    def filter(self, record):
        """What logging calls with each record; False keeps it from being printed."""
        self.note(record.exc_info[1] if record.exc_info else record.getMessage())
        return False
