"""What a transformers model's MoE layers are seen to do, held to what they can be seen to do otherwise."""

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from prune_models import THIRTEEN  # noqa: E402

from gatewright.tools.prune.families import FAMILIES  # noqa: E402
from gatewright.tools.prune.families_table import read_table  # noqa: E402
from gatewright.tools.prune.model import moe_blocks, observe, token_contribution  # noqa: E402
from gatewright.tools.prune.tiny import EXPERTS, HIDDEN, VOCABULARY, tiny_model  # noqa: E402

SHARED = ("shared_expert", "shared_experts", "shared_mlp")
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def observed(model, ids=IDS, **options):
    found = []
    with torch.inference_mode(), observe(model, found.append, **options):
        model(input_ids=ids)
    return found


def shared_output(block, x_TD):
    """The shared expert's part of a block's output, from its own modules."""
    holder = block.holder
    shared = next((getattr(holder, name) for name in SHARED if getattr(holder, name, None) is not None), None)
    if shared is None:
        return torch.zeros_like(x_TD)
    gate = getattr(holder, "shared_expert_gate", None)
    return shared(x_TD) * (torch.sigmoid(gate(x_TD)) if gate is not None else 1)


class Watched:
    """The decoder layers' outputs, and what experts and routers were called with and gave."""

    def __init__(self, model):
        self.blocks, self.layer_output, self.calls, self.routers, self.handles = moe_blocks(model), {}, {}, {}, []
        for block in self.blocks:

            def layer_ran(module, args, output, layer=block.layer):
                self.layer_output[layer] = output[0] if isinstance(output, tuple) else output

            def experts_ran(module, args, kwargs, output, layer=block.layer):
                self.calls[layer] = ((*args, *kwargs.values()), output)

            def router_ran(module, args, output, layer=block.layer):
                self.routers[layer] = output

            self.handles += [
                block.decoder.register_forward_hook(layer_ran),
                block.experts.register_forward_hook(experts_ran, with_kwargs=True),
                block.router.register_forward_hook(router_ran),
            ]

    def remove(self):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("family", THIRTEEN)
def test_what_is_observed_adds_up_to_the_layers_output(family):
    model = tiny_model(family)
    watched = Watched(model)
    found = observed(model)
    watched.remove()
    assert [one.layer for one in found] == [block.layer for block in watched.blocks]
    for one, block in zip(found, watched.blocks, strict=True):
        T, K = IDS.numel(), block.top_k
        assert one.shape == tuple(IDS.shape) and one.index.shape == one.gate.shape == (T, K)
        assert one.index.dtype == torch.int64 and one.gate.dtype == torch.float32
        assert one.hidden_before.shape == one.mlp_input.shape == one.routed_output.shape == (T, HIDDEN)
        with torch.inference_mode():
            shared = shared_output(block, one.mlp_input)
        if family == "minimax":
            shared = shared * block.decoder.mlp_beta_factor
        whole = one.hidden_before + one.routed_output + shared
        torch.testing.assert_close(whole, watched.layer_output[block.layer].view(T, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", [name for name in THIRTEEN if name != "llama4_text"])
def test_norms_are_those_of_what_each_slot_adds(family):
    """A slot's summand is what the experts give when every other slot's gate is 0."""
    model = tiny_model(family)
    watched = Watched(model)
    found = observed(model)
    watched.remove()
    for one, block in zip(found, watched.blocks, strict=True):
        (x_TD, index_TK, gate_TK), routed_TD = watched.calls[block.layer]
        assert torch.equal(one.index, index_TK) and torch.equal(one.gate, gate_TK.float())
        assert torch.equal(watched.routers[block.layer][2], index_TK)
        summed = 0
        with torch.inference_mode():
            for slot in range(block.top_k):
                alone = torch.zeros_like(gate_TK)
                alone[:, slot] = gate_TK[:, slot]
                summand_TD = block.experts(x_TD, index_TK, alone)
                summed = summed + summand_TD
                torch.testing.assert_close(one.summand_norm[:, slot], summand_TD.norm(dim=-1), rtol=1e-4, atol=1e-6)
        scale = block.decoder.mlp_beta_factor if family == "minimax" else 1
        torch.testing.assert_close(one.routed_output, summed * scale, rtol=1e-4, atol=1e-5)
        assert one.output_norm.min() > 0


def test_llama4_gates_the_input_and_its_norms_are_of_the_actual_summands():
    model = tiny_model("llama4_text")
    watched = Watched(model)
    found = observed(model)
    watched.remove()
    for one, block in zip(found, watched.blocks, strict=True):
        scores_TE, logits_TE = watched.routers[block.layer]
        torch.testing.assert_close(one.gate, logits_TE.gather(1, one.index).sigmoid())
        assert torch.equal((scores_TE > 0).sum(1), torch.full((IDS.numel(),), block.top_k))
        experts = block.experts
        for token in range(0, IDS.numel(), 5):
            for slot in range(block.top_k):
                expert = one.index[token, slot]
                x = one.mlp_input[token] * one.gate[token, slot]
                gate, up = (x @ experts.gate_up_proj[expert]).chunk(2)
                summand = (up * experts.act_fn(gate)) @ experts.down_proj[expert]
                torch.testing.assert_close(one.summand_norm[token, slot], summand.norm(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_experts_implementation_gives_the_same_observation(implementation):
    reference, model = tiny_model("gpt_oss"), tiny_model("gpt_oss")
    reference.set_experts_implementation("eager")
    model.set_experts_implementation(implementation)
    for want, got in zip(observed(reference), observed(model), strict=True):
        assert torch.equal(want.index, got.index)
        torch.testing.assert_close(want.output_norm, got.output_norm, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(want.routed_output, got.routed_output, rtol=1e-4, atol=1e-6)


def test_norms_are_taken_a_few_tokens_at_a_time(monkeypatch):
    model = tiny_model("qwen3_moe")
    want = observed(model)
    monkeypatch.setattr("gatewright.tools.prune.model._PAIR_BYTES", 4 * 2 * HIDDEN * 4)  # four tokens
    for one, other in zip(want, observed(model), strict=True):
        torch.testing.assert_close(one.output_norm, other.output_norm, rtol=1e-5, atol=1e-7)


def test_float64_stays_float64():
    model = tiny_model("qwen3_moe").double()
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    one = observed(model)[0]
    assert one.gate.dtype == one.output_norm.dtype == torch.float64
    assert token_contribution(one.hidden_before, one.hidden_before + one.routed_output).dtype == torch.float64


def test_only_the_layers_asked_for_and_nothing_is_left_behind():
    model = tiny_model("qwen3_moe")
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert [one.layer for one in observed(model, layers={2})] == [2]

    def fails(observation):
        raise KeyError("stop")

    with pytest.raises(KeyError), torch.inference_mode(), observe(model, fails):
        model(input_ids=IDS)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_token_contribution_is_one_minus_the_cosine_and_never_negative():
    generator = torch.Generator().manual_seed(1)
    before, after = torch.randn(50, 8, generator=generator), torch.randn(50, 8, generator=generator)
    got = token_contribution(before, after)
    for row in range(50):
        a, b = before[row].tolist(), after[row].tolist()
        cosine = sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
        assert got[row].item() == pytest.approx(1 - cosine, abs=1e-6)
    assert token_contribution(before, 3 * before).min() >= 0
    near = before.bfloat16()  # in bfloat16 the difference of a near copy would be lost
    assert token_contribution(near, near.float() * (1 + 1e-3 * after)).max() > 0


def test_the_norm_behind_the_block_is_followed():
    """Where an RMS norm follows the block, r is the routed part of that norm's output."""
    model = tiny_model("kolibri1")
    watched = Watched(model)
    found = observed(model)
    watched.remove()
    for one, block in zip(found, watched.blocks, strict=True):
        with torch.inference_mode():
            shared = shared_output(block, one.mlp_input)
            routed = watched.calls[block.layer][1]
            norm = block.decoder.post_mlp_layernorm
            scale = (routed + shared).pow(2).mean(-1, keepdim=True).add(model.config.rms_norm_eps).rsqrt()
            torch.testing.assert_close(one.routed_output, routed * scale * norm.weight, rtol=1e-4, atol=1e-5)
            whole = one.hidden_before + norm(routed + shared)
            torch.testing.assert_close(whole, watched.layer_output[block.layer].view_as(whole), rtol=1e-4, atol=1e-5)


# Where taking the experts away changes more than the routed part: a norm behind the sum with the shared expert,
# streams instead of one residual, convolutions and learned scales behind the block.
NOT_LINEAR = ("afmoe", "axk1", "gemma4", "kolibri1")
STREAMS = ("glm5_next", "hy_v4", "qwen4_exp")
RESCALED = ("beam", "inkling", "inkling2", "muse_spark", "zaya")


@pytest.mark.evidence
@pytest.mark.parametrize("family", [proof.family for proof in read_table()[1] if not proof.refusal])
def test_the_routed_output_is_what_a_layer_lacks_without_its_experts(family):
    model = tiny_model(next(proof.model_type for proof in read_table()[1] if proof.family == family))
    found = observed(model)
    for one, block in zip(found, moe_blocks(model), strict=True):
        assert torch.all(one.routed_output.norm(dim=-1) <= one.summand_norm.sum(-1) * (1 + 1e-4))
        outputs = []
        hook = block.decoder.register_forward_hook(
            lambda module, args, output, kept=outputs: kept.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.inference_mode():
            model(input_ids=IDS)
            without = block.experts.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
            model(input_ids=IDS)
        hook.remove(), without.remove()
        lacking = (outputs[0] - outputs[1]).flatten(0, -2)
        if family in STREAMS:
            assert lacking.numel() > one.routed_output.numel()
        elif family in NOT_LINEAR + RESCALED:
            assert torch.nn.functional.cosine_similarity(lacking, one.routed_output).min() > 0.5
        else:
            torch.testing.assert_close(one.routed_output, lacking, rtol=1e-3, atol=1e-4)


def test_factors_projections_and_skips_of_other_families():
    beam = tiny_model("laguna", moe_routed_scaling_factor=2.5)
    watched = Watched(beam)
    one = observed(beam)[0]
    watched.remove()
    torch.testing.assert_close(one.gate, watched.calls[one.layer][0][2].float() * 2.5)
    latent = tiny_model("nemotron_h", moe_latent_size=16)
    one = observed(latent)[0]
    assert one.routed_output.shape == (IDS.numel(), HIDDEN)
    assert torch.all(one.routed_output.norm(dim=-1) <= one.summand_norm.sum(-1) * (1 + 1e-5))
    skipping = tiny_model("zaya")
    with torch.no_grad():
        for block in moe_blocks(skipping):
            block.router.balancing_biases[:] = 0
            block.router.router_mlp.out_proj.weight *= 30
    seen = observed(skipping)
    nowhere = torch.cat([one.index < 0 for one in seen])
    assert nowhere.any() and not nowhere.all()
    assert torch.equal(nowhere, torch.cat([one.gate == 0 for one in seen]))


def test_memory_paths_name_what_is_there():
    for name, family in FAMILIES.items():
        memory = family.memory
        if name not in ("minimax", "granitemoe", "laguna", "openai_privacy_filter"):
            continue
        block = moe_blocks(tiny_model(name))[0]
        for path in (*memory.gate_factors, *memory.residual_factors, *filter(None, [memory.before_factor])):
            owner, _, attribute = path.partition(".")
            assert isinstance(getattr({"block": block.holder, "layer": block.decoder}[owner], attribute), int | float)


def test_what_cannot_be_listened_to_is_refused_by_name():
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM .llama. has no MoE block"):
        moe_blocks(dense)
    with pytest.raises(ValueError, match="no model of transformers"):
        moe_blocks(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="hash-routed"):
        moe_blocks(tiny_model("deepseek_v4", mlp_layer_types=["hash_moe", "moe", "moe", "moe"]))
    with pytest.raises(ValueError, match="two banks of experts"):
        moe_blocks(tiny_model("diffusion_gemma"))
    spread = tiny_model("qwen3_moe")
    spread.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="spread over devices"):
        moe_blocks(spread)
    between = tiny_model("qwen3_moe")
    between.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    with pytest.raises(ValueError, match="residual stream before the norm cannot be found"):
        observed(between)


def test_groups_and_counts_are_read_from_the_router():
    block = moe_blocks(tiny_model("deepseek_v3", n_group=4, topk_group=2))[0]
    assert (block.num_experts, block.top_k, block.num_groups, block.topk_group) == (EXPERTS, 2, 4, 2)
    greedy = moe_blocks(tiny_model("deepseek_v2", n_group=4, topk_group=2, topk_method="greedy"))[0]
    assert (greedy.num_groups, greedy.topk_group) == (1, 1)
