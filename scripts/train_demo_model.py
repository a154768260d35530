"""Trains the demo model: a small Llama that tells short tales, on one CPU core in about half an hour.

Everything comes from this repository and seeds are fixed: `demo_corpus.py` makes the corpus, the tokenizer is trained
on it, and the engine's own quantizer makes the file that is shipped. An interrupted run resumes.

    python scripts/train_demo_model.py engine/demo/tales.gguf
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from demo_corpus import END, TURN_END, TURN_START, documents
from torch import nn

from trichord.quantize import quantize_file

VOCABULARY = 2048
CONTEXT = 512
WIDTH, HEADS, KV_HEADS, HEAD_SIZE, FEED_FORWARD, BLOCKS = 256, 4, 2, 64, 768, 4
NORM_EPSILON, ROPE_BASE = 1e-5, 10000.0

# Most steps see rows as long as a tale, the last ones the whole context: (steps, rows in a batch, tokens in a row).
PHASES = ((1100, 4, 256), (400, 2, 512))
STEPS = sum(steps for steps, _, _ in PHASES)
PEAK_RATE, WARM_UP = 1.5e-3, 100
SEED = 2024

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{TURN_START}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{TURN_END}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{TURN_START}assistant\n{{% endif %}}"
)


def train_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of `VOCABULARY` ids. All 256 bytes are ids, so that any text can be encoded."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN_START, TURN_END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Block(nn.Module):
    """Attention with rotary positions and a gated feed-forward network, each added to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(WIDTH, NORM_EPSILON)
        self.attn_q = nn.Linear(WIDTH, HEADS * HEAD_SIZE, bias=False)
        self.attn_k = nn.Linear(WIDTH, KV_HEADS * HEAD_SIZE, bias=False)
        self.attn_v = nn.Linear(WIDTH, KV_HEADS * HEAD_SIZE, bias=False)
        self.attn_output = nn.Linear(HEADS * HEAD_SIZE, WIDTH, bias=False)
        self.ffn_norm = nn.RMSNorm(WIDTH, NORM_EPSILON)
        self.ffn_gate = nn.Linear(WIDTH, FEED_FORWARD, bias=False)
        self.ffn_up = nn.Linear(WIDTH, FEED_FORWARD, bias=False)
        self.ffn_down = nn.Linear(FEED_FORWARD, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """x (batch, tokens, width), rotation (tokens, head size / 2) complex -> (batch, tokens, width)."""
        h = self.attn_norm(x)
        q, k, v = (
            layer(h).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2) for layer in (self.attn_q, self.attn_k, self.attn_v)
        )
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (rotate(k, rotation), v))
        mixed = F.scaled_dot_product_attention(rotate(q, rotation), k, v, is_causal=True)
        x = x + self.attn_output(mixed.transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """x (..., tokens, head size) turned by its positions. Pairs are neighbours, the order of GGUF's llama weights."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2)


class DemoModel(nn.Module):
    """The Llama architecture. Modules are named as GGUF names their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(VOCABULARY, WIDTH)
        self.blk = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.output_norm = nn.RMSNorm(WIDTH, NORM_EPSILON)
        frequencies = ROPE_BASE ** -(torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
        angles = torch.outer(torch.arange(CONTEXT), frequencies)
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # The layers that write to the residual stream start smaller, so that its size does not grow with depth.
                writes = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * BLOCKS) if writes else 0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (batch, tokens) -> logits (batch, tokens, vocabulary)."""
        x = self.token_embd(ids)
        for block in self.blk:
            x = block(x, self.rotation[: ids.shape[1]])
        return F.linear(self.output_norm(x), self.token_embd.weight)


def batches(tokenizer: tokenizers.Tokenizer, first: int) -> Iterator[torch.Tensor]:
    """The batches (rows, tokens + 1) of ids from step `first` on. Every row begins with a document's beginning."""
    end = tokenizer.token_to_id(END)
    step = 0
    for phase, (steps, count, length) in enumerate(PHASES):
        corpus = documents(SEED + 1 + phase)
        for _ in range(steps):
            rows = []
            for _ in range(count):
                row: list[int] = []
                while len(row) <= length:
                    row += [end, *tokenizer.encode(next(corpus)).ids]
                rows.append(row[: length + 1])
            if step >= first:
                yield torch.tensor(rows)
            step += 1


def rate(step: int) -> float:
    """The learning rate: a linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    progress = (step - WARM_UP) / (STEPS - WARM_UP)
    return PEAK_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(tokenizer: tokenizers.Tokenizer, checkpoint: Path) -> DemoModel:
    """The trained model. Resumes from the checkpoint where there is one."""
    torch.manual_seed(SEED)
    model = DemoModel()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    # A thousand tokens are a small batch, in which most words are absent: squared gradients are averaged for long.
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    started, losses = time.monotonic(), []
    for step, batch in enumerate(batches(tokenizer, first), first):
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == STEPS:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step + 1} of {STEPS}: loss {np.mean(losses[-50:]):.3f}, {minutes:.1f} minutes", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == STEPS:
            state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return model


def write_gguf(model: DemoModel, tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    """The model in F16 (norms F32) with everything that an engine needs to know about it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name("Trichord Demo")
    writer.add_description("Tells short tales; trained on a grammar written for this project.")
    writer.add_author("The Trichord developers")
    writer.add_license("MIT")
    writer.add_size_label(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_SIZE)
    writer.add_value_length(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(ROPE_BASE)
    add_tokenizer(writer, tokenizer)
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        writer.add_tensor(name, array.astype(np.float16) if array.ndim == 2 else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: tokenizers.Tokenizer) -> None:
    """The vocabulary, its merges and the chat template. One token separates documents: it begins and ends each."""
    control = [END, TURN_START, TURN_END]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    tokens = [token for token, _ in vocabulary]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in control else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.token_to_id(END))
    writer.add_eos_token_id(tokenizer.token_to_id(END))
    writer.add_eot_token_id(tokenizer.token_to_id(TURN_END))
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def main() -> None:
    """Trains, writes the F16 file and quantizes it."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("target", type=Path, metavar="OUT.gguf", help="the quantized model")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("build/demo-model"),
        metavar="DIR",
        help="where the checkpoint and the F16 file go (default: %(default)s)",
    )
    arguments = parser.parse_args()
    work: Path = arguments.work_dir
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(list(itertools.islice(documents(SEED), 10_000)))
    model = train(tokenizer, work / "checkpoint.pt")
    write_gguf(model, tokenizer, work / "demo-F16.gguf")
    quantize_file(work / "demo-F16.gguf", arguments.target, "Q4_K_M", force=True)


if __name__ == "__main__":
    main()
