"""The refit through what stands between a projection and the stream, on planted damage.

The dropped layer writes nothing. What the model lacks is that one kept projection is another one
than in the dense model, so that the refit can put it back.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import plan_of, save_tiny
from family_configs import FAMILIES
from layercut.engine.residual_stream import ResidualStream
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.models.writers import Writer, find_writers
from layercut.recovery.expert_fit import record_writer
from layercut.recovery.layer_fit import mask_held_out_rows, refit_layers
from layercut.types import CalibrationBatches
from saved_families import save_family

KINDS = {
    "norm": "gemma2",
    "norm, plain gain": "olmo2",
    "factor": "granite",
    "parallel": "phi",
    "mixer": "granitemoehybrid",
    "shared expert": "deepseek_v3",
    "experts": "mixtral",
    "experts with biases": "gpt_oss",
    "experts that read gated inputs": "llama4",
    "the same beside a shared one, behind one norm": "afmoe",
}
# Its experts are much alike on so few channels, and sweeps part them slowly.
LEFT = {"experts with biases": 0.03}
"""What may be left of the squared error where that is more than a thousandth."""
DROPPED = 4


@pytest.fixture(scope="module")
def text() -> CalibrationBatches:
    """Enough tokens for maps of 16 to 32 inputs, of each of four experts."""
    ids = torch.randint(3, 250, (96, 16), generator=torch.Generator().manual_seed(3))
    return CalibrationBatches(ids, 4, 8, "random", "random")


def silence(view: DecoderView, layer: int) -> None:
    """Let a layer write nothing: everything in it that could is zero."""
    for name, parameter in view.layers[layer].named_parameters():
        if "norm" not in name.split(".")[-2]:
            parameter.data.zero_()


def lacking(view: DecoderView, batches: CalibrationBatches, dense: ResidualStream) -> float:
    """The squared distance to the dense model's last states."""
    stream = ResidualStream(view, batches)
    for layer in range(view.n_layers):
        if layer != DROPPED:
            stream.advance(layer)
    dense.advance_to(view.n_layers)
    return float((stream.states.rows - dense.states.rows).double().square().sum())


def find_busy_experts(view: DecoderView, batches: CalibrationBatches, writer: Writer):
    """Mask of the experts that more tokens reach than their weights read, three times."""
    stream = ResidualStream(view, batches)
    stream.advance_to(DROPPED - 1)
    routing = record_writer(stream, DROPPED - 1, writer, routing=True)[2]
    counts = routing.experts.bincount(minlength=writer.experts.n_experts)
    return counts > 3 * writer.experts.width


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_changed_in_a_projection_is_put_back(
    tmp_path: Path, text: CalibrationBatches, kind: str
):
    view = load(str(save_family(tmp_path / "model", FAMILIES[KINDS[kind]])), dtype="float32")
    silence(view, DROPPED)
    dense = ResidualStream(view, text, remember=True)
    dense.advance_to(view.n_layers)
    found = find_writers(view)[DROPPED - 1]
    wanted = {"mixer": "out_proj", "shared expert": "shared_experts.down_proj"}.get(kind, "")
    writer = next(w for w in reversed(found) if w.prefix.endswith(wanted))
    name = f"{writer.prefix}.{'weight' if writer.experts is None else 'down_proj'}"
    weight = view.model.get_parameter(name)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    if writer.experts is not None:  # what no token reaches, nobody can put back
        noise[~find_busy_experts(view, text, writer)] = 0
    weight.data += 0.3 * weight.std() * noise
    before = lacking(view, text, dense)
    held_out = mask_held_out_rows(text, 8)
    dense.rewind(0)
    plan = plan_of(DROPPED, n_layers=view.n_layers)
    modules = "both" if kind == "mixer" else "down"
    # The attention in front of the projection would take a part of the damage on itself.
    refitted = refit_layers(view, plan, text, held_out, layers="cuts", modules=modules, dense=dense)
    tensors = refitted.tensors
    assert name in tensors
    with view.patched(tensors):
        after = lacking(view, text, dense)
    assert after <= LEFT.get(kind, 1e-3) * before


def test_what_a_writer_adds_is_what_the_layer_adds(tmp_path: Path):
    """The description against the layer itself, with real outputs of the projection."""
    view = load(str(save_tiny(tmp_path / "gemma2", "gemma2")), dtype="float32")
    for name, parameter in view.model.named_parameters():
        if name.endswith("post_feedforward_layernorm.weight"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(5))
    writer = find_writers(view)[2][-1]
    assert writer.norm is not None
    assert writer.norm.parameter == "model.layers.2.post_feedforward_layernorm.weight"
    assert writer.norm.offset == 1.0
    inputs = view.embed(torch.arange(12)[None])
    seen = []
    hook = writer.module.register_forward_hook(lambda _, __, z: seen.append(z.flatten(0, 1)))
    with torch.no_grad():
        whole = view.run_layer(2, inputs.hidden, inputs)
        hook.remove()
        with view.patched({f"{writer.prefix}.weight": torch.zeros_like(writer.module.weight)}):
            without = view.run_layer(2, inputs.hidden, inputs)
    torch.testing.assert_close(
        writer.write(seen[0]), (whole - without).flatten(0, 1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gemma3", {"self_attn.o_proj": "norm", "mlp.down_proj": "norm"}),
        ("granite", {"self_attn.o_proj": "factor", "mlp.down_proj": "factor"}),
        ("llama", {"self_attn.o_proj": "plain", "mlp.down_proj": "plain"}),
        ("mixtral", {"self_attn.o_proj": "plain", "mlp.experts": "plain"}),
        ("minimax", {"mlp.experts": "plain"}),
    ],
)
def test_writers_are_found_by_trying(tmp_path: Path, family: str, expected: dict[str, str]):
    view = load(str(save_family(tmp_path / family, FAMILIES[family])), dtype="float32")
    for layer, writers in enumerate(find_writers(view)):
        prefix = f"{view.layout.layers}.{layer}."
        assert {w.prefix.removeprefix(prefix): name_kind(w) for w in writers} == expected


def name_kind(writer: Writer) -> str:
    if writer.norm is not None:
        return "norm"
    return "plain" if writer.is_plain else "factor"
