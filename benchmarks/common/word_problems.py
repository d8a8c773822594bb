"""Word problems for SmolLM2-135M: the tasks, what the model reads of them, and how it is scored."""

import functools
import os
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.methods import Output
from model_cost import load_base, smollm2

RANK, RANKS = 64, (8, 16, 32, 64, 128)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Task(NamedTuple):
    """One task: its size, the ranks it is run at, and the seeds of which test problems are solved.

    ``batch`` and ``held_out`` count problems, ``longest`` the tokens of an answer. ``settings`` are
    `reasoning_gym`'s own.
    """

    batch: int
    steps: int
    held_out: int
    longest: int
    ranks: tuple[int, ...]
    solving: tuple[int, ...]
    settings: dict[str, int]


SUMS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
OF_GSM = {"ranks": RANKS, "solving": (1,), "settings": {}}
OF_SUMS = {"ranks": (RANK,), "solving": (1, 2, 3), "settings": SUMS}
TASKS = {
    "gsm_symbolic": Task(batch=2, steps=30, held_out=24, longest=150, **OF_GSM),
    "chain_sum": Task(batch=8, steps=30, held_out=64, longest=8, **OF_SUMS),
}
# Seeds of the problems, further apart than any set is long: `reasoning_gym` draws problem i of a
# set from seed + i.
VALIDATION, TEST, TRAIN, APART = 10_000_000, 20_000_000, 30_000_000, 100_000


class Problem(NamedTuple):
    """Tokens of the question, tokens of the worked answer, and the number that is right."""

    question: list[int]
    worked: list[int]
    answer: float


class Model(nn.Module):
    """A language model, with the loss of the answers alone."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, tokens: Tensor, mask: Tensor, answers: Tensor) -> Output:
        """Mean cross entropy of the answers' tokens, from tokens and two masks, (batch, length).

        ``mask`` is that of attention, ``answers`` that of the answers' tokens.
        """
        kept = answers[:, 1:].bool()
        hidden = self.language_model.model(tokens, attention_mask=mask).last_hidden_state
        logits = self.language_model.lm_head(hidden[:, :-1][kept]).float()
        return Output(nn.functional.cross_entropy(logits, tokens[:, 1:][kept]), logits)


@functools.cache
def tokenizer() -> Any:
    """SmolLM2's."""
    from transformers import AutoTokenizer

    file = smollm2()
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@functools.cache
def base() -> nn.Module:
    """SmolLM2-135M-Instruct in bf16."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of reading the file
    return load_base().to(torch.bfloat16)


@functools.cache
def problems(task: str, count: int, seed: int) -> list[Problem]:
    """Problems of a task, the same for the same seed."""
    import reasoning_gym

    rows = []
    for row in reasoning_gym.create_dataset(task, size=count, seed=seed, **TASKS[task].settings):
        worked = row["metadata"].get("answer_cot", f"#### {row['answer']}")
        end = tokenizer().eos_token
        texts = f"{row['question']}\n", f"{worked}{end}"
        question, answer = (tokenizer()(text)["input_ids"] for text in texts)
        rows.append(Problem(question, answer, float(row["answer"])))
    return rows


def fresh(task: str, count: int, seed: int, seen: list[Problem]) -> list[Problem]:
    """Problems of a task that are not among those ``seen``."""
    known = [row.question for row in seen]
    return [row for row in problems(task, 2 * count, seed) if row.question not in known][:count]


def collate(rows: list[Problem]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and answer mask, padded on the right."""
    width = max(len(question) + len(answer) for question, answer, _ in rows)
    parts: list[list[list[int]]] = [[], [], []]
    for question, answer, _ in rows:
        pad = width - len(question) - len(answer)
        parts[0].append(question + answer + [0] * pad)
        parts[1].append([1] * (len(question) + len(answer)) + [0] * pad)
        parts[2].append([0] * len(question) + [1] * len(answer) + [0] * pad)
    return torch.tensor(parts[0]), torch.tensor(parts[1]), torch.tensor(parts[2])


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: list[Problem]) -> float:
    """Mean cross entropy over all tokens of all answers."""
    model.eval()
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    total = tokens = 0.0
    for start in range(0, len(rows), 8):
        batch = collate(rows[start : start + 8])
        count = batch[2].sum().item()
        total, tokens = total + model(*batch).loss.item() * count, tokens + count
    return total / tokens


@torch.no_grad()
def accuracy(model: Model, rows: list[Problem], longest: int) -> float:
    """Share of the problems whose greedily decoded answer is right.

    The answer is the number after the last ``####``.
    """
    model.eval()
    width = max(len(question) for question, _, _ in rows)
    pads = [width - len(question) for question, _, _ in rows]
    tokens = torch.tensor([[0] * pad + row.question for pad, row in zip(pads, rows)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
    end = tokenizer().eos_token_id
    greedy = {"max_new_tokens": longest, "do_sample": False, "pad_token_id": end}
    decoded = model.language_model.generate(input_ids=tokens, attention_mask=mask, **greedy)
    texts = tokenizer().batch_decode(decoded[:, width:], skip_special_tokens=True)
    return sum(final(text) == row.answer for text, row in zip(texts, rows)) / len(rows)


def final(text: str) -> float | None:
    """The number after the last ``####``."""
    found = re.findall(r"####\s*(-?[\d,]*\.?\d+)", text)
    return float(found[-1].replace(",", "")) if found else None
