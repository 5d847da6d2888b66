"""Makes the default base model: tokenizer, training, evaluation, files.

    python -m malora.base_model.pretrain --text-dir TEXT --tasks-dir TASKS --out OUT

A GPU makes it in minutes; on a CPU a few steps only check that it runs. The same seed gives the
same tokenizer and the same data; the weights agree up to the device's own rounding.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AttentionInterface,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from malora.base_model.corpus import ASSISTANT, END, USER, Corpus

PAD = "<|pad|>"
SYSTEM = "<|system|>"
CONTEXT = 1024
VOCABULARY = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|endoftext|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SHARD_DOCUMENTS = 4000

Rows = NDArray[np.uint16]


@dataclass(frozen=True)
class Plan:
    """One run: `shards` of documents are made up front, then read in random order for `steps`."""

    text_dir: Path
    tasks_dir: Path
    out: Path
    real_share: float
    seed: int
    shards: int
    steps: int
    batch: int
    learning_rate: float

    def corpus(self) -> Corpus:
        """The source of documents."""
        return Corpus(self.text_dir, self.tasks_dir, self.real_share)


def build_tokenizer(corpus: Corpus, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the corpus; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = Random(seed)
    generated = [corpus.document(rng) for _ in range(8000)]
    special = [END, PAD, USER, ASSISTANT, SYSTEM]
    tokenizer.train_from_iterator(
        corpus.real_text() + generated,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The architecture: 7.8 M parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=320,
        intermediate_size=800,
        num_hidden_layers=6,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pack(documents: Iterator[list[int]], end: int) -> Rows:
    """Rows of CONTEXT + 1 tokens, each beginning with a document's first token.

    The document that overflows a row is cut there, so that the model meets a document's start at
    position 0, as it does when it is asked.
    """
    rows: list[list[int]] = []
    row: list[int] = []
    for tokens in documents:
        row += [*tokens, end]
        if len(row) > CONTEXT:
            rows.append(row[: CONTEXT + 1])
            row = []
    return np.array(rows, dtype=np.uint16).reshape(-1, CONTEXT + 1)


@cache
def _worker(plan: Plan) -> tuple[Corpus, Tokenizer]:
    return plan.corpus(), Tokenizer.from_file(str(plan.out / "tokenizer.json"))


def make_shard(plan: Plan, index: int) -> Rows:
    """Generate, tokenise and pack one shard; runs in a worker process."""
    corpus, tokenizer = _worker(plan)
    rng = Random(plan.seed + 1 + index)
    texts = [corpus.document(rng) for _ in range(SHARD_DOCUMENTS)]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    end = tokenizer.token_to_id(END)
    assert end is not None, "the tokenizer is not the one this script makes"
    return pack((e.ids for e in encodings), end)


def make_rows(plan: Plan) -> Tensor:
    """All training rows, (rows, CONTEXT + 1) int16 (the vocabulary fits)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ProcessPoolExecutor() as workers:
        futures = [workers.submit(make_shard, plan, index) for index in range(plan.shards)]
        return torch.from_numpy(np.concatenate([f.result() for f in futures]).astype(np.int16))


def _causal(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: object, **_: object
) -> tuple[Tensor, None]:
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2), None


def batches(rows: Tensor, plan: Plan, device: torch.device) -> Iterator[Tensor]:
    """Endless (batch, CONTEXT + 1) int64 batches; every row once an epoch, in a new order."""
    generator = torch.Generator().manual_seed(plan.seed)
    held = rows.to(device)
    while True:
        order = torch.randperm(len(held), generator=generator).to(device)
        for chunk in order.split(plan.batch):
            if len(chunk) == plan.batch:
                yield held[chunk].long()


def _loss(model: Callable[..., Any], tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def train(plan: Plan, tokenizer: PreTrainedTokenizerFast, rows: Tensor, corpus: Corpus) -> None:
    """Train on the rows and leave the model's files in `plan.out` (also on the way)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    # The library builds an explicit mask while compiling, which rules the fast kernels out.
    AttentionInterface.register("causal", _causal)
    model = LlamaForCausalLM._from_config(
        model_config(tokenizer), attn_implementation="causal", dtype=torch.float32
    ).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    compiled = torch.compile(model, dynamic=False) if device.type == "cuda" else model
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=plan.learning_rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    warmup = min(200, plan.steps // 10 + 1)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, plan.steps - warmup)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    source = batches(rows, plan, device)
    started = time.monotonic()
    for step in range(1, plan.steps + 1):
        with torch.autocast(device.type, torch.bfloat16):
            loss = _loss(compiled, next(source))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 100 == 0 or step in (1, 10, plan.steps):
            value, seconds = loss.item(), time.monotonic() - started
            seen = step * plan.batch * CONTEXT
            print(f"step {step}/{plan.steps} loss {value:.3f} {seen / 1e6:.0f} M tokens", end=" ")
            print(f"{seconds:.0f} s, {seen / seconds / 1e6:.2f} M tokens/s", flush=True)
        if step % 2000 == 0 or step == plan.steps:
            save(model, plan.out)
            evaluate(model, tokenizer, corpus, plan.seed)


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights in bfloat16, with their configuration."""
    saved = LlamaForCausalLM(model.config).to(torch.bfloat16)
    saved.load_state_dict(model.state_dict())
    tokens = {"eos_token_id": model.config.eos_token_id, "pad_token_id": model.config.pad_token_id}
    saved.generation_config = GenerationConfig(**tokens)
    saved.save_pretrained(out)


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, seed: int
) -> None:
    """Print the loss on text that training did not see, in nats a token."""
    rng = Random(f"{seed} held out")
    device = model.device
    sources = {
        "real text": corpus.held_out_text,
        "generated text": [corpus.document(rng) for _ in range(600)],
    }
    for name, texts in sources.items():
        ids: list[list[int]] = tokenizer(texts)["input_ids"]
        rows = torch.from_numpy(pack(iter(ids), tokenizer.eos_token_id).astype(np.int64))[:64]
        with torch.autocast(device.type, torch.bfloat16):
            losses = [_loss(model, row.to(device)).item() for row in rows.split(8)]
        print(f"held-out {name}: {sum(losses) / len(losses):.3f} nats a token", flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Pre-train the default base model.")
    parser.add_argument("--text-dir", type=Path, required=True)
    parser.add_argument("--tasks-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--real-share", type=float, default=0.025, help="of the documents")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shards", type=int, default=300, help="of 4,000 documents each")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=96, help="rows of 1,024 tokens")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    plan = Plan(**vars(parser.parse_args()))
    plan.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    corpus = plan.corpus()
    tokenizer = build_tokenizer(corpus, plan.seed)
    tokenizer.save_pretrained(plan.out)
    print(f"tokenizer: {time.monotonic() - started:.0f} s", flush=True)
    rows = make_rows(plan)
    print(
        f"{rows.numel() / 1e6:.0f} M tokens ready: {time.monotonic() - started:.0f} s", flush=True
    )
    train(plan, tokenizer, rows, corpus)


if __name__ == "__main__":
    main()
