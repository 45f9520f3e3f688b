"""Scores and texts of the embedded checkpoint without a server, in the server's environment: JSON in, JSON out.

In: ``{"budget": number, "score": [text, ...], "generate": [text, ...], "length": bytes}``.
Out: ``{"score": [natural log-likelihood, ...], "generate": [greedy text, ...]}``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys

from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint
from model.evaluation.strict import StrictEvaluation
from service.generate import add_generate_arguments, run_generate


def main() -> None:
    asked = json.load(sys.stdin)
    model = load_checkpoint(EMBEDDED_CHECKPOINT, "cpu")
    scores = []
    for text in asked["score"]:
        evaluation = StrictEvaluation(model, [asked["budget"]])
        evaluation.add(text.encode("utf-8"))
        scores.append(-evaluation.scores[0].bits * math.log(2.0))
    parser = argparse.ArgumentParser()
    add_generate_arguments(parser)
    texts = []
    for text in asked["generate"]:
        options = ["--temperature", "0", "--budget", str(asked["budget"]), "--max-tokens", str(asked["length"])]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run_generate(parser.parse_args([text, *options]))
        texts.append(printed.getvalue().removesuffix("\n"))
    json.dump({"score": scores, "generate": texts}, sys.stdout)


if __name__ == "__main__":
    main()
