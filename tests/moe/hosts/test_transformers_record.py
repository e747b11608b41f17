"""Recording transformers' own MoE families: what the experts were really given is what is counted."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from gatewright.moe import ExpertSpec, MoELayer  # noqa: E402
from gatewright.moe.hosts.transformers_record import RoutingCallback, TransformersRecorder  # noqa: E402
from gatewright.moe.record import Recorder  # noqa: E402
from gatewright.moe.record_log import read_log  # noqa: E402
from gatewright.routers import create_router  # noqa: E402

VOCABULARY, EXPERTS = 64, 6
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8}
SIGMOID = ("DeepseekV3",)


def make(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    two = {"num_experts_per_tok": 2}
    options = {
        "Mixtral": {**two, "num_local_experts": EXPERTS},
        "Qwen2Moe": {**two, "num_experts": EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "Qwen3Moe": {**two, "num_experts": EXPERTS, "moe_intermediate_size": 16, "head_dim": 8},
        "Olmoe": {**two, "num_experts": EXPERTS},
        "GptOss": {**two, "num_local_experts": EXPERTS, "head_dim": 8},
        "DeepseekV3": {
            **two, **LATENT, "n_routed_experts": EXPERTS, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
            "first_k_dense_replace": 0,
        },
        "Llama4Text": {
            "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 32,
        },
    }[family]  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**SMALL, **options)
    if family == "Llama4Text":
        return transformers.Llama4ForCausalLM(config)
    return transformers.AutoModelForCausalLM.from_config(config)


def inputs(seed: int, batch: int = 2, padding: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (batch, 10), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 10 - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


class Oracle:
    """What every layer's experts were called with, read off from them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen: list[list[torch.Tensor]] = []
        for module in model.modules():
            experts = getattr(module, "experts", None)
            if isinstance(experts, torch.nn.Module):
                self.seen.append([])
                experts.register_forward_pre_hook(self._listener(len(self.seen) - 1, module))

    def _listener(self, layer: int, parent: torch.nn.Module):
        def listen(module, args):
            if len(args) == 1:
                # Llama 4 runs every expert on every token, scaled by 0 where it is not chosen
                chosen = args[0].view(EXPERTS, -1, args[0].shape[-1]).abs().sum(-1).T
                self.seen[layer].append(chosen.argmax(-1, keepdim=True))
            else:
                self.seen[layer].append(next(a for a in args if not a.is_floating_point()))

        return listen

    def counts(self, real: list[torch.Tensor]) -> np.ndarray:
        """[L, E], of the first forwards, one a mask."""
        per_layer = []
        for seen in self.seen:
            kept = torch.cat([ids[mask.flatten().bool()] for ids, mask in zip(seen, real, strict=False)])
            per_layer.append(torch.bincount(kept.flatten(), minlength=EXPERTS))
        return torch.stack(per_layer).numpy()


FAMILIES = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GptOss", "DeepseekV3", "Llama4Text")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_experts_were_given_is_counted(family, tmp_path):
    """Accumulated micro-batches with padding; the same under gradient checkpointing of either kind."""
    batches = [inputs(0), inputs(1, padding=5)]
    windows, oracle = [], None
    for kind in (None, False, True):
        model = make(family)
        model.train()
        if kind is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
            # what the reentrant kind needs to have a gradient at all
            model.enable_input_require_grads()
        oracle = oracle or Oracle(model)
        with TransformersRecorder(model, tmp_path / str(kind), every=1, sample=0, sample_every=1) as recorder:
            for batch in batches:
                model(**batch).loss.backward()
            recorder.step(0)
            windows.append(recorder.window)
    plain = windows[0]
    k = 1 if family == "Llama4Text" else 2
    assert plain.tokens.tolist() == plain.sampled.tolist() == [40 - 8] * 2
    assert np.array_equal(plain.counts, oracle.counts([batch["attention_mask"] for batch in batches]))
    assert plain.counts.sum(1).tolist() == [32 * k] * 2
    assert recorder._sigmoid == [family in SIGMOID or family == "Llama4Text"] * 2
    for window in windows[1:]:
        assert np.array_equal(window.counts, plain.counts)
        assert np.allclose(window.entropy_sum, plain.entropy_sum, rtol=1e-4)
    log = read_log(tmp_path / "None")
    assert log.layers[0].experts == EXPERTS and log.layers[0].top_k == k and "layers.0" in log.layers[0].name


def test_scores_of_sigmoids_without_the_bias(tmp_path):
    """DeepSeek-V3: shares of sigmoids; the bias steers the choice and is no opinion of the router."""
    model = make("DeepseekV3")
    router = model.model.layers[0].mlp.gate
    router.e_score_correction_bias[:2] += 10
    with TransformersRecorder(model, tmp_path, every=1, sample=0) as recorder:
        model.train()
        hidden = []
        router.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        model(**inputs(0, padding=0))
        recorder.step(0)
    scores = (hidden[0].reshape(-1, 32) @ router.weight.T).sigmoid()
    scores = scores / scores.sum(-1, keepdim=True)
    assert np.allclose(recorder.window.score_sum[0], scores.sum(0).detach(), rtol=1e-4)
    # both favoured experts are of one group of three
    assert recorder.window.counts[0].tolist() == [20, 20, 0, 0, 0, 0]


def test_evaluation_and_generation_are_no_training(tmp_path):
    model = make("Mixtral")
    with TransformersRecorder(model, tmp_path, every=1) as recorder:
        model.eval()
        model(**inputs(0))
        model.generate(inputs(0)["input_ids"], max_new_tokens=2, do_sample=False)
        recorder.step(0)
        assert recorder.window.tokens.tolist() == [0, 0]
    assert math.isnan(recorder.summary()["routing/entropy"])


def test_the_probe_has_the_token_ids(tmp_path):
    model, batch = make("Qwen3Moe"), inputs(3)
    model.train()
    oracle = Oracle(model)
    with TransformersRecorder(model, tmp_path) as recorder:
        recorder.probe(lambda: model(**batch), labels={"domain": ["code", "prose"]}, every=1)
        recorder.run_probe(0)
        assert model.training
    log = read_log(tmp_path)
    index = log.probes[0].index[1]
    real = batch["attention_mask"].flatten().bool()
    assert (index[~real.numpy()] == -1).all()
    assert np.array_equal(np.sort(index[real.numpy()]), np.sort(oracle.seen[1][0][real].numpy()))
    assert np.array_equal(log.probe_labels["token"][0], batch["input_ids"].flatten())
    assert log.probe_labels["domain"][1] == ["code", "prose"]


def test_switch_counts_what_capacity_left(tmp_path):
    """A one-hot choice after capacity, in an encoder and a decoder."""
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_decoder_layers=2, num_heads=2,
        num_experts=4, expert_capacity=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        decoder_start_token_id=0, router_jitter_noise=0,
    )  # fmt: skip
    model = transformers.SwitchTransformersForConditionalGeneration(config).train()
    batch = {name: value for name, value in inputs(0, padding=0).items() if name != "attention_mask"}
    with TransformersRecorder(model, tmp_path, every=1) as recorder:
        model(**batch)
        recorder.step(0)
    window = recorder.window
    assert len(recorder.layers) >= 2 and (window.requested.sum(1) == 20).all()
    # two of each expert for each of the two sequences
    assert (window.counts <= 4).all() and (window.counts <= window.requested).all()
    assert window.drops[..., 1].sum() == window.requested.sum()
    assert window.drops[..., 0].sum() == window.requested.sum() - window.counts.sum() > 0


def train_with(callback, model, folder, steps, *, begin=0, accumulation=2):
    """What a ``Trainer`` does with a callback; it needs another package itself."""
    args, control = SimpleNamespace(output_dir=str(folder)), None
    state = SimpleNamespace(global_step=begin)
    callback.on_train_begin(args, state, control, model=model)
    for step in range(begin, steps):
        for part in range(accumulation):
            model(**inputs(accumulation * step + part)).loss.backward()
        state.global_step = step + 1
        callback.on_step_end(args, state, control, model=model)
        callback.on_log(args, state, control, logs={"loss": 1.0 / (step + 1), "note": "text"})
        if step == 2:
            callback.on_save(args, state, control)
    return args, state, control


def test_callback_counts_steps_accumulated_and_resumed(tmp_path):
    assert issubclass(RoutingCallback, transformers.TrainerCallback)
    model = make("Olmoe").train()
    first = RoutingCallback(every=2)
    train_with(first, model, tmp_path, 4)
    assert len(first.recorder.summary()) <= 20
    killed, model = first, copy.deepcopy(model)
    assert killed.recorder is not None
    second = RoutingCallback(every=2)
    second.on_train_end(*train_with(second, model, tmp_path, 6, begin=3))
    log = read_log(tmp_path)
    assert log.complete and log.steps.tolist() == [1, 2, 3, 5] and log.session_starts == [0, 3]
    assert (log.tokens.sum(0) == 6 * 2 * 17).all()
    assert log.scalars["loss"][0].tolist() == [0, 1, 2, 3, 4, 5] and "note" not in log.scalars


def test_callback_takes_our_layers_where_they_are(tmp_path):
    model = torch.nn.Sequential(MoELayer(create_router("topk", dim=4, num_experts=2, top_k=1), ExpertSpec(4, 4)))
    callback = RoutingCallback(tmp_path / "run")
    callback.on_train_begin(SimpleNamespace(output_dir="nowhere"), None, None, model=model)
    assert type(callback.recorder) is Recorder and (tmp_path / "run" / "routing" / "header.json").exists()


def test_models_without_routers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no router of transformers' MoE families"):
        TransformersRecorder(torch.nn.Linear(2, 2), tmp_path)


class Strange(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(4, 3)
        self.gate.top_k = 2

    def forward(self, x):
        return self.gate(x)


def test_a_router_that_tells_too_little_is_named(tmp_path):
    model = Strange().train()
    with TransformersRecorder(model, tmp_path), pytest.raises(ValueError, match="Linear does not return logits"):
        model(torch.zeros(2, 4))


def test_a_real_trainer_stopped_and_resumed(tmp_path):
    """Gradient accumulation, saving and resuming as ``Trainer`` itself does them."""

    def train(steps: int, resume: bool) -> RoutingCallback:
        callback = RoutingCallback(every=1)
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            save_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        data = [{name: row[0] for name, row in inputs(i, 1, 0).items()} for i in range(16)]
        trainer = transformers.Trainer(model=make("Olmoe"), args=args, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return callback

    assert train(3, resume=False).recorder.summary()["routing/tokens"] == 2 * 2 * 2 * 10
    (tmp_path / "checkpoint-3").rename(tmp_path / "elsewhere")  # as a kill after step 3, saved after 2
    train(4, resume=True)
    log = read_log(tmp_path)
    assert log.complete and log.steps.tolist() == [0, 1, 2, 3] and log.session_starts == [0, 2]
    assert (log.tokens == 2 * 2 * 10).all()
    assert log.scalars["loss"][0].tolist() == [0, 1, 2, 3]
