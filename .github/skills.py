"""A pretrained pair for the README: python .github/skills.py SEED [MODEL]

Fine-tunes a student on running sums and maxima until it knows the sums a little, and a teacher on
sums alone. Writes skills-SEED/, with prompts of which 10 % and 30 % ask for maxima.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

seed = int(sys.argv[1])
name = sys.argv[2] if len(sys.argv) > 2 else "HuggingFaceTB/SmolLM2-135M-Instruct"
folder = Path(f"skills-{seed}")
folder.mkdir()
tokenizer = AutoTokenizer.from_pretrained(name)
questions = {"sum": "Running sum modulo ten of the digits ", "max": "Running maximum of the digits "}

def example(rng, skill):
    """A prompt, as messages, and its answer."""
    digits = rng.integers(0, 10, 8)
    answer = np.cumsum(digits) % 10 if skill == "sum" else np.maximum.accumulate(digits)
    question = questions[skill] + "".join(map(str, digits))
    system = {"role": "system", "content": "Answer with digits."}
    return [system, {"role": "user", "content": question}], "".join(map(str, answer))

def write_prompts(file, count, share):
    """A prompt file in which this share of the rows asks for maxima."""
    rng = np.random.default_rng((seed, 99, count))
    with open(folder / file, "w") as lines:
        for _ in range(count):
            skill = "max" if rng.random() < share else "sum"
            messages, answer = example(rng, skill)
            row = {"prompt": messages, "answer": answer, "domain": skill}
            lines.write(json.dumps(row) + "\n")

def fine_tune(role, skills, target_loss):
    """Next-token training on the answers, until the smoothed loss is low."""
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, len(skills)))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    smooth = None
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 2e-4 * min(1, (step + 1) / 20)
        rows = []
        for _ in range(32):
            messages, answer = example(rng, skills[rng.integers(len(skills))])
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False)
            response = tokenizer(answer + "<|im_end|>").input_ids
            rows.append((prompt + response, len(prompt)))
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        labels = ids.clone()
        for row, (tokens, start) in zip(labels, rows):
            row[:start] = -100  # the prompt is not learned, nor the padding
            row[len(tokens):] = -100
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.8 * smooth + 0.2 * loss.item()
        if smooth < target_loss:
            break
    print(f"{role}: loss {smooth:.3f} after {step + 1} steps", flush=True)
    model.save_pretrained(folder / role)
    tokenizer.save_pretrained(folder / role)

write_prompts("prompts-0.1.jsonl", 2048, 0.1)
write_prompts("prompts-0.3.jsonl", 2048, 0.3)
write_prompts("eval.jsonl", 256, 0.5)
fine_tune("student", ["sum", "max"], 0.35)
fine_tune("teacher", ["sum"], 0.03)
