"""Experts as separate linears: they compute what the stacked module of transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.longcat_flash.modeling_longcat_flash import (
    LongcatFlashConfig,
    LongcatFlashExperts,
)
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

from gptq_cli.models import experts as experts_module
from gptq_cli.models.experts import (
    DOWN,
    GATE_UP,
    Experts,
    Routed,
    StackShape,
    computes_the_same,
    find_stacks,
)
from tests.architectures import build, relative, streamed_logits, token_batches
from tests.families import save

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4}
LONGCAT = {"hidden_size": 32, "n_routed_experts": 3, "zero_expert_num": 2}


def mixtral_experts() -> MixtralExperts:
    config = MixtralConfig(**SIZES)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    return experts.requires_grad_(False)


def separated(kind: nn.Module) -> Experts:
    shape = StackShape.of(kind)
    assert shape is not None
    experts = Experts(kind)
    for name in (GATE_UP, DOWN):
        for number, part, piece in shape.slices(name, name):
            weight = nn.Parameter(piece.read(kind.get_parameter), requires_grad=False)
            experts[number].get_submodule(part)._parameters["weight"] = weight
    return experts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model_type",
    [
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "gpt_oss",
        "inkling2_text",
        "llama4_text",
        "longcat_flash",
        "nemotron_h",
    ],
)
def test_separated_experts_give_the_logits_of_stacked_ones(model_type: str, tmp_path: Path) -> None:
    directory = save(build(model_type), tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    with torch.inference_mode():
        expected = [whole(input_ids=ids, use_cache=False).logits for ids in token_batches()]
    assert relative(streamed_logits(directory), expected) < 1e-6


def test_expert_gets_its_tokens_in_order_of_the_stacked_module() -> None:
    experts = separated(mixtral_experts())
    chosen = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]])
    rows = [mine.tolist() for mine in experts.rows(Routed(torch.zeros(4, 32), chosen))]
    assert rows == [[0, 2, 3], [1, 2], [1, 3, 0], []]
    zeros_but = torch.zeros(4, 3, 32)
    zeros_but[0, 1], zeros_but[2, 0], zeros_but[2, 2] = 1, 1, -1
    rows = [mine.tolist() for mine in experts.rows(Routed(zeros_but.view(12, 32)))]
    assert rows == [[1], [], [6, 8], []]


def test_token_may_choose_the_same_expert_twice() -> None:
    kind = mixtral_experts()
    tokens, chosen, weights = torch.randn(5, 32), torch.full((5, 2), 3), torch.rand(5, 2)
    assert torch.allclose(
        separated(kind)(tokens, chosen, weights), kind(tokens, chosen, weights), atol=1e-6
    )


def test_module_with_another_computation_is_not_separated() -> None:
    class Louder(MixtralExperts):
        def forward(self, *args: Tensor) -> Tensor:
            return 1.01 * super().forward(*args)

    kind = mixtral_experts()
    assert computes_the_same(kind)
    other = Louder(kind.config)
    assert StackShape.of(other) == StackShape.of(kind)
    assert not computes_the_same(other)
    holder = nn.ModuleDict({"plain": kind, "louder": other, "again": mixtral_experts()})
    assert set(find_stacks(holder)) == {"plain", "again"}


def both_ways(
    experts: Experts, tokens: Tensor, chosen: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the outputs that the experts add one by one, and together."""
    outputs = []
    for add in (experts._add_one_by_one, experts._add_together):
        output = torch.zeros_like(tokens)
        flat = None if weights is None else weights.T.flatten()
        add(output, Routed(tokens, chosen), flat)
        outputs.append(output)
    return outputs[0], outputs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", [[[0, 2], [2, 1], [0, 1], [3, 3], [2, 0]], [[1, 9], [9, 0]]])
def test_experts_together_add_the_bits_of_experts_one_by_one(
    dtype: torch.dtype, chosen: list[list[int]]
) -> None:
    experts = separated(mixtral_experts()).to(dtype)
    tokens = torch.randn(len(chosen), 32, dtype=dtype)
    weights = torch.rand(len(chosen), 2, dtype=dtype)
    alone, together = both_ways(experts, tokens, torch.tensor(chosen), weights)
    assert alone.abs().min() > 0
    assert torch.equal(alone, together)


def test_experts_with_rows_of_their_own_add_the_same_together() -> None:
    tokens = torch.randn(4, 3, 32)
    tokens[0, 1], tokens[2, 0], tokens[3] = 0, 0, 0
    alone, together = both_ways(separated(mixtral_experts()), tokens.view(12, 32), None, None)
    assert alone[1].abs().max() == 0 < alone[0].abs().max()
    assert torch.equal(alone, together)


def test_experts_with_biases_add_the_same_together(gpt_oss_experts: GptOssExperts) -> None:
    chosen = torch.tensor([[0, 2], [2, 1], [0, 1]])
    experts = separated(gpt_oss_experts)
    alone, together = both_ways(experts, torch.randn(3, 32), chosen, torch.rand(3, 2))
    torch.testing.assert_close(alone, together, rtol=0, atol=0)


def grouped(
    experts: Experts, places: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Lay the weights of the experts in each list one after the other, as on a device.

    Let the processor compute as a device with grouped products; return their numbers of experts.
    """
    for together in places:
        for parts in (experts._first, [DOWN]):
            old = [weight for number in together for weight in experts._weights(parts, number)]
            rows = torch.cat(old).split(len(old[0]))
            slots = [(number, part) for number in together for part in parts]
            for (number, part), weight in zip(slots, rows, strict=True):
                linear = experts[number].get_submodule(part)
                linear.weight = nn.Parameter(weight, requires_grad=False)
    product, seen = torch._grouped_mm, []

    def noted(tokens: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
        seen.append(len(weights))
        return product(tokens, weights, offs=offs)

    monkeypatch.setattr(torch, "_grouped_mm", noted)
    monkeypatch.setattr(experts_module, "_has_grouped_products", lambda *_: True)
    return seen


@pytest.mark.parametrize(
    ("places", "products"),
    [
        ([[0, 1, 2, 3]], [4, 4]),
        ([[0, 1], [2, 3]], [2, 2, 2, 2]),
        ([[2, 3]], [2, 2]),
        ([[0, 1], [3, 2]], [2, 2]),
    ],
    ids=str,
)
def test_experts_that_follow_each_other_in_memory_take_one_product(
    places: list[list[int]], products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = separated(mixtral_experts()).to(torch.bfloat16)
    seen = grouped(experts, places, monkeypatch)
    chosen = torch.tensor([[0, 2], [2, 3], [0, 3], [3, 9], [2, 0]])
    tokens = torch.randn(5, 32, dtype=torch.bfloat16)
    alone, together = both_ways(experts, tokens, chosen, torch.rand(5, 2, dtype=torch.bfloat16))
    assert torch.equal(alone, together)
    assert seen == products


def test_experts_that_are_laid_out_take_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = separated(mixtral_experts()).to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in experts.named_parameters()}
    seen = grouped(experts, [], monkeypatch)
    experts.lay_out()
    assert list(before) == [name for name, _ in experts.named_parameters()]
    for name, weight in experts.named_parameters():
        assert torch.equal(weight, before[name])
    chosen = torch.tensor([[0, 2], [2, 3], [0, 3], [3, 9], [2, 0]])
    tokens = torch.randn(5, 32, dtype=torch.bfloat16)
    alone, together = both_ways(experts, tokens, chosen, torch.rand(5, 2, dtype=torch.bfloat16))
    assert torch.equal(alone, together)
    assert seen == [4, 4]


def test_experts_on_a_processor_keep_their_memory() -> None:
    experts = separated(mixtral_experts()).to(torch.bfloat16)
    before = [weight.data_ptr() for weight in experts.parameters()]
    experts.lay_out()
    assert [weight.data_ptr() for weight in experts.parameters()] == before


def test_interleaved_experts_with_biases_take_one_product(
    gpt_oss_experts: GptOssExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = separated(gpt_oss_experts)
    seen = grouped(experts, [[0, 1, 2, 3]], monkeypatch)
    chosen = torch.tensor([[0, 2], [2, 1], [0, 1]])
    alone, together = both_ways(experts, torch.randn(3, 32), chosen, torch.rand(3, 2))
    torch.testing.assert_close(alone, together, rtol=0, atol=0)
    assert seen == [4, 4]


def test_inputs_of_down_proj_are_those_of_each_expert_alone(
    gpt_oss_experts: GptOssExperts,
) -> None:
    counts = [2, 0, 5]
    for kind in (gpt_oss_experts, mixtral_experts()):
        experts, tokens = separated(kind), torch.randn(7, 32)
        found = experts.intermediates([3, 1, 0], tokens, counts).split(counts)
        for number, given, mine in zip([3, 1, 0], tokens.split(counts), found, strict=True):
            torch.testing.assert_close(mine, experts.intermediate(number, given))


@pytest.fixture
def gpt_oss_experts() -> GptOssExperts:
    config = GptOssConfig(**SIZES)
    config._experts_implementation = "eager"
    kind = GptOssExperts(config)
    for parameter in kind.requires_grad_(False).parameters():
        nn.init.normal_(parameter, std=0.2)
    return kind


def test_shape_of_interleaved_experts_with_biases_is_found(gpt_oss_experts: GptOssExperts) -> None:
    shape = StackShape.of(gpt_oss_experts)
    assert shape is not None
    assert (shape.turned, shape.interleaved, shape.biased) == (True, True, True)
    assert computes_the_same(gpt_oss_experts)
    assert StackShape.of(nn.Linear(2, 2)) is None


def test_interleaved_gate_and_up_are_separated(gpt_oss_experts: GptOssExperts) -> None:
    kind, experts = gpt_oss_experts, separated(gpt_oss_experts)
    assert torch.equal(experts[3].gate_proj.weight, kind.gate_up_proj[3].T[0::2])
    assert torch.equal(experts[3].up_proj.weight, kind.gate_up_proj[3].T[1::2])
    assert torch.equal(experts[3].down_proj.weight, kind.down_proj[3].T)


def test_separated_experts_with_biases_compute_the_same(gpt_oss_experts: GptOssExperts) -> None:
    kind, experts = gpt_oss_experts, separated(gpt_oss_experts)
    tokens, chosen, weights = torch.randn(5, 32), torch.randint(4, (5, 2)), torch.rand(5, 2)
    assert torch.allclose(
        experts(tokens, chosen, weights), kind(tokens, chosen, weights), atol=1e-5
    )


def test_choice_beyond_the_experts_passes_the_token_through() -> None:
    kind = LongcatFlashExperts(LongcatFlashConfig(expert_ffn_hidden_size=48, **LONGCAT))
    for parameter in kind.requires_grad_(False).parameters():
        nn.init.normal_(parameter, std=0.2)
    assert computes_the_same(kind)
    experts = separated(kind)
    assert (experts.n_experts, experts.n_choices) == (3, 5)
    tokens, weights = torch.randn(4, 32), torch.rand(4, 2)
    chosen = torch.tensor([[0, 3], [4, 3], [1, 2], [4, 0]])
    assert torch.allclose(
        experts(tokens, chosen, weights), kind(tokens, chosen, weights), atol=1e-6
    )
    assert torch.allclose(
        experts(tokens, chosen, weights)[1], tokens[1] * weights[1].sum(), atol=1e-6
    )
    assert [len(mine) for mine in experts.rows(Routed(tokens, chosen))] == [2, 1, 1]
