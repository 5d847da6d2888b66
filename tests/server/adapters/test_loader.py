"""An adapter that is made to keep the loader busy."""

import json

import peft
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from malora.format import BaseModelSpec
from malora_server.adapters import loader
from malora_server.adapters.loading import Configure, Opened, Refused


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(.|.)*(.|.)*!"},
        {"exclude_modules": "(.|.)*(.|.)*!"},
        {"rank_pattern": {"((.|.)*)*!": 2}},
    ],
    ids=str,
)
def test_an_expression_that_takes_for_ever(tmp_path, monkeypatch, fields):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    spec = BaseModelSpec.from_model(model)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(model, lora).save_pretrained(tmp_path)
    configuration = Configure(spec, sorted(spec.linears), "float32", 0, 1)

    def open_it():
        load = loader._Load(tmp_path)
        try:
            return load.attempt(lambda: load.open(configuration))
        finally:
            load.close()

    assert isinstance(open_it(), Opened)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    monkeypatch.setattr(loader, "_MAX_CHECK_SECONDS", 0.2)
    refusal = open_it()
    assert isinstance(refusal, Refused)
    assert refusal.code == "adapter_too_complex"
