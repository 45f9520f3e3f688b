"""What many would write first: a FastAPI handler around ``generate`` of transformers' Mamba-2.

    python -m benchmarks.transformers_handler FOLDER [--threads N]

It takes the fields of a completion that the load generator sends, budgets aside, and answers in one piece.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import set_seed
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

from model.device import set_threads
from model.tokenizer import ByteTokenizer


class Body(BaseModel):
    """The request; other fields are ignored."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int


def create_app(folder: Path) -> FastAPI:
    """An app around the model in ``folder``."""
    model: Any = Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    tokenizer, lock = ByteTokenizer(), threading.Lock()
    app = FastAPI()

    @app.post("/v1/completions")
    def complete(body: Body) -> dict[str, object]:
        prompt = torch.tensor([tokenizer.encode(body.prompt)])
        with lock, torch.inference_mode():  # the seed is the process's, and calls side by side are slower in sum
            set_seed(body.seed)
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=body.temperature,
                min_new_tokens=body.max_tokens,
                max_new_tokens=body.max_tokens,
                top_k=0,
                pad_token_id=0,
            )[0, prompt.shape[1] :]
        usage = {"prompt_tokens": prompt.shape[1], "completion_tokens": len(tokens)}
        return {"choices": [{"text": tokenizer.decode(tokens.tolist())}], "usage": usage}

    return app


def main() -> None:
    """Serve on a free port."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    uvicorn.run(create_app(arguments.folder), port=0)


if __name__ == "__main__":
    main()
