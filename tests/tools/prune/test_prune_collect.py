import argparse
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from prune_models import copied, edited, tiny
from prune_text import BYTES_VOCABULARY, TEMPLATE, byte_tokenizer, write_lines

from gatewright.tools import cli
from gatewright.tools.prune import collect as collect_module
from gatewright.tools.prune.collect import DemoSums, Options, collect, describe_model, mean_to_rms, share_out
from gatewright.tools.prune.demos import Demo
from gatewright.tools.prune.loading import load_model
from gatewright.tools.prune.model import moe_blocks
from gatewright.tools.prune.statistics import STANDARD, Statistics, exponents

GROUPED = {"n_group": 2, "topk_group": 1}


def made_demos(count=6, seed=0, longest=20):
    numbers = np.random.default_rng(seed)
    return [
        Demo(
            where=f"demos.jsonl:{i + 1}",
            domain="ab"[i % 2],
            input_ids=tuple(numbers.integers(3, 64, size=numbers.integers(4, longest)).tolist()),
            answer_start=2,
        )
        for i in range(count)
    ]


def equal(first: Statistics, second: Statistics) -> bool:
    if list(first.domains) != list(second.domains) or dict(first.model) != dict(second.model):
        return False
    return all(
        np.array_equal(ours, theirs)
        for domain in first.domains
        for a, b in [(first.domains[domain], second.domains[domain])]
        for ours, theirs in [
            (a.max_norm, b.max_norm),
            (a.tokens_per_demo, b.tokens_per_demo),
            *((a.sums[name], b.sums[name]) for name in a.sums),
            *((a.per_demo[name], b.per_demo[name]) for name in a.per_demo),
        ]
    ) and np.array_equal(first.weights["aimer"], second.weights["aimer"])


# the slow reference: token by token, by the formula, each family's routing and experts written out


def mixtral_routing(block, x_TD):
    logits_TE = torch.nn.functional.linear(x_TD, block.router.weight)
    for logits_E in logits_TE:
        chances_E = torch.softmax(logits_E.float(), dim=-1)
        best = torch.topk(chances_E, block.router.top_k)
        yield best.indices.tolist(), (best.values / best.values.sum()).double()


def olmoe_routing(block, x_TD):
    logits_TE = torch.nn.functional.linear(x_TD, block.router.weight)
    for logits_E in logits_TE:
        best = torch.topk(torch.softmax(logits_E.float(), dim=-1), block.router.top_k)
        yield best.indices.tolist(), best.values.double()


def deepseek_v3_routing(block, x_TD):
    router = block.router
    # all tokens at once, as the model does: a vector's last bit depends on how many go together
    for score_E in torch.sigmoid(torch.nn.functional.linear(x_TD.float(), router.weight.float())):
        biased_E = score_E + router.e_score_correction_bias
        size = len(biased_E) // router.num_group
        worth = [sum(sorted(biased_E[g * size : (g + 1) * size].tolist())[-2:]) for g in range(router.num_group)]
        best_groups = sorted(range(router.num_group), key=lambda g: -worth[g])[: router.topk_group]
        allowed = [e for e in range(len(biased_E)) if e // size in best_groups]
        chosen = sorted(allowed, key=lambda e: -biased_E[e].item())[: router.top_k]
        gate_K = score_E[chosen]
        yield chosen, (gate_K / (gate_K.sum() + 1e-20) * router.routed_scaling_factor).double()


def llama4_routing(block, x_TD):
    logits_TE = torch.nn.functional.linear(x_TD, block.router.weight)
    score_TE = torch.sigmoid(logits_TE.float())
    for logits_E, score_E in zip(logits_TE, score_TE, strict=True):
        chosen = torch.topk(logits_E, block.router.top_k).indices.tolist()
        yield chosen, score_E[chosen].double()


def swiglu(block, expert, x_D):
    gate_up, down = block.experts.gate_up_proj[expert], block.experts.down_proj[expert]
    gate, up = (gate_up @ x_D).chunk(2)
    return down @ (torch.nn.functional.silu(gate) * up)


def swiglu_transposed(block, expert, x_D):
    gate_up, down = block.experts.gate_up_proj[expert], block.experts.down_proj[expert]
    gate, up = (x_D @ gate_up).chunk(2)
    return (torch.nn.functional.silu(gate) * up) @ down


FAMILIES = {
    "mixtral": (mixtral_routing, swiglu, {}),
    "olmoe": (olmoe_routing, swiglu, {}),
    "deepseek_v3": (deepseek_v3_routing, swiglu, GROUPED),
    "llama4_text": (llama4_routing, swiglu_transposed, {}),
}


def reference(model, family, demo, token_weight="residual"):
    """{name of a sum: [L, E]}, and the largest |u|."""
    routing, expert_output, _ = FAMILIES[family]
    blocks = moe_blocks(model)
    residuals, normed = {}, {}
    handles = [
        block.decoder.post_attention_layernorm.register_forward_hook(
            lambda module, args, output, layer=block.layer: (
                (
                    residuals.update({layer: args[0][0]}),
                    normed.update({layer: output[0]}),
                )
                and None
            )
        )
        for block in blocks
    ]
    with torch.no_grad():
        model(torch.tensor([demo.input_ids]))
    for handle in handles:
        handle.remove()
    shape = (len(blocks), blocks[0].num_experts)
    sums = {name: np.zeros(shape) for name in (*STANDARD, "0.5,2,1")}
    largest = np.zeros(shape)
    for row, block in enumerate(blocks):
        h_TD, x_TD = residuals[block.layer], normed[block.layer]
        for h_D, x_D, (experts, gates) in zip(h_TD, x_TD, routing(block, x_TD), strict=True):
            if family == "llama4_text":  # the gate multiplies what the expert reads
                summands = [expert_output(block, e, x_D * g) for e, g in zip(experts, gates, strict=True)]
                norms = [s.norm().item() / g.item() for s, g in zip(summands, gates, strict=True)]
            else:
                outputs = [expert_output(block, e, x_D) for e in experts]
                summands = [g * u for g, u in zip(gates, outputs, strict=True)]
                norms = [u.norm().item() for u in outputs]
            before = {"residual": h_D, "mlp_input": x_D, "none": None}[token_weight]
            turn = 1.0
            if before is not None:
                after = before + sum(summands)
                cosine = (before @ after / (before.norm() * after.norm())).item()
                turn = max(0.0, 1 - cosine)
            for expert, gate, norm in zip(experts, gates, norms, strict=True):
                largest[row, expert] = max(largest[row, expert], norm)
                for name in sums:
                    a, b, c = exponents(name)
                    sums[name][row, expert] += gate.item() ** a * norm**b * turn**c
    return sums, largest


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("token_weight", ["residual", "mlp_input", "none"])
def test_sums_are_those_of_a_loop_over_tokens(family, token_weight):
    with torch.no_grad():
        model = load_model(tiny(family, **FAMILIES[family][2]), dtype="float64")
        demos = made_demos(2)
        options = Options(token_weight=token_weight, exponents=((0.5, 2, 1),))
        found = collect(model, demos, options=options, progress=False)
        for demo in demos:
            sums, largest = reference(model, family, demo, token_weight)
            domain = found.domains[demo.domain]
            for name, expected in sums.items():
                np.testing.assert_allclose(domain.sums[name], expected, rtol=1e-10, atol=1e-15, err_msg=name)
            np.testing.assert_allclose(domain.max_norm, largest, rtol=1e-10)
            assert domain.sums["0,0,0"].sum() == len(demo) * len(moe_blocks(model)) * moe_blocks(model)[0].top_k
            if token_weight == "none":
                np.testing.assert_array_equal(domain.sums["1,1,1"], domain.sums["1,1,0"])


def test_only_the_answer_counts_when_asked():
    model = load_model(tiny("mixtral"), dtype="float64")
    demo = made_demos(1)[0]
    prompt = Demo(where="x:1", domain="a", input_ids=demo.input_ids[:2], answer_start=0)
    over = {
        name: collect(model, [one], options=Options(over=name), progress=False).domains["a"]
        for name, one in (("all", demo), ("answer", demo))
    }
    before = collect(model, [prompt], progress=False).domains["a"]
    assert over["answer"].tokens == len(demo) - 2 and over["all"].tokens == len(demo)
    for name in STANDARD:  # a causal model does with the prompt what it does with the prompt alone
        np.testing.assert_allclose(over["all"].sums[name], over["answer"].sums[name] + before.sums[name], rtol=1e-9)


def test_means_per_demo_take_the_length_out():
    model = load_model(tiny("olmoe"), dtype="float64")
    demos = [demo for demo in made_demos() if demo.domain == "a"]
    total = collect(model, demos, progress=False).domains["a"]
    means = collect(model, demos, options=Options(per_demo="mean-per-demo"), progress=False).domains["a"]
    expected = total.per_demo["1,1,1"] / total.tokens_per_demo[:, None, None]
    np.testing.assert_allclose(means.per_demo["1,1,1"], expected, rtol=1e-12)
    np.testing.assert_allclose(means.sums["1,1,1"], expected.sum(0), rtol=1e-12)
    assert means.tokens == total.tokens == sum(map(len, demos))


def test_bfloat16_weights_give_the_sums_of_the_same_weights_in_float32():
    folder = tiny("qwen3_moe")
    half = load_model(folder, dtype="bfloat16")
    demos = made_demos(4)
    found = collect(half, demos, progress=False).domains["a"]
    wide = collect(half.float(), demos, progress=False).domains["a"]
    assert found.sums["0,0,0"].sum() == wide.sums["0,0,0"].sum()
    share, expected = (d.sums["1,1,1"].sum() for d in (found, wide))
    assert share == pytest.approx(expected, rel=0.05) and share != expected


def test_aimer_is_the_mean_over_the_root_mean_square():
    for family in ("mixtral", "gpt_oss", "llama4_text"):
        for block in moe_blocks(load_model(tiny(family))):
            found = mean_to_rms(block)
            for expert in range(block.num_experts):
                both = [block.experts.gate_up_proj[expert], block.experts.down_proj[expert]]
                w = torch.cat([part.flatten() for part in both]).double()
                assert found[expert] == pytest.approx((w.abs().mean() / w.square().mean().sqrt()).item(), rel=1e-6)


def test_packed_weights_have_no_aimer():
    block = moe_blocks(load_model(tiny("mixtral")))[0]
    block.experts.down_proj = torch.nn.Parameter(block.experts.down_proj.to(torch.int8), requires_grad=False)
    assert mean_to_rms(block) is None


def test_the_model_is_described():
    folder = tiny("deepseek_v3", **GROUPED)
    about = describe_model(load_model(folder), folder)
    assert about["layers"] == [1, 2, 3] and about["experts_per_layer"] == [8, 8, 8]
    assert (about["num_experts"], about["top_k"], about["num_groups"], about["topk_group"]) == (8, 2, 2, 1)
    assert about["model_type"] == "deepseek_v3" and len(about["header_hash"]) == len(about["config_sha256"]) == 64


def test_a_model_in_training_mode_is_observed_without_dropout():
    model = load_model(tiny("mixtral", attention_dropout=0.5))
    demos = made_demos(2)
    expected = collect(model, demos, progress=False)
    model.train()
    model.lm_head.eval()
    assert equal(collect(model, demos, progress=False), expected)
    assert model.training and model.model.layers[0].training and not model.lm_head.training


def test_a_layer_that_runs_twice_or_not_at_all_is_told():
    demo = made_demos(1)[0]
    sums = DemoSums({0: 0, 1: 1}, 8, demo, Options())
    with pytest.raises(ValueError, match=r"MoE layers \[0, 1\] did not run"):
        sums.statistics()
    model = load_model(tiny("mixtral"))
    layers = model.model.layers
    layers.append(layers[0])
    model.config.num_hidden_layers += 1
    with pytest.raises(ValueError, match="twice"):
        collect(model, [demo], progress=False)


def test_impossible_options_are_refused():
    for options, message in [
        ({"token_weight": "norm"}, 'token_weight "norm" is not one of residual, mlp_input, none'),
        ({"per_demo": "median"}, "is not one of sum, mean-per-demo"),
        ({"over": "prompt"}, "is not one of all, answer"),
        ({"exponents": ((1, -1, 0),)}, "names no sum"),
    ]:
        with pytest.raises(ValueError, match=message):
            Options(**options)
    with pytest.raises(ValueError, match="no demonstrations"):
        collect(load_model(tiny("mixtral")), [])


# going on


def test_an_interrupted_collection_goes_on(tmp_path, monkeypatch):
    model, demos = load_model(tiny("qwen3_moe")), made_demos()
    whole = collect(model, demos, folder=tiny("qwen3_moe"), progress=False)
    journal = tmp_path / "journal"
    done = []

    def counting(self, demo, part, keep=collect_module._Parts.keep):
        if len(done) == 2:
            raise KeyboardInterrupt
        keep(self, demo, part)
        done.append(demo.where)

    monkeypatch.setattr(collect_module._Parts, "keep", counting)
    with pytest.raises(KeyboardInterrupt):
        collect(model, demos, folder=tiny("qwen3_moe"), journal=journal, progress=False)
    monkeypatch.undo()
    ran = []

    def noting(rows, experts, demo, options):
        ran.append(demo.where)
        return DemoSums(rows, experts, demo, options)

    monkeypatch.setattr(collect_module, "DemoSums", noting)
    found = collect(model, demos, folder=tiny("qwen3_moe"), journal=journal, progress=False)
    assert ran == [demo.where for demo in demos[2:]]
    assert equal(found, whole)


def test_the_journal_of_another_collection_is_not_taken(tmp_path):
    model, demos = load_model(tiny("mixtral")), made_demos(2)
    collect(model, demos, journal=tmp_path, progress=False)
    for other, options in ((model, Options(over="answer")), (load_model(tiny("olmoe")), Options())):
        alone = collect(other, demos, options=options, progress=False)
        assert equal(collect(other, demos, options=options, journal=tmp_path, progress=False), alone)


def test_the_same_line_twice_counts_twice(tmp_path):
    model, demos = load_model(tiny("mixtral")), made_demos(2)
    twice = collect(model, [*demos, demos[0]], journal=tmp_path, progress=False).domains["a"]
    once = collect(model, demos, progress=False).domains["a"]
    assert twice.demos == 2 and np.array_equal(twice.sums["1,1,1"], 2 * once.sums["1,1,1"])


KILLED = """
import os, signal, sys
from gatewright.tools import cli
from gatewright.tools.prune import collect

keep, done = collect._Parts.keep, []

def dying(self, demo, part):
    if len(done) == 3:  # in the middle of writing the fourth
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    keep(self, demo, part)
    done.append(demo)

collect._Parts.keep = dying
sys.exit(cli.main(sys.argv[1:]))
"""


def test_killed_and_resumed_is_as_never_killed(tmp_path):
    lines = [{"input_ids": list(demo.input_ids), "domain": demo.domain} for demo in made_demos(7)]
    file = write_lines(tmp_path / "demos.jsonl", *lines)
    command = ["prune", "collect", str(tiny("qwen3_moe")), "--demos", str(file), "--device", "cpu", "--out"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *command, str(tmp_path / "stats")], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    journal = tmp_path / "stats.journal"
    assert len(list(journal.glob("*.safetensors"))) == 3 + 1 and not (tmp_path / "stats").exists()
    assert cli.main([*command, str(tmp_path / "stats")]) == 0
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    assert (tmp_path / "stats").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not journal.exists()


# several processes


def test_demonstrations_are_shared_by_their_tokens():
    assert share_out([5, 1, 9, 4, 3], 1) == [0] * 5
    assert share_out([5, 1, 9, 4, 3], 2) == [1, 1, 0, 1, 0]
    assert share_out([7], 3) == [0]


def collect_on_ranks(folder, journal):
    found = collect(load_model(folder), made_demos(), folder=folder, journal=journal, progress=False)
    return None if found is None else found.sha256


@pytest.fixture
def one_thread():
    """As the processes of ``ranks`` have: products over several threads may differ in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.distributed
@pytest.mark.usefixtures("one_thread")
def test_two_processes_find_what_one_finds(ranks, tmp_path):
    folder = tiny("glm4_moe")
    alone = collect(load_model(folder), made_demos(), folder=folder, progress=False)
    expected = alone.sha256
    assert ranks(2).run(collect_on_ranks, folder, None) == [expected, None]
    journal = tmp_path / "journal"
    assert ranks(2).run(collect_on_ranks, folder, journal) == [expected, None]
    again = collect(load_model(folder), made_demos(), folder=folder, journal=journal, progress=False)
    assert equal(again, alone)


# the command line


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A tiny checkpoint with a tokenizer of bytes and a chat template."""
    folder = copied(
        tiny("qwen3_moe", vocab_size=BYTES_VOCABULARY, max_position_embeddings=96),
        tmp_path_factory.mktemp("speaking") / "model",
    )
    byte_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


def command(*argv):
    return cli.main(["prune", "collect", *map(str, argv), "--device", "cpu"])


def test_the_command_collects_two_domains(speaking, tmp_path, capsys):
    maths = write_lines(tmp_path / "maths.jsonl", *({"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(5)))
    prose = write_lines(tmp_path / "prose.jsonl", *({"text": "word " * i} for i in range(1, 4)))
    out = tmp_path / "stats"
    argv = [speaking, "--demos", maths, "--domain", "m", "--demos", prose, "--domain", "p", "--out", out]
    assert command(*argv, "--exponents", "2,1,0", "--over", "answer") == 0
    found = Statistics.load(out)
    assert list(found.domains) == ["m", "p"] and found.domains["m"].demos == 5 and found.domains["p"].demos == 3
    assert found.options["over"] == "answer" and "2,1,0" in found.domains["m"].sums
    assert found.domains["m"].tokens == 5 * 2 and found.model["name"] == "model"
    printed, said = capsys.readouterr()
    assert "m: 5 demonstrations, 10 tokens" in printed
    assert 'domain "p" has 3 demonstrations' in said and "the first demonstration (" in said
    assert command(*argv) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_model_writes_missing_answers_itself(speaking, tmp_path, capsys):
    file = write_lines(tmp_path / "d.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"text": "c" * 9})
    argv = [speaking, "--demos", file, "--answer-tokens", 5, "--temperature", 0, "--quiet"]
    assert command(*argv, "--out", tmp_path / "one") == 0
    said = capsys.readouterr().err
    assert "2 of 3 demonstrations have no answer" in said and "1 more need about" in said
    kept = [json.loads(line) for line in (tmp_path / "d.answers.jsonl").read_text().splitlines()]
    assert len(kept) == 2 and all(len(one["answer_ids"]) <= 5 for one in kept)
    assert command(*argv, "--out", tmp_path / "two") == 0
    assert "have no answer" not in capsys.readouterr().err
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    prompt = len("[user]a[assistant]")
    lengths = Statistics.load(tmp_path / "one").domains["d"].tokens_per_demo.tolist()
    assert lengths == [prompt + len(kept[0]["answer_ids"]), prompt + len(kept[1]["answer_ids"]), 9]


def test_bad_demonstrations_are_told_before_the_model_is_loaded(speaking, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(collect_module, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    for record, message in [
        ({"text": ""}, 'd.jsonl:2: "text" is empty'),
        ({"input_ids": [5, 400]}, "d.jsonl:2: token id 400"),
        ({"text": "x" * 97}, "d.jsonl:2: 97 tokens, but the model's context is 96"),
        ({"prompt": "x", "answer": "<|x"}, None),
    ]:
        file = write_lines(tmp_path / "d.jsonl", {"text": "fine"}, record)
        if message is not None:
            assert command(speaking, "--demos", file, "--out", tmp_path / "stats") == 2
            assert message in capsys.readouterr().err
    file = write_lines(tmp_path / "d.jsonl", {"prompt": "no answer"})
    assert command(speaking, "--demos", file, "--out", tmp_path / "stats", "--layerwise") == 2
    assert "d.jsonl:1: no answer" in capsys.readouterr().err
    assert not list(tmp_path.glob("stats*"))


def test_what_is_no_moe_checkpoint_is_refused_before_it_is_loaded(speaking, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(collect_module, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    from transformers import LlamaConfig, LlamaForCausalLM

    file = write_lines(tmp_path / "d.jsonl", {"input_ids": [5, 6, 7]})
    dense = tmp_path / "dense"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(dense)
    empty = tmp_path / "empty"
    empty.mkdir()
    unknown = edited(copied(speaking, tmp_path / "unknown"), model_type="gpt_of_tomorrow")
    for model, message in [
        (tmp_path / "org/name", "nothing is fetched from a hub: download"),
        (empty, "has no config.json"),
        (unknown, 'does not load model_type "gpt_of_tomorrow"'),
        (dense, "llama"),
    ]:
        assert command(model, "--demos", file, "--out", tmp_path / "stats") == 2
        assert message in capsys.readouterr().err
    assert command(speaking, "--demos", file, "--out", tmp_path / "none" / "stats") == 2
    assert "is no folder: make it first" in capsys.readouterr().err
    assert command(speaking, "--demos", file, "--out", tmp_path / "stats", "--tokens-at-once", "0") == 2
    assert "--tokens-at-once 0" in capsys.readouterr().err
    assert not (tmp_path / "stats").exists()


def test_a_run_takes_no_options_of_checkpoints(tmp_path):
    parser = argparse.ArgumentParser()
    collect_module.add_arguments(parser)
    for option in (["--layerwise"], ["--over", "answer"], ["--endpoint", "http://x"], ["--exponents", "1,2,3"]):
        args = parser.parse_args(["run", "--demos", "d", "--out", "s", *option])
        with pytest.raises(ValueError, match=f"{option[0]} is for checkpoints"):
            collect_module.refuse_changed(
                args, collect_module.add_arguments, ["--demos", "-", "--out", "-"], ("demos", "out")
            )
