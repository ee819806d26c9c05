"""Train small language models at healthy and at far too large learning rates, with ASSR or not.

With a seed go the initial weights and the text, the same for every arm. Models read bytes: a GPT
of depth 4 without query/key norm, or a Hugging Face Llama of 4 layers (untied). Learning rates rise
over 20 steps and stay. A run *survives* if its final loss on held-out text is finite and below that
of the frequencies of single bytes. Prints a table and one JSON object as its last line::

    python scripts/assr_stress.py --save scripts/results/<date>_assr_stress_cpu.json
"""

import argparse
import itertools
import lzma
import math
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bench_common import quiet_trainer, report
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_lightning.callbacks import ASSR
from spectral_lightning.control import Regulator, Thermostat
from spectral_lightning.data.corpus import EmbeddedSource
from spectral_lightning.models import GPT

WIDTH, LENGTH, WARM_UP = 128, 128, 20
V15_STRENGTH = 1e-4  # `base_lambda` of ASSR v1.5
DECAYED = {"weight_decay": 0.1, "clip": 1.0}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay + clip": DECAYED,
    "decay + clip + legacy_l2": DECAYED | {"actuator": "legacy_l2"},
    "decay + clip + spectral_cap": DECAYED | {"actuator": "spectral_cap"},
    "decay + clip + log_stable_rank": DECAYED | {"actuator": "log_stable_rank"},
    "spectral_cap": {"actuator": "spectral_cap"},
    "decay + clip + spectral_cap, window": DECAYED | {"actuator": "spectral_cap", "window": True},
    "decay + clip + log_stable_rank, window": DECAYED
    | {"actuator": "log_stable_rank", "window": True},
}


def read_text(path: Path | None) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and the last tenth to validate on; CPython's documentation by default."""
    if path is None:
        text = "\n\n".join(EmbeddedSource().documents()).encode()
    else:
        text = path.read_bytes()
        text = lzma.decompress(text) if path.suffix == ".xz" else text
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    split = int(0.9 * len(tokens))
    return tokens[:split], tokens[split:]


def windows(tokens: Tensor, count: int, seed: int, batch: int) -> list[Tensor]:
    """Batches of windows at random places, shape ``(batch, LENGTH)`` each."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - LENGTH - 1, (count, batch), generator=generator)
    return [torch.stack([tokens[i : i + LENGTH] for i in row]) for row in starts]


class Llama(nn.Module):
    """A Llama that returns its logits."""

    layers = "model.net.model.layers.*"

    def __init__(self) -> None:
        super().__init__()
        self.net = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=WIDTH,
                num_hidden_layers=4,
                intermediate_size=344,
                num_attention_heads=4,
                vocab_size=256,
                max_position_embeddings=LENGTH,
                tie_word_embeddings=False,
            )
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, T, 256)`` of tokens ``(B, T)``."""
        return self.net(input_ids=tokens).logits


class SmallGPT(GPT):
    """The GPT of this package without query/key norm, four heads of width 32."""

    layers = "model.blocks.*"

    def __init__(self) -> None:
        super().__init__(4, 256, LENGTH, model_dim=WIDTH, head_dim=32, qk_norm=False)


class Task(pl.LightningModule):
    """Next byte with AdamW, warmed up and then constant."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.model, self.lr, self.weight_decay = model, lr, weight_decay

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean loss in nats per byte."""
        logits = self.model(tokens)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        """AdamW and its warm-up."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / WARM_UP)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def thermostat_of(arm: dict[str, Any], options: argparse.Namespace) -> ASSR:
    """ASSR on all layers but the output head, whose stable rank is naturally low."""
    strength = V15_STRENGTH if arm["actuator"] == "legacy_l2" else options.strength
    thermostat = Thermostat() if strength is None else Thermostat(strength=strength)
    layers = (Llama if options.model == "llama" else SmallGPT).layers
    regulator = Regulator(calibration="static", floor=options.floor, thermostat=thermostat)
    if arm.get("window", False):
        regulator = Regulator(first_step=WARM_UP, num_steps=2 * WARM_UP, thermostat=thermostat)
    return ASSR(
        layers,
        arm["actuator"],
        regulator,
        num_vectors=options.num_vectors,
        spectrum_every_n_steps=None,
        table_rows=0,
    )


def run(job: tuple[str, float, int], options: argparse.Namespace) -> dict[str, Any]:
    """One run; what came of it."""
    name, lr, seed = job
    torch.set_num_threads(1)
    train, valid = read_text(options.text)
    arm = ARMS[name]
    torch.manual_seed(seed)
    task = Task(
        Llama() if options.model == "llama" else SmallGPT(), lr, arm.get("weight_decay", 0.0)
    )
    callbacks = [thermostat_of(arm, options)] if "actuator" in arm else []
    trainer = quiet_trainer(
        max_steps=options.steps,
        callbacks=callbacks,
        accelerator="cpu",
        gradient_clip_val=arm.get("clip"),
    )
    started = time.perf_counter()
    batches = windows(train, options.steps, seed + 1000, options.batch_size)
    trainer.fit(task, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    task.eval()
    with torch.inference_mode():
        losses = [task.loss(batch).item() for batch in windows(valid, 12, 99, 32)]
    return {
        "arm": name,
        "lr": lr,
        "seed": seed,
        "valid_loss": statistics.fmean(losses),
        "interventions": sum(callback.assr_stats["total_int"] for callback in callbacks),
        "seconds": round(seconds, 1),
    }


def unigram_loss(options: argparse.Namespace) -> float:
    """Loss of a model that knows only how frequent each byte is, in nats."""
    train, valid = read_text(options.text)
    counts = torch.bincount(train, minlength=256) + 1.0
    return -(counts / counts.sum()).log()[valid].mean().item()


def summary(runs: list[dict[str, Any]], dead_above: float) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds for each arm and learning rate."""
    rows = []
    runs = sorted(runs, key=lambda r: (r["lr"], list(ARMS).index(r["arm"])))
    for (lr, name), group in itertools.groupby(runs, key=lambda r: (r["lr"], r["arm"])):
        losses = [r["valid_loss"] for r in group]
        spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
        survived = sum(loss < dead_above for loss in losses)
        mean = statistics.fmean(losses)
        rows.append({"lr": lr, "arm": name, "mean": mean, "std": spread, "survived": survived})
        print(f"{lr:<7g}{name:32}{mean:8.4f} +- {spread:.4f}  {survived}/{len(losses)} survive")
    return rows


def main() -> None:
    """Parse the options, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("gpt", "llama"), default="gpt")
    parser.add_argument("--text", type=Path, help="text file (also .xz)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.002, 0.004, 0.008, 0.016])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--floor", type=float, default=0.3, help="relative stable rank")
    parser.add_argument("--strength", type=float, help="of the thermostat; default: its own")
    parser.add_argument("--num_vectors", type=int, default=8, help="directions a step acts on")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread")
    parser.add_argument("--save", type=Path, help="file for the JSON record")
    options = parser.parse_args()
    jobs = list(itertools.product(options.arms, options.lrs, options.seeds))
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        runs = list(pool.map(run, jobs, itertools.repeat(options)))
    dead_above = unigram_loss(options)
    rows = summary(runs, dead_above)
    setting = vars(options) | {
        "save": None,
        "text": options.text.name if options.text else EmbeddedSource.description,
        "unigram_loss": round(dead_above, 4),
    }
    tokens = f"{options.batch_size} x {LENGTH}"
    what = f"{options.steps} steps of {tokens} bytes, validation loss in nats per byte"
    report({"what": what, **setting, "summary": rows, "runs": runs}, options.save)


if __name__ == "__main__":
    main()
