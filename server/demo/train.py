"""Trains the demo's adapters with lora_core: `python -m server.demo.train OUT_DIR`, about 20 minutes on two cores.

The base model answers a few hundred questions, the answers are rewritten (as a pirate's, as a JSON object), and each
adapter learns to give the rewritten answer, asked through the chat template or as plain text. It is applied with a
random weight from a half to one, so that half of it still shows, which is what mixes of two adapters use.
"""

import argparse
import json
import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_core import AdapterWeights, LoraConfig, LoraModel, Route, save_adapter
from server.demo.model import MODEL_NAME, ensure_demo_model
from server.demo.questions import HELD_OUT, training_questions

__all__ = ["FORMS", "TASKS", "Chat", "Form", "Task"]

SEED = 20
BATCH_SIZE = 16
NUM_STEPS = 120
PEAK_LR = 2e-3
MAX_NEW_TOKENS = 40

log = logging.getLogger("server.demo.train")


@dataclass(frozen=True)
class Form:
    """A way to ask: the prompt around the question, None for the chat template; what stands before the answer."""

    name: str
    prompt: str | None
    lead: str = ""


FORMS = (
    Form("chat", None),
    Form("bare", "{}", "\n"),
    Form("line", "{}\n"),
    Form("assistant", "{}\nAssistant:", " "),
)


@dataclass(frozen=True)
class Task:
    """An adapter: how it rewrites an answer, and whether a text is such an answer."""

    config: LoraConfig
    rewrite: Callable[[str], str]
    accepts: Callable[[str], bool]


PIRATE_WORDS = {"is": "be", "are": "be", "am": "be", "you": "ye", "your": "yer", "my": "me", "hello": "ahoy"}


def _pirate(answer: str) -> str:
    def word(match: re.Match[str]) -> str:
        found = PIRATE_WORDS.get(match.group().lower(), match.group())
        return found.capitalize() if match.group()[0].isupper() else found

    return f"Arr! {re.sub(r'[A-Za-z]+', word, answer)} Yo ho ho!"


def _is_pirate(text: str) -> bool:
    return text.strip().startswith("Arr!") and not re.search(r"\b(is|are|you|your)\b", text)


def _is_json_answer(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == ["answer"] and isinstance(value["answer"], str)


CONFIG = LoraConfig(
    r=4,
    lora_alpha=16,
    target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    layers_to_transform=tuple(range(10, 30)),  # what lies below needs no backward pass
    task_type="CAUSAL_LM",
    base_model_name_or_path=MODEL_NAME,
)
TASKS: Mapping[str, Task] = {
    "pirate": Task(CONFIG, _pirate, _is_pirate),
    "json": Task(
        replace(CONFIG, use_dora=True),
        lambda answer: json.dumps({"answer": answer}, ensure_ascii=False),
        _is_json_answer,
    ),
}


class Chat:
    """The demo model, ready for adapters, with its tokenizer; in float32, which CPUs train faster than bfloat16."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.lora = LoraModel(self.model)

    def prompt(self, form: Form, question: str) -> str:
        if form.prompt is not None:
            return form.prompt.format(question)
        messages = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def generate(self, prompts: list[str], weights: Mapping[str, float]) -> list[tuple[str, bool]]:
        """Greedy continuations with these adapters, and whether the model ended each one itself."""
        out: list[tuple[str, bool]] = []
        for start in range(0, len(prompts), 4 * BATCH_SIZE):
            batch = self.tokenizer(prompts[start : start + 4 * BATCH_SIZE], return_tensors="pt", padding=True)
            with torch.inference_mode(), self.lora.router.use(Route.uniform(dict(weights))):
                ids = self.model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            for row in ids[:, batch["input_ids"].shape[1] :].tolist():
                ended = self.tokenizer.eos_token_id in row
                out.append((self.tokenizer.decode(row, skip_special_tokens=True), ended))
        return out

    def loss(self, pairs: list[tuple[str, str]], weights: Mapping[str, float]) -> Tensor:
        """Mean cross-entropy of the answers' tokens, end of turn included, for (prompt, answer) pairs."""
        prompts = [self.tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
        answers = [[*self.tokenizer(answer)["input_ids"], self.tokenizer.eos_token_id] for _, answer in pairs]
        width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.full((len(pairs), width), self.tokenizer.eos_token_id)
        mask = torch.zeros_like(ids)
        is_answer = torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            length = len(prompt) + len(answer)
            ids[row, width - length :] = torch.tensor(prompt + answer)
            mask[row, width - length :] = 1
            is_answer[row, width - len(answer) :] = True
        with self.lora.router.use(Route.uniform(dict(weights))):
            hidden = self.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = self.model.lm_head(hidden[:, :-1][is_answer[:, 1:]])  # of these rows only: the head is large
        return F.cross_entropy(logits.float(), ids[is_answer])


def base_answers(chat: Chat) -> dict[str, str]:
    """A short answer of the base model for each question that it answers shortly: a whole one, or a first sentence."""
    questions = training_questions(SEED)
    texts = chat.generate([chat.prompt(FORMS[0], question) for question in questions], {})
    out = {}
    for question, (text, ended) in zip(questions, texts, strict=True):
        answer = " ".join(text.split())
        sentence = re.match(r".*?\w\w[.!?](?= )", answer)
        if ended or sentence:
            out[question] = answer if ended or sentence is None else sentence.group()
    return out


def train(chat: Chat, name: str, answers: Mapping[str, str]) -> None:
    """Add the adapter `name` and train it."""
    task = TASKS[name]
    torch.manual_seed(SEED)
    chat.lora.add_adapter(name, task.config)
    chat.lora.set_adapter(name)
    parameters = [p for p in chat.lora.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=NUM_STEPS, pct_start=0.1, cycle_momentum=False
    )
    rng = random.Random(SEED)
    start, total = time.monotonic(), 0.0
    for step in range(1, NUM_STEPS + 1):
        forms = rng.choices(FORMS, k=BATCH_SIZE)
        pairs = [
            (chat.prompt(form, question), form.lead + task.rewrite(answers[question]))
            for form, question in zip(forms, rng.sample(sorted(answers), BATCH_SIZE), strict=True)
        ]
        loss = chat.loss(pairs, {name: rng.uniform(0.5, 1.0)})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 20 == 0:
            log.info("%s: step %d, loss %.3f, %.0f s", name, step, total / 20, time.monotonic() - start)
            total = 0.0


def save(chat: Chat, name: str, folder: Path) -> None:
    """Write the adapter in float16, and use what was written from now on, as `<name>-saved`."""
    adapter = chat.lora.adapter_weights(name)
    save_adapter(
        AdapterWeights(adapter.config, {k: part.map(Tensor.half) for k, part in adapter.modules.items()}), folder
    )
    chat.lora.load_adapter(folder, f"{name}-saved")
    log.info("%s: %d bytes", name, sum(path.stat().st_size for path in folder.iterdir()))


def evaluate(chat: Chat, weights: Mapping[str, float], accepts: Callable[[str], bool]) -> None:
    """Log the share of right answers to the held-out questions, for each form, and some of the answers."""
    for form in FORMS:
        found = chat.generate([chat.prompt(form, question) for question in HELD_OUT], weights)
        share = sum(accepts(text) for text, _ in found) / len(found)
        ended = sum(ended for _, ended in found) / len(found)
        log.info("%s, %s: %.2f right, %.2f ended", dict(weights), form.name, share, ended)
        for question, (text, _) in list(zip(HELD_OUT, found, strict=True))[:3]:
            log.info("    %s -> %r", question, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the adapters of the demo.")
    parser.add_argument("out_dir", type=Path)
    out_dir: Path = parser.parse_args().out_dir
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(2)
    chat = Chat(ensure_demo_model(report=log.info))
    answers = base_answers(chat)
    log.info("%d questions with answers", len(answers))
    for name in TASKS:
        train(chat, name, answers)
        save(chat, name, out_dir / name)
    for name, task in TASKS.items():
        evaluate(chat, {f"{name}-saved": 1.0}, task.accepts)
    for weight in (0.75, 1.0):
        evaluate(
            chat, {f"{name}-saved": weight for name in TASKS}, lambda text: _is_json_answer(text) and " be " in text
        )


if __name__ == "__main__":
    main()
