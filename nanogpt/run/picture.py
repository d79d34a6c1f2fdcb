"""loss.png, drawn from metrics.jsonl."""

import io
import math
from pathlib import Path
from typing import Any

from nanogpt import files
from nanogpt.config import installs
from nanogpt.run.records import read_metrics


def draw_losses(out_dir: Path | str) -> str:
    """Draw training and validation loss over the iterations to `loss.png`. Returns a line for the user."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return f"no picture of the losses: {installs('plot')} brings matplotlib"
    records = read_metrics(Path(out_dir) / "metrics.jsonl")
    steps = [r for r in records if r.get("loss") is not None]
    evals = [r for r in records if r.get("val_loss") is not None]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        [r["step"] for r in steps],
        [r["loss"] for r in steps],
        color="#b8c4d6",
        linewidth=0.8,
        label="train, each batch",
    )
    seen = [r["loss"] for r in steps] + [r[name] for r in evals[1:] for name in ("train_loss", "val_loss")]
    top = 1.05 * max((loss for loss in seen if loss is not None and math.isfinite(loss)), default=math.inf)
    shown = [
        r for r in evals if r["val_loss"] <= top
    ]  # without the untrained model, whose loss would flatten the curves
    marks: dict[str, Any] = dict(marker="o", markersize=3.5, linewidth=1.8)
    axes.plot([r["step"] for r in shown], [r["train_loss"] for r in shown], color="#2f6db5", label="train", **marks)
    axes.plot([r["step"] for r in shown], [r["val_loss"] for r in shown], color="#d9662b", label="validation", **marks)
    if evals:
        best = min(evals, key=lambda r: r["val_loss"])
        axes.axhline(best["val_loss"], color="#d9662b", linewidth=0.7, linestyle=":")
        axes.set_title(f"best validation loss {best['val_loss']:.4f} at iteration {best['step']:,}", fontsize=11)
        if top < math.inf:
            axes.set_ylim(top=top)
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = Path(out_dir) / "loss.png"
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    files.write(path, picture.getvalue())
    return f"loss curves: {path}"
