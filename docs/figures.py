"""Draws the pictures of the README and the concepts page from the demo's data.

Usage: `python -m docs.figures [--workdir runs/demo]`. Trains `configs/av_digits.py` with rotations
and without, or reads the folder if it holds that run, and writes `docs/images/rotation.png` and
`dynamics.png`, each with a `-dark` twin for pages on a dark ground.
"""

import argparse
import io
from pathlib import Path

import jax
from etils import epath
from PIL import Image, ImageOps

from configs.av_digits import get_config
from rollingq_jax.analysis import metrics, plots
from rollingq_jax.data.pipeline import eval_batches
from rollingq_jax.train.checkpoint import Checkpoints
from rollingq_jax.train.logging import read_rows
from rollingq_jax.train.loop import abstract_params, load_run, train_and_evaluate

IMAGES = Path(__file__).parent / "images"
SHOWN = 400  # test examples of which each is a point
LARGEST = 300_000  # bytes of a picture


def panel(folder: Path, title: str) -> plots.PolarPanel:
    """The query at the end of training and its keys of test examples, with the attention's shares.

    The last checkpoint, not the best: accuracy peaks where a share passes one half on its way.
    """
    run = load_run(folder)
    with Checkpoints(epath.Path(folder) / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore_newest_params(lambda _: abstract_params(run.model, run.inputs))
    assert found is not None
    last = found[0]
    batch = next(eval_batches(run.dataset.splits["test"], batch_size=SHOWN))
    _, out = jax.jit(metrics.forward, static_argnums=0)(
        run.model, {"params": last.params}, last.rotation, metrics.model_input(batch)
    )
    shares = {name: 100 * float(share.mean()) for name, share in out["attention_share"].items()}
    said = ", ".join(f"{name} {share:.0f} %" for name, share in shares.items())
    return plots.PolarPanel(f"{title}\nattention: {said}", out["mean_keys"], out["query"][0])


def save(name: str, figure: bytes) -> None:
    """Writes a PNG, and its twin with the lightness turned round and the hues as they are."""
    (IMAGES / f"{name}.png").write_bytes(figure)
    light, blue, red = Image.open(io.BytesIO(figure)).convert("RGB").convert("YCbCr").split()
    light = ImageOps.invert(light).point(lambda value: 15 + value * 240 // 255)
    dark = Image.merge("YCbCr", (light, blue, red)).convert("RGB")
    dark.quantize(256).save(IMAGES / f"{name}-dark.png", optimize=True)
    for path in IMAGES.glob(f"{name}*.png"):
        assert path.stat().st_size < LARGEST, path


def main() -> None:
    """Trains, or reads, and draws."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    folder = parser.parse_args().workdir
    config = get_config()
    train_and_evaluate(config, folder)
    panels = [
        panel(folder / "plain", "Without rotations"),
        panel(folder, "With RollingQ"),
    ]
    save("rotation", plots.png_bytes(plots.polar_panels(panels)))
    rows, plain = (read_rows(one / "metrics.jsonl") for one in (folder, folder / "plain"))
    figure = plots.dynamics_figure(rows, beta=config.rolling.beta, plain=plain)
    save("dynamics", plots.png_bytes(figure))


if __name__ == "__main__":
    main()
