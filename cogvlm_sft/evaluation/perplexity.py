"""Text ability without generation: how well a model predicts plain text.

Perplexity over tokens, bits per byte (which compares models with different tokenizers), and the
share of tokens that the model would have written itself. Before and after alignment on the same
text, these tell whether teaching pictures cost language. Notable choices: text is read without any
template; a row may carry a `prompt` that is read and not counted; documents are cut into windows of
`max_length` tokens that each begin with BOS, so that every token is predicted once with the context
of its window; the intervals resample windows, within which tokens depend on each other.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from cogvlm_sft import launch
from cogvlm_sft.checkpoint.staging import write_text
from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.generate import evaluation_mode
from cogvlm_sft.evaluation.loading import describe_weights
from cogvlm_sft.evaluation.metrics.intervals import Figure
from cogvlm_sft.evaluation.processes import wait_for_all
from cogvlm_sft.evaluation.report import write_report
from cogvlm_sft.evaluation.results import figures_of
from cogvlm_sft.evaluation.tasks import PERPLEXITY
from cogvlm_sft.evaluation.tasks.task import field_of, load_json_lines
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor

PROTOCOL = {
    "title": "Plain text",
    "unit": "window",
    "prompt": "none: BOS, a row's own prompt where it has one, and the text",
    "decoding": "none: every token is predicted from the true ones before it",
    "post_processing": "none",
    "metric": "perplexity over tokens, bits per byte of UTF-8, share of tokens predicted first",
}


_WINDOW = 1024


def evaluate_text(
    texts: Sequence[tuple[str, str]],
    paths: Sequence[Path],
    limit: int | None,
    model: CogVLMForCausalLM,
    processor: CogVLMProcessor,
    batch_size: int,
    output: Path | str | None,
    checkpoint: Path | str | None,
) -> dict[str, Any]:
    """Scores texts and writes the report.

    The first process does it alone, since text is short beside the benchmarks; the others wait.

    Args:
        texts: As `read_texts` gives them.
        paths, limit, checkpoint: Stated in the report.
        model, processor: Of one checkpoint.
        batch_size: Windows at once.
        output: Folder of the results; nothing is written without it.

    Returns:
        The report; an empty one on processes other than the first.
    """
    if launch.rank():
        wait_for_all()
        return {}
    length = min(_WINDOW, model.config.max_position_embeddings)
    figures, windows = score_texts(
        model, processor, texts, max_length=length, batch_size=batch_size
    )
    report = {
        "task": PERPLEXITY,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "annotations": [str(path) for path in paths],
        "limit": limit,
        **PROTOCOL,
        "decoding": f"{PROTOCOL['decoding']}, in windows of {length} tokens",
        "weights": describe_weights(model),
        "count": len(windows),
        "figures": figures_of(figures, len(windows)),
        "notes": [],
        "published": [],
        "samples": [],
        "worst": [],
    }
    if output is not None:
        lines = "".join(json.dumps(window) + "\n" for window in windows)
        write_text(Path(output) / "windows.jsonl", lines)
        write_report(Path(output), [report])
    wait_for_all()
    return report


def read_texts(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """(prompt, text) of text files (one each, no prompt) and of JSON Lines.

    A line has a `text` and may have a `prompt`, which stands before it and is not counted.

    Raises:
        DataError: A file cannot be read, a line has no text, or there is none at all.
    """
    texts: list[tuple[str, str]] = []
    for path in paths:
        if path.suffix == ".jsonl":
            rows = enumerate(load_json_lines(path), start=1)
            for number, row in rows:
                text = str(field_of(row, "text", f"{path}:{number}"))
                texts.append((str(row.get("prompt", "")), text))
            continue
        try:
            texts.append(("", path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    texts = [(prompt, text) for prompt, text in texts if text.strip()]
    if not texts:
        raise DataError(f"{', '.join(map(str, paths))}: no text in it")
    return texts


def score_texts(
    model: CogVLMForCausalLM,
    processor: CogVLMProcessor,
    texts: Sequence[tuple[str, str]],
    *,
    max_length: int = 1024,
    batch_size: int = 8,
) -> tuple[list[Figure], list[dict[str, Any]]]:
    """The figures of plain text.

    Args:
        model: Put into evaluation mode for the call and back afterwards.
        processor: The model's own; its tokenizer is used.
        texts: (prompt, text) of each document; they are joined by a space, and the text counts.
        max_length: Tokens of a window, BOS included.
        batch_size: Windows at once.

    Returns:
        The figures, as functions of window numbers, and one row a window: its document, tokens,
        loss (nats, summed), bytes, and how many tokens were predicted first.

    Raises:
        DataError: `max_length` below 2, or above the model's positions.
    """
    most = model.config.max_position_embeddings
    if not 2 <= max_length <= most:
        raise DataError(f"max_length is {max_length}, expected 2 to {most} (the model's positions)")
    rows: list[dict[str, Any]] = []
    windows: list[list[int]] = []
    counted: list[list[bool]] = []
    for number, (prompt, text) in enumerate(texts):
        # A document that holds "</s>" holds four characters, not the end of the sequence.
        encoded = processor.tokenizer(
            f"{prompt} {text}" if prompt else text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        ids = encoded["input_ids"]
        counts = [start >= len(prompt) for start, _ in encoded["offset_mapping"]]
        for start in range(0, len(ids), max_length - 1):
            piece = slice(start, start + max_length - 1)
            if tokens := sum(counts[piece]):
                windows.append([processor.tokenizer.bos_token_id, *ids[piece]])
                counted.append(counts[piece])
                share = len(text.encode()) * tokens / sum(counts)
                rows.append({"document": number, "tokens": tokens, "bytes": share})
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index]))
    with (
        evaluation_mode(model),
        torch.inference_mode(),
        tqdm(total=len(windows), desc="text_perplexity", unit="window") as bar,
    ):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [
                {"input_ids": windows[i], "token_type_ids": [0] * len(windows[i])} for i in chosen
            ]
            inputs = processor.pad(batch, side="right")
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            logits = model(**inputs).logits[:, :-1].float()
            targets = inputs["input_ids"][:, 1:]
            kept = torch.zeros_like(targets, dtype=torch.bool)
            for row, index in enumerate(chosen):
                kept[row, : len(counted[index])] = torch.tensor(counted[index])
            losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            first = logits.argmax(-1) == targets
            for index, loss, hit, mine in zip(chosen, losses, first, kept, strict=True):
                rows[index]["loss"] = loss[mine].double().sum().item()
                rows[index]["predicted"] = int(hit[mine].sum())
            bar.update(len(chosen))
    return _figures(rows), rows


def _figures(rows: Sequence[dict[str, Any]]) -> list[Figure]:
    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype=np.float64)

    loss, tokens, size, hits = map(column, ("loss", "tokens", "bytes", "predicted"))
    return [
        Figure("perplexity", lambda i: float(np.exp(loss[i].sum() / tokens[i].sum())), 1.0, False),
        Figure(
            "bits per byte", lambda i: float(loss[i].sum() / np.log(2) / size[i].sum()), 1.0, False
        ),
        Figure("tokens predicted first", lambda i: float(hits[i].sum() / tokens[i].sum())),
    ]
