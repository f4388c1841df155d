"""The training loop: one process, or one for each rank of a torch.distributed group."""

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from nanogpt.data.dataset import Dataset, WindowSampler, batch_at
from nanogpt.errors import ConfigError
from nanogpt.model import checkpoint
from nanogpt.model.gpt import CausalAttend
from nanogpt.train import report, state
from nanogpt.train.average import Average
from nanogpt.train.config import TrainConfig, check_same_run
from nanogpt.train.dropout import replace_dropout
from nanogpt.train.evaluate import evaluate
from nanogpt.train.optim import build_optimizers, lr_scale, set_lr
from nanogpt.train.setup import Place, build_model


class Trainer:
    """Owns the model, the optimisers and the run's directory.

    Steps are reproducible: batch and dropout of a step depend on (seed, step) alone, so neither a
    resumption nor the number of ranks changes the losses (beyond the order of additions).
    """

    def __init__(self, config: TrainConfig, place: Place) -> None:
        if config.accumulate % place.world_size:
            raise ConfigError(
                f"accumulate = {config.accumulate} micro-batches can't be divided among "
                f"{place.world_size} ranks: use a multiple"
            )
        self.config, self.place = config, place
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.data = Dataset(config.data)
        self.progress = state.Progress()
        self.model = build_model(config, self.data.meta, place)
        self.optimizers = build_optimizers(self.model, config)
        self.average = Average(self.model, config.ema_decay) if config.ema_decay else None
        self._resume()
        self.sampler = WindowSampler(
            len(self.data.train), self.model.config.block_size, config.seed
        )
        self.scaler = torch.amp.GradScaler(
            place.device.type,
            init_scale=self.progress.loss_scale,
            enabled=place.dtype == torch.float16,
        )
        self.network: nn.Module = self.model
        if place.world_size > 1:
            self.network = nn.parallel.DistributedDataParallel(self.model)

    def _resume(self) -> None:
        found = state.peek(self.out)
        if found is None:
            return
        self.progress, old = found
        check_same_run(old, self.config)
        state.restore(self.out, self.model, self.optimizers, self.average)

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.accumulate * self.model.config.block_size

    # ------------------------------------------------------------------ steps

    def fraction(self) -> float:
        """How much of the training is done, from 0 to 1; the same on every rank."""
        done = self.progress.step / self.config.max_steps
        if self.config.max_minutes:
            done = max(done, self.progress.elapsed_s / (60 * self.config.max_minutes))
        if self.place.world_size > 1 and self.config.max_minutes:
            agreed = torch.tensor(done, dtype=torch.float64, device=self.place.device)
            dist.broadcast(agreed, 0)
            done = agreed.item()
        return min(1.0, done)

    def step(self, fraction: float) -> float:
        """One update of the parameters; returns the mean training loss of this rank's share."""
        config, place = self.config, self.place
        set_lr(self.optimizers, lr_scale(self.progress.step, fraction, config))
        mine = range(place.rank, config.accumulate, place.world_size)
        total = 0.0
        for micro in mine:
            is_last = micro == mine[-1]
            with nullcontext() if is_last else self._no_sync():
                loss = self._loss(self.progress.step * config.accumulate + micro) / len(mine)
                self.scaler.scale(loss).backward()
            total += loss.item()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=False)
        self.scaler.update()
        self.progress.step += 1
        if self.average:
            self.average.update(self.progress.step)
        return total

    def _no_sync(self) -> AbstractContextManager[object]:
        if isinstance(self.network, nn.parallel.DistributedDataParallel):
            return self.network.no_sync()
        return nullcontext()

    def _loss(self, number: int) -> torch.Tensor:
        """Loss of micro-batch `number` of the run."""
        config, device = self.config, self.place.device
        starts = self.sampler.starts(number * config.batch_size, config.batch_size)
        x, y = batch_at(self.data.train, starts, self.model.config.block_size)
        torch.manual_seed(config.seed * 1_000_003 + number)  # dropout's
        # PyTorch's attention on a CPU is slow with dropout: there it is left to the residuals.
        attend = CausalAttend(config.dropout if device.type == "cuda" else 0.0)
        with self.place.autocast():
            logits = self.network(x.to(device), attend)
        return F.cross_entropy(logits.float().flatten(0, 1), y.to(device).flatten())

    # ------------------------------------------------------------------ the run

    def run(self) -> None:
        """Train to the end, saving and evaluating on the way. Only rank 0 writes."""
        if self.place.device.type == "cpu":
            replace_dropout(self.model)
        self.model.train()
        log = report.LossLog(self.out, self.progress.step) if self.place.rank == 0 else None
        saved = clock = time.monotonic()
        with self._bar() as bar:
            fraction = self.fraction()
            while fraction < 1:
                loss = self.step(fraction)
                now = time.monotonic()
                self.progress.elapsed_s += now - clock
                clock = now
                bar.update()
                rate = self.tokens_per_step * (bar.format_dict["rate"] or 0.0)
                bar.set_postfix(loss=f"{loss:.3f}", tokens_s=f"{rate:.0f}", refresh=False)
                before, fraction = fraction, self.fraction()
                done = fraction >= 1
                if log and (done or self.progress.step % self.config.eval_every == 0):
                    with self.average.in_place() if self.average else nullcontext():
                        self._evaluate(log, before, bar)
                if log and (done or now - saved >= self.config.save_every_s):
                    self._save()
                    saved = now
        if self.place.world_size > 1:
            dist.barrier()

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.config.max_steps,
            initial=self.progress.step,
            disable=self.place.rank != 0,
            unit="step",
            mininterval=1.0,
        )

    def _save(self) -> None:
        self.progress.loss_scale = self.scaler.get_scale()
        state.save(self.out, self.config, self.progress, self.model, self.optimizers, self.average)

    def _evaluate(self, log: report.LossLog, fraction: float, bar: tqdm) -> None:
        windows, cast = self.config.eval_windows, self.place.autocast
        vocab_size = self.data.meta.vocab_size
        val = evaluate(self.model, self.data.val, windows, cast, vocab_size)
        few = windows or (len(self.data.val) // self.model.config.block_size // 4 + 1)
        train = evaluate(self.model, self.data.train, few, cast, vocab_size)
        log.add(
            step=self.progress.step,
            tokens=self.tokens_per_step * self.progress.step,
            elapsed_s=round(self.progress.elapsed_s, 1),
            lr_scale=round(lr_scale(self.progress.step, fraction, self.config), 5),
            train_loss=round(train, 5),
            val_loss=round(val, 5),
        )
        bar.write(f"step {self.progress.step}: training {train:.4f}, validation {val:.4f}")
        report.plot(self.out)
        if self.progress.best_val is None or val < self.progress.best_val:
            self.progress.best_val = val
            self._export(train, val)

    def _export(self, train: float, val: float) -> None:
        card = report.model_card(
            self.config,
            self.data.meta,
            self.progress,
            self.model,
            train_loss=train,
            val_loss=val,
        )
        checkpoint.save(
            self.out / "best", self.model, self.data.meta.tokenizer, files={checkpoint.CARD: card}
        )
