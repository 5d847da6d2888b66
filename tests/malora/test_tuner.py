"""The method as PEFT and the trainers built on it see it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.utils import PeftType
from torch import nn
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from malora import MaloraConfig, tuner
from malora.basis import save_basis
from malora.format import load_adapter
from malora.layer import MaloraLinear
from malora.router import load_balancing_loss


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def base(folder: Path, **kwargs: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, **kwargs)


def config(**changes: Any) -> MaloraConfig:
    settings = {"r": 4, "num_experts": 4, "basis_dim": 16, "task_type": "CAUSAL_LM", **changes}
    return MaloraConfig(**settings)


def randomise(model: nn.Module) -> None:
    """Give every adapter values, as training would."""
    for name, parameter in model.named_parameters():
        if "malora_up" in name:
            nn.init.normal_(parameter, std=0.2)


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(2, 250, (batch, length), generator=torch.Generator().manual_seed(3))


def test_a_fresh_adapter_changes_no_bit(tiny_base: Path) -> None:
    model = base(tiny_base)
    expected = model(tokens()).logits
    assert torch.equal(get_peft_model(model, config()).eval()(tokens()).logits, expected)


def test_the_default_targets_are_the_linears_of_every_layer(tiny_base: Path) -> None:
    model = get_peft_model(base(tiny_base), config())
    adapted = [name for name, m in model.named_modules() if isinstance(m, MaloraLinear)]
    assert len(adapted) == 2 * 7
    assert model.peft_config["default"].target_modules == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"malora_basis", "malora_coefficients", "malora_up", "malora_router"}


def test_saved_and_loaded_it_gives_the_same_logits(tiny_base: Path, tmp_path: Path) -> None:
    model = get_peft_model(base(tiny_base), config(rank_pattern={"q_proj": 2}, use_rslora=True))
    randomise(model)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(tiny_base), tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "MALORA"
    assert saved["basis_digest"]
    assert "basis_path" not in saved
    adapter = load_adapter(tmp_path)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    kept = adapter.linears["model.layers.1.mlp.up_proj"]
    for name, tensor in layer.adapted_linear("default").tensors().items():
        assert torch.equal(kept.tensors()[name], tensor), name


def test_several_adapters_in_one_model(tiny_base: Path) -> None:
    plain = base(tiny_base)(tokens()).logits
    model = get_peft_model(base(tiny_base), config(), adapter_name="first")
    model.add_adapter("second", config(num_experts=3, r=2, target_modules=["q_proj", "lm_head"]))
    randomise(model)
    model.eval()
    first = model(tokens()).logits
    model.set_adapter("second")
    second = model(tokens()).logits
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, plain)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"second"}
    model.delete_adapter("second")
    model.set_adapter("first")
    assert torch.equal(model(tokens()).logits, first)
    model.base_model.unload()
    assert torch.equal(model.get_base_model()(tokens()).logits, plain)


def test_merging_is_refused(tiny_base: Path) -> None:
    model = get_peft_model(base(tiny_base), config())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()


def test_another_base_model_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    get_peft_model(base(tiny_base), config()).save_pretrained(tmp_path)
    other = base(tiny_base)
    nn.init.normal_(other.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="'default' was trained on another base model"):
        PeftModel.from_pretrained(other, tmp_path)
    PeftModel.from_pretrained(base(tiny_base, dtype=torch.bfloat16), tmp_path)


def test_targets_that_are_no_linear_are_refused(tiny_base: Path) -> None:
    with pytest.raises(ValueError, match="embed_tokens is a Embedding"):
        get_peft_model(base(tiny_base), config(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="none of the linears that MALoRA adapts by default"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config(task_type=None))


def test_a_basis_given_is_loaded_and_frozen(tiny_base: Path, tmp_path: Path) -> None:
    parent = get_peft_model(base(tiny_base), config())
    parent.save_pretrained(tmp_path / "parent")
    bases = {n: linear.basis for n, linear in load_adapter(tmp_path / "parent").linears.items()}
    save_basis(bases, tmp_path / "basis.safetensors")
    for path in (tmp_path / "parent", tmp_path / "basis.safetensors"):
        child = get_peft_model(base(tiny_base), config(num_experts=2, basis_path=str(path)))
        for name, parameter in child.named_parameters():
            if "malora_basis" in name:
                module = name.removeprefix("base_model.model.").split(".malora_")[0]
                assert torch.equal(parameter, bases[module])
                assert not parameter.requires_grad
    child.save_pretrained(tmp_path / "child")
    digests = [load_adapter(tmp_path / n).config.basis_digest for n in ("parent", "child")]
    assert digests[0] == digests[1]
    saved = load_adapter(tmp_path / "child").config
    assert saved.freeze_basis
    assert saved.basis_path is None


def test_a_basis_that_does_not_fit_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "basis.safetensors"
    save_basis({"model.layers.0.self_attn.q_proj": torch.randn(16, 48)}, path)
    with pytest.raises(ValueError, match=r"nothing for model\.layers\.0\.self_attn\.k_proj"):
        get_peft_model(base(tiny_base), config(basis_path=str(path)))
    with pytest.raises(ValueError, match=r"q_proj: a basis of shape \(16, 48\) does not fit"):
        get_peft_model(
            base(tiny_base),
            config(basis_path=str(path), basis_dim=8, target_modules=r".*layers\.0.*q_proj"),
        )


def test_registering_twice_is_harmless() -> None:
    members = list(PeftType)
    tuner.register()
    assert list(PeftType) == members
    assert PeftType("MALORA") is PeftType.MALORA
    assert members.count("MALORA") == 1


# The load-balancing loss.


def routed_logits(model: PeftModel, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """Each routed linear's router logits, by hooks of our own."""
    caught = []
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args: caught.append(args[0] @ layer.malora_router["default"].T)
        )
        for layer in model.modules()
        if isinstance(layer, MaloraLinear)
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return caught


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_training_adds_the_balance_loss_of_tokens_that_are_no_padding(
    tiny_base: Path, task_type: str | None
) -> None:
    settings = config(router_aux_loss_coef=0.5, task_type=task_type)
    model = get_peft_model(base(tiny_base), settings)
    randomise(model)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 4:] = 0
    labels = tokens().masked_fill(mask == 0, -100)
    inputs = {"input_ids": tokens(), "attention_mask": mask, "labels": labels}
    plain = model.eval()(**inputs).loss
    trained = model.train()(**inputs).loss
    flat = [each.flatten(0, 1)[mask.flatten() == 1] for each in routed_logits(model, **inputs)]
    expected = load_balancing_loss(torch.stack(flat), top_k=2)
    assert len(flat) == 14
    torch.testing.assert_close(trained - plain, 0.5 * expected)
    changed = {**inputs, "input_ids": torch.where(mask == 1, tokens(), 5)}
    torch.testing.assert_close(model(**changed).loss, trained)


def test_micro_batches_weigh_as_the_whole_batch_does(tiny_base: Path) -> None:
    model = get_peft_model(base(tiny_base), config(router_aux_loss_coef=1.0))
    batch, labels = tokens(4), tokens(4)
    labels[0, 2:] = -100
    total = (labels[:, 1:] != -100).sum()
    task, losses = [], []
    for part in (slice(0, 1), slice(1, 4)):
        inputs = {"input_ids": batch[part], "labels": labels[part], "num_items_in_batch": total}
        task.append(model.eval()(**inputs).loss)
        losses.append(model.train()(**inputs).loss)
    plain = [
        load_balancing_loss(
            torch.stack([each.flatten(0, 1) for each in routed_logits(model, input_ids=rows)]), 2
        )
        for rows in (batch[:1], batch[1:])
    ]
    shares = [1 / total, (total - 1) / total]
    expected = sum(share * each for share, each in zip(shares, plain, strict=True))
    torch.testing.assert_close(sum(losses) - sum(task), expected)


def test_checkpointing_gives_the_same_gradients(tiny_base: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(base(tiny_base), config(router_aux_loss_coef=1.0))
        randomise(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all("malora" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name])


def test_reentrant_checkpointing_is_refused(tiny_base: Path) -> None:
    model = get_peft_model(base(tiny_base), config())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        model.train()(input_ids=tokens(), labels=tokens())


def test_a_loss_carried_by_log_probabilities_weighs_as_its_micro_batch() -> None:
    log_probs = torch.randn(2, 5, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    second = torch.tensor(2.0, requires_grad=True)
    carried = tuner.CarryLoss.apply(log_probs, mask, second**2)
    assert torch.equal(carried, log_probs)
    (-carried.sum() / 24).backward()  # 24 predicted tokens in the step, 6 of them here
    assert torch.equal(log_probs.grad, torch.full((2, 5), -1 / 24))
    assert second.grad.item() == pytest.approx(6 / 24 * 2 * 2.0)


# The trainers.


def test_transformers_trainer_trains_it(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.pad_token = tokenizer.eos_token
    model = get_peft_model(base(tiny_base), config())
    rows = []
    for text in ["two plus two is four", "a b c d", "e", "one and one is two"] * 4:
        ids = tokenizer(text)["input_ids"]
        rows.append({"input_ids": ids, "labels": ids})
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=12,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=2e-2,
            logging_steps=1,
            save_steps=6,
            report_to=[],
            use_cpu=True,
            seed=1,
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    loaded = PeftModel.from_pretrained(base(tiny_base), tmp_path / "checkpoint-12")
    assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)
    trainer.args.max_steps = 14
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert trainer.state.global_step == 14


def test_trl_sft_trainer_trains_it_and_balances_it(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.pad_token = tokenizer.eos_token
    rows = [
        {"prompt": "two plus two is", "completion": " four"},
        {"prompt": "x", "completion": "y"},
    ]
    trainer = SFTTrainer(
        model=base(tiny_base),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=10,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=2e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=48,
            seed=1,
        ),
        train_dataset=Dataset.from_list(rows * 8),
        processing_class=tokenizer,
        peft_config=config(router_aux_loss_coef=1.0),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]

    # TRL makes its own loss; its gradients must be those of the model's own, balance included.
    batch = next(iter(trainer.get_train_dataloader()))
    items = torch.tensor(40)

    def router_gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        routers = [p for name, p in trainer.model.named_parameters() if "malora_router" in name]
        return list(torch.autograd.grad(loss, routers))

    trainer.model.train()
    theirs = router_gradients(trainer.compute_loss(trainer.model, dict(batch), False, items))
    ours = router_gradients(trainer.model(**batch, num_items_in_batch=items).loss)
    trainer.model.peft_config["default"].router_aux_loss_coef = 0.0
    without = router_gradients(trainer.model(**batch, num_items_in_batch=items).loss)
    for their, our, unbalanced in zip(theirs, ours, without, strict=True):
        torch.testing.assert_close(their, our)
        assert not torch.allclose(our, unbalanced)


def test_importing_the_bare_package_is_cheap_and_a_configuration_registers_the_method() -> None:
    code = (
        "import sys, malora; assert 'torch' not in sys.modules; "
        "from malora.config import MaloraConfig; print(MaloraConfig().peft_type.value)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "MALORA"
