"""Trains a Hugging Face model with Streaming DiLoCo. Nothing is downloaded: a tiny Llama from a config, on bytes.

Alone, as a short demo, or as one peer of a run (see `elastic coordinator`); every peer runs the same command:

    python examples/huggingface/train.py
    ELASTIC_JOIN=elastic://HOST:29400/RUN python examples/huggingface/train.py my-texts/*.txt
"""

import argparse
import json
import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import elastic

CONTEXT = 64


class Bytes(torch.utils.data.Dataset[torch.Tensor]):
    """Text as stretches of bytes: a vocabulary of 256, and no tokenizer to fetch."""

    tokens_per_sample = CONTEXT

    def __init__(self, files: list[Path]) -> None:
        text = bytearray(b"\n".join(path.read_bytes() for path in files))
        self.rows = torch.frombuffer(text, dtype=torch.uint8)[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index].long()


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
        )
    )


def train(peer: elastic.Peer, dataset: Bytes, sync_every: int = 20) -> dict[str, object]:
    model = tiny_llama()
    inner = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    with elastic.StreamingDiLoCo(model, inner, peer, sync_every=sync_every, fragments=2, wire="int8") as outer:
        for batch in peer.shards(dataset, batch_size=8):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            inner.step()
            inner.zero_grad()
            losses.append(loss.item())
    return {"peer": peer.name, "first": losses[0], "last": losses[-1], "state": outer.version.state_hash}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a tiny Llama on the bytes of some files.")
    parser.add_argument("files", nargs="*", type=Path, help="by default the source of Python's json package")
    parser.add_argument("--rounds", type=int, default=12, help="how many rounds to train if it is alone")
    options = parser.parse_args()
    data = Bytes(options.files or sorted(Path(json.__file__).parent.glob("*.py")))
    if "ELASTIC_JOIN" in os.environ:
        with elastic.Peer() as member:
            print(json.dumps(train(member, data)))
    else:
        with elastic.Coordinator(run="demo", policy=elastic.RunPolicy(rounds=options.rounds)) as coordinator:
            with elastic.Peer(coordinator.address, run="demo", name="alone") as member:
                print(json.dumps(train(member, data)))
