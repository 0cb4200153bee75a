"""The refit of one writer through what stands between it and the residual stream.

Source   docs/methods.md#refit
Formula  y = c·z: the correction over c.  y = g ⊙ z/ρ, ρ_t = √(mean z_t² + ε): Gauss–Newton, whose
         rounds solve the same ridge towards ρ_t·e_t ⊙ g/(g² + τ²) with token weights w_t/ρ_t²
         z = W·a (d): the writer's output; e: what the stream still lacks; τ = 0.1 · median |g|,
         because tiny gains would blow up noise. The part of ∂y/∂z along z is left out
Rule     each round's step by the held-out error through the norm; then the gain, per channel by
         least squares, if that lowers the held-out error
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from layercut.models.output_projections import store_like
from layercut.models.ranks import ALONE, Ranks
from layercut.models.view import DecoderView
from layercut.models.writers import Norm, Writer
from layercut.recovery.ridge import Shape, fast_products, fit_best_penalty
from layercut.spool import SLICE, Spool, choose_device

ROUNDS = 3
STEPS = (1.0, 0.7, 0.4, 0.2)
SMALL_GAIN = 0.1
"""τ as a share of the median gain."""
MOST_GAIN = 4.0
"""A gain changes by this factor at most: a channel that is silent in the text says nothing."""

Rows = Callable[[Tensor], Iterator[tuple[Tensor, Tensor]]]
"""A mask over all tokens → slices of the weighted rows a and e of those that it marks."""


@dataclass(slots=True)
class WriterRows:
    """What a fit reads, token by token.

    Attributes:
        inputs: a, (n_tokens, in).
        outputs: z, what the norm behind the writer reads, (n_tokens, d), if there is one.
        stream: the layer's output, (n_tokens, d).
        target: what it should be, (n_tokens, d).
        held_out: mask of the tokens that judge and are not fitted.
        ranks: who has the other rows.
    """

    inputs: Spool
    outputs: Spool | None
    stream: Spool
    target: Spool
    held_out: Tensor
    ranks: Ranks = ALONE


def fit_writer(
    view: DecoderView, writer: Writer, rows: WriterRows, *, gain: bool = True
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The replaced tensors that lower the held-out error; the change D, (out, in), of a plain one.

    Args:
        view: the model; the writer's layer is in memory.
        writer: what is fitted.
        rows: of all calibration tokens.
        gain: fit that of the norm behind it as well.
    """
    device = choose_fit_device(view, rows)
    weight = writer.module.weight
    if writer.norm is None:
        change = fit_ridge_update(rows, writer.factor, device)
        if change is None:
            return {}, None
        stored = store_like(writer.module, change).to(weight)
        return {f"{writer.prefix}.weight": weight + stored}, change if writer.is_plain else None
    through = ThroughNorm(writer, writer.norm, rows, device)
    total = through.fit_map()
    changed: dict[str, Tensor] = {}
    if total is not None:
        changed[f"{writer.prefix}.weight"] = weight + store_like(writer.module, total).to(weight)
    return changed | (through.fit_gain(view) if gain else {}), None


def fit_ridge_update(rows: WriterRows, factor: float, device: torch.device) -> Tensor | None:
    """The change D that lowers the held-out error most, (out, in); ``None`` if none does.

    Args:
        rows: of all calibration tokens.
        factor: what stands between the writer and the stream.
        device: where D is computed, and is then.
    """
    return _fit_rows(rows, device, _plain_rows(rows, factor, device))


def see_through(
    writer: Writer, outputs: tuple[Tensor, Tensor] | None
) -> tuple[Tensor | float, Tensor | float, Tensor | float, Tensor | float]:
    """What stands between z and the stream, linearised: y's change = after ⊙ (D·a / scale).

    Args:
        writer: what writes.
        outputs: behind a norm, z of the rows to fit and of those held out.

    Returns:
        What a wanted change is multiplied by, what a predicted one is, and what a is divided by,
        of the rows to fit and of those held out.
    """
    norm = writer.norm
    if norm is None or outputs is None:
        return 1 / writer.factor, writer.factor, 1.0, 1.0
    fitted, held_out = outputs
    gain = norm.gain.to(fitted.device)
    return _small_gain(norm).to(gain), gain, norm.scale(fitted), norm.scale(held_out)


def _small_gain(norm: Norm) -> Tensor:
    """g/(g² + τ²), (d,): what a correction of y is multiplied by to become one of z/ρ."""
    gain = norm.gain
    tau = SMALL_GAIN * gain.abs().median()
    damped: Tensor = gain.div((gain.square() + tau.square()).clamp_min(1e-30))
    return damped


def choose_fit_device(
    view: DecoderView, rows: WriterRows, width: int | None = None
) -> torch.device:
    """Where D is computed: the model's device if there is memory for it, else the CPU.

    Args:
        view: the model.
        rows: of all calibration tokens.
        width: the features of the widest a; default: those of ``rows``.
    """
    width, out = width or rows.inputs.rows.shape[1], rows.stream.rows.shape[1]
    n_held_out = int(rows.held_out.sum())
    n_fitted = rows.ranks.total(len(rows.held_out) - n_held_out)[0]
    side = min(int(n_fitted), width)
    # The Gram matrix, ridged and factored; two solutions, the right side and D; the rows of the
    # tokens' side and the held-out ones; slices.
    n_bytes = 8 * side * (3 * side + 5 * out) + 4 * (side + n_held_out) * (width + out) + 2**28
    return choose_device(view.device, n_bytes)


def _fit_rows(rows: WriterRows, device: torch.device, pick: Rows) -> Tensor | None:
    """D of the best λ, (out, in); ``None`` if none lowers the held-out error."""
    width, out = rows.inputs.rows.shape[1], rows.stream.rows.shape[1]
    n_held_out = int(rows.held_out.sum())
    shape = Shape(len(rows.held_out) - n_held_out, n_held_out, width, out)
    fitted, held_out = pick(~rows.held_out), pick(rows.held_out)
    return fit_best_penalty(fitted, held_out, shape, device, rows.ranks)


def marked_slices(
    mask: Tensor, device: torch.device, *spools: Spool
) -> Iterator[tuple[Tensor, ...]]:
    """The marked rows of several spools, slice by slice, on the device."""
    parts = zip(*(spool.slices() for spool in spools), strict=True)
    for spooled, chosen in zip(parts, mask.split(SLICE), strict=True):
        index = chosen.nonzero().squeeze(1)
        yield tuple(rows[index.to(rows.device)].to(device) for rows in spooled)


def weigh(target: Tensor) -> Tensor:
    """√w_t = 1/‖target_t‖, (n, 1)."""
    length: Tensor = target.norm(dim=1, keepdim=True)
    return length.clamp_min(1e-6).reciprocal()


def _plain_rows(rows: WriterRows, factor: float, device: torch.device) -> Rows:
    def pick(mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for a, output, target in marked_slices(mask, device, rows.inputs, rows.stream, rows.target):
            weight = weigh(target)
            missing = (target - output) * weight
            yield a * weight, missing if factor == 1.0 else missing / factor

    return pick


class ThroughNorm:
    """The rows of a writer with a norm behind it, at the z that the fit has reached."""

    def __init__(self, writer: Writer, norm: Norm, rows: WriterRows, device: torch.device) -> None:
        assert rows.outputs is not None
        self.writer, self.norm, self.rows, self.device = writer, norm, rows, device
        self.first = rows.outputs
        self.z = Spool(len(self.first), self.first.rows.shape[1], device=self.first.device)
        self.z.write(0, self.first.rows)
        self.raise_by = _small_gain(norm).to(device)

    def fit_map(self) -> Tensor | None:
        """The summed change of W, (out, in); ``None`` where none lowers the held-out error."""
        total: Tensor | None = None
        for _ in range(ROUNDS):
            change = _fit_rows(self.rows, self.device, self.linearised)
            if change is None:
                break
            change = change.float()
            moved = _multiply(self.rows.inputs, change)
            step = self.choose_step(moved)
            if step == 0:
                break
            total = step * change if total is None else total + step * change
            self.move(step, moved)
        return total

    def fit_gain(self, view: DecoderView) -> dict[str, Tensor]:
        """The norm's gain, per channel by least squares, if that lowers the held-out error."""
        if self.norm.parameter is None:
            return {}
        factor = self._fit_gain_factor()
        if factor is None:
            return {}
        stored = view.model.get_parameter(self.norm.parameter).data
        new = (stored.float() + self.norm.offset) * factor.to(stored.device) - self.norm.offset
        return {self.norm.parameter: new.to(stored.dtype)}

    def _parts(self, mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """a, z, what y should be, and √w."""
        rows = self.rows
        spools = rows.inputs, self.z, self.first, rows.stream, rows.target
        for a, z, first, stream, target in marked_slices(mask, self.device, *spools):
            yield a, z, target - stream + self.writer.write(first), weigh(target)

    def linearised(self, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Weighted rows a/ρ and g/(g² + τ²) ⊙ e."""
        for a, z, wanted, weight in self._parts(mask):
            missing = (wanted - self.writer.write(z)) * self.raise_by
            yield a * (weight / self.norm.scale(z)), missing * weight

    def choose_step(self, moved: Spool) -> float:
        """The part of a move of z with the lowest held-out error; 0 where none lowers it."""
        shares = (0.0, *STEPS)
        errors = torch.zeros(len(shares), dtype=torch.float64, device=self.device)
        mask = self.rows.held_out
        moves = marked_slices(mask, self.device, moved)
        for (_, z, wanted, weight), (move,) in zip(self._parts(mask), moves, strict=True):
            for place, share in enumerate(shares):
                left = (wanted - self.writer.write(z + share * move)) * weight
                errors[place] += left.square().sum(dtype=torch.float64)
        self.rows.ranks.sum_(errors)
        return shares[int(errors.argmin())]

    def move(self, step: float, moved: Spool) -> None:
        """Let z be that of the changed weights."""
        for z, move in zip(self.z.slices(), moved.slices(), strict=True):
            z += step * move.to(z.device)

    def residuals(self) -> tuple[Spool, Tensor]:
        """What z lacks, linearised, (n_tokens, d), and the tokens' weights, (n_tokens, 1)."""
        missing, weights = Spool(len(self.z), self.z.rows.shape[1], device=self.z.device), []
        everything = torch.ones_like(self.rows.held_out)
        for place, (_, z, wanted, weight) in enumerate(self._parts(everything)):
            scale = self.norm.scale(z)
            left = (wanted - self.writer.write(z)) * self.raise_by
            missing.write(place * SLICE, left * scale)
            weights.append(weight / scale)
        return missing, torch.cat(weights)

    def _fit_gain_factor(self) -> Tensor | None:
        """The factor of every gain, (d,); ``None`` where it does not lower the held-out error."""
        width = self.z.rows.shape[1]
        sums = torch.zeros(2, width, dtype=torch.float64, device=self.device)
        for _, z, wanted, weight in self._parts(~self.rows.held_out):
            y = self.writer.write(z) * weight
            sums[0] += (wanted * weight * y).sum(dim=0, dtype=torch.float64)
            sums[1] += y.square().sum(dim=0, dtype=torch.float64)
        self.rows.ranks.sum_(sums)
        factor = (sums[0] / sums[1].clamp_min(1e-300)).clamp(1 / MOST_GAIN, MOST_GAIN).float()
        factor = torch.where(sums[1] > 0, factor, 1.0)
        errors = torch.zeros(2, dtype=torch.float64, device=self.device)
        for _, z, wanted, weight in self._parts(self.rows.held_out):
            y = self.writer.write(z)
            for place, written in enumerate((y, y * factor)):
                left = (wanted - written) * weight
                errors[place] += left.square().sum(dtype=torch.float64)
        self.rows.ranks.sum_(errors)
        return factor if bool(errors[1] < errors[0]) else None


def _multiply(inputs: Spool, change: Tensor) -> Spool:
    """a·Dᵀ of every token, (n_tokens, out)."""
    right = change.T
    moved = Spool(len(inputs), right.shape[1], device=inputs.device)
    with fast_products(right.device):
        for place, a in enumerate(inputs.slices()):
            moved.write(place * SLICE, a.to(right.device) @ right)
    return moved
