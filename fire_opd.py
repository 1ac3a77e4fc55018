"""FiRe-OPD, "Filter, then Reweight" (arXiv 2606.02684): on-policy distillation of LLMs in one file.

The student writes, the teacher grades every token that the student wrote, the student moves towards the
teacher. FiRe-OPD adds two selections to this: it drops the trajectories that the teacher finds least likely
(Filter) and weighs the tokens of the others by how sure the teacher and how unsure the student is (Reweight).
One step, and where to read it (pi_S is the student, pi_T the teacher, y a rollout of T tokens):

  1. rollout    y ~ pi_S(.|x), sampled from exactly softmax(logits / temperature)         Policy.sample
  2. score      log pi_T(y_t) and the entropy H_T,t, in chunks over the vocabulary        Policy.forward
  3. filter     s = mean_t log pi_T(y_t); keep s >= the 20 % quantile of the whole step   filter_trajectories
  4. reweight   w_t = (1 + alpha (1 - H_T,t/max H_T)) (1 + beta H_S,t/max H_S), mean 1    token_weights
  5. loss       the clipped policy gradient, its advantage A_t = w_t log(pi_T / pi_S)     policy_loss
  6. update     one AdamW step from the kept tokens of all micro-batches and ranks        update

    python fire_opd.py                                           # a tiny pair, no download, under a minute
    python fire_opd.py --teacher T --student S --prompts P.jsonl                     # real models, one GPU
    torchrun --nproc-per-node 8 fire_opd.py --teacher T --student S --prompts P.jsonl          # eight GPUs

The pure functions of the method come first and need nothing else of the file: `import fire_opd`, test them.
Left out on purpose: a critic, a reward, a reference model and its KL penalty, top-k or full-vocabulary
divergences, an inference server, learning-rate schedules, logging services (metrics.jsonl is the log).
"""

import argparse, contextlib, dataclasses, datetime, difflib, hashlib, json, math, os, re, resource, shutil
import signal, socket, sys, threading, time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer


# ---------------------------------------------------------------------------------------------------------
# The method: pure tensor functions, no models, no globals
# ---------------------------------------------------------------------------------------------------------

def upcast(x):
    """bfloat16 and float16 become float32, float32 and float64 stay: no likelihood is computed in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def response_mask(tokens, eos_ids):
    """True up to and including the first end of sequence. tokens [B, T], eos_ids: ints -> [B, T] bool.

    By position, not by value: with pad == eos a comparison with the pad id would lose the real EOS, and that
    token is the one that teaches the student to stop.
    """
    is_eos = torch.isin(tokens, torch.tensor(sorted(eos_ids), device=tokens.device)).long()
    return is_eos.cumsum(1) - is_eos == 0  # no EOS strictly before this token


def trajectory_scores(teacher_log_probs, response_mask):
    """s = (1/|y|) sum_t log pi_T(y_t): how likely the teacher finds each trajectory, per token.

    teacher_log_probs [B, T], response_mask [B, T] -> scores [B] in nats per token. A row without a response
    scores minus infinity: an empty mean of 0 would be the best score there is.
    """
    mask = response_mask.bool()
    lengths = mask.sum(1)  # [B]
    total = upcast(teacher_log_probs).masked_fill(~mask, 0).sum(1)  # [B]
    return torch.where(lengths > 0, total / lengths.clamp(min=1), -torch.inf)


def filter_trajectories(scores, percentile):
    """Filter: keep the trajectories with s >= the `percentile` quantile of all finite scores.

    scores [B] of the WHOLE step: the quantile of a micro-batch of one is that one, and nothing is filtered.
    percentile in [0, 100], else ValueError -> keep [B] bool. The quantile is interpolated linearly; ties with
    it stay, 0 keeps every finite score, NaN and infinite scores are never kept.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be in [0, 100], got {percentile}")
    finite = scores.isfinite()
    if not finite.any():
        return finite
    ordered = scores[finite].double().sort().values  # [n]
    rank = percentile * (len(ordered) - 1) / 100  # in this order, exact where the quantile is a score
    low, high = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return finite & (scores >= low + (rank - math.floor(rank)) * (high - low))


def token_weights(teacher_entropy, student_entropy, response_mask, alpha=1.0, beta=1.0, scope="trajectory"):
    """Reweight: w_t = (1 + alpha c_t) (1 + beta u_t), divided by its mean over the scope's valid tokens.

    Teacher confidence c_t = clamp(1 - H_T,t / max_t H_T, 0, 1): a teacher that hesitates teaches little.
    Student confusion  u_t = clamp(H_S,t / max_t H_S, 0, 1): where the student hesitates it has most to learn.
    Entropies in nats and response_mask, all [B, T] -> weights [B, T], zero off the mask, without gradient.
    scope: "trajectory" (max and mean per row) or "batch" (pooled over all rows; mask out rows that are not
    to count). Any other scope is a ValueError.
    """
    if scope not in ("trajectory", "batch"):
        raise ValueError(f"scope must be 'trajectory' or 'batch', got {scope!r}")
    dims = 1 if scope == "trajectory" else (0, 1)
    mask = response_mask.bool()

    def relative(entropy):  # H / max H in [0, 1]; 0 / 0 is 0
        entropy = upcast(entropy.detach()).masked_fill(~mask, 0)
        largest = entropy.amax(dims, keepdim=True).clamp(min=torch.finfo(entropy.dtype).tiny)
        return (entropy / largest).clamp(0, 1)

    confidence, confusion = 1 - relative(teacher_entropy), relative(student_entropy)  # [B, T]
    weights = ((1 + alpha * confidence) * (1 + beta * confusion)).masked_fill(~mask, 0)
    # Mean 1 keeps the step size of plain distillation: the weights only move it from token to token.
    return weights * mask.sum(dims, keepdim=True) / weights.sum(dims, keepdim=True).clamp(min=1e-12)


def policy_loss(log_probs, old_log_probs, teacher_log_probs, weights, mask, num_tokens, clip_ratio=0.2):
    """-(1/num_tokens) sum over mask of min(r_t w_t A_t, clip(r_t, 1-eps, 1+eps) w_t A_t) -> scalar.

    A_t = log pi_T(y_t) - log pi_S_old(y_t), detached: the k1 estimate of minus the reverse KL(pi_S || pi_T)
    at this token. r_t = pi_S / pi_S_old is 1 in value, but not in gradient, when old_log_probs are this very
    pass's: then the loss is plain REINFORCE. All tensors [B, T], in nats; num_tokens is the count of kept
    tokens of the whole step, over all micro-batches and ranks. Their losses and gradients ADD: dividing each
    by its own count would weigh the tokens of a short micro-batch more than those of a long one.
    """
    mask = mask.bool()

    def valid(x):  # masked before exp(): an infinity off the mask would make the gradient 0 * inf = NaN
        return upcast(x).masked_fill(~mask, 0)

    advantages = valid(weights.detach()) * valid((teacher_log_probs - old_log_probs).detach())  # [B, T]
    ratio = (valid(log_probs) - valid(old_log_probs.detach())).exp()  # [B, T]
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages)
    return -objective.sum() / num_tokens


class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden W^T / temperature)[target] and its entropy, a chunk of tokens at a time.

    At 152 k entries the logits of 8,192 tokens are 5 GB, several times over with their gradient: the largest
    tensors of the run by far. Here they live for one chunk, and backward computes them a second time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        log_probs, entropy, w = [], [], weight.to(dtype)
        for h, y in zip(hidden.to(dtype).split(chunk), targets.split(chunk)):
            logits = upcast(h @ w.T).div_(temperature)  # [chunk, V]
            logits -= logits.logsumexp(1, keepdim=True)  # now log-probs
            log_probs.append(logits.gather(1, y[:, None])[:, 0])
            entropy.append(-torch.linalg.vecdot(logits.exp(), logits))
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, dtype
        entropy = torch.cat(entropy)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(log_probs), entropy

    @staticmethod
    def backward(ctx, grad_log_probs, _):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden, w = torch.empty_like(hidden), weight.to(ctx.dtype)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        chunks = (x.split(ctx.chunk) for x in (hidden.to(ctx.dtype), targets, grad_log_probs, grad_hidden))
        for h, y, g, grad_h in zip(*chunks):
            p = upcast(h @ w.T).div_(ctx.temperature).softmax(1)  # [chunk, V]
            # d log p(y) / d logits = (onehot(y) - p) / temperature
            grad = p.mul_(-g[:, None]).scatter_add_(1, y[:, None], g[:, None].to(p.dtype))
            grad = grad.div_(ctx.temperature).to(ctx.dtype)
            grad_h.copy_(grad @ w)
            if grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.T, h)
            else:
                grad_weight += grad.T @ h
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def token_log_probs_and_entropy(hidden, lm_head_weight, targets, temperature=1.0, chunk=128):
    """log pi(target_n) and H_n of pi = softmax(hidden W^T / temperature), never whole over [N, V].

    hidden [N, D], lm_head_weight [V, D], targets [N] -> log_probs [N] (differentiable) and
    entropy [N] (not), in nats.
    """
    return ChunkedLogProbs.apply(hidden, lm_head_weight, targets, temperature, chunk)


def sample_tokens(logits, uniforms, temperature=1.0):
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u is a draw from pi.

    logits [B, V], uniforms [B] in [0, 1) -> tokens [B], log_probs [B]. Given u the sampler is a function: no
    generator state to save, share or restore. The sum is in float64 and u is scaled by its end: in float32 a
    sum over 152 k entries ends short of 1, and a u beyond its end would be no token at all.
    """
    probs = (upcast(logits) / temperature).softmax(1)
    cdf = probs.cumsum(1, dtype=torch.float64)  # [B, V]
    end = cdf[:, -1]
    point = torch.minimum(uniforms.double() * end, torch.nextafter(end, torch.zeros_like(end)))
    tokens = torch.searchsorted(cdf, point[:, None], right=True)  # [B, 1]; right: skips probability 0
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


# ---------------------------------------------------------------------------------------------------------
# Settings: each is named, typed and bounded here, once; flags, JSON keys, --help and errors follow
# ---------------------------------------------------------------------------------------------------------

def setting(default, group, text, low=None, high=None, above=None, choices=None):
    """A field of Config: low and high are inclusive bounds, above an exclusive one."""
    return field(default=default, metadata=dict(group=group, text=text, low=low, high=high, above=above,
                                                choices=choices))


@dataclass
class Config:
    config: str = setting("", "run", "JSON file with any of these settings; the command line wins over it")
    output_dir: str = setting("", "run", "new folder for metrics and checkpoints [default: runs/<time>]")
    resume: bool = setting(False, "run", "continue the newest checkpoint in --output-dir")
    steps: int = setting(100, "run", "steps; 0 checks everything, evaluates and stops", low=0)
    seed: int = setting(0, "run", "of prompt order, sampling and the tiny pair", low=0)
    device: str = setting("auto", "run", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    dtype: str = setting("auto", "run", "compute type; the student's parameters are float32 in any case [auto: "
                         "bfloat16 on cuda, else float32]", choices=("auto", "float32", "bfloat16"))

    teacher: str = setting("", "models", "checkpoint folder or hub name; for several teachers repeat NAME=PATH")
    student: str = setting("", "models", "checkpoint folder or hub name")
    trust_remote_code: bool = setting(False, "models", "run model code that a checkpoint brings along")
    shard: bool = setting(False, "models", "shard student, optimizer and teachers over the ranks (FSDP2), not DDP")
    gradient_checkpointing: bool = setting(False, "models", "recompute activations: less memory, more time")

    prompts: str = setting("", "data", "JSON Lines: prompt or problem; optional answer, teacher, group")
    eval_prompts: str = setting("", "data", "held-out prompts in the same format")
    chat_template: str = setting("auto", "data", "auto: the tokenizer's, if any", choices=("auto", "none"))
    enable_thinking: bool = setting(False, "data", "passed on to the chat template")
    max_prompt_tokens: int = setting(1024, "data", "longer prompts are dropped", low=1)

    batch_size: int = setting(64, "rollout", "rollouts a step, over all ranks", low=1)
    rollouts_per_prompt: int = setting(1, "rollout", "rollouts of each prompt in a step", low=1)
    max_new_tokens: int = setting(1024, "rollout", "longest response, in tokens", low=1)
    temperature: float = setting(1.0, "rollout", "of student and teacher, sampling and scoring", above=0)
    rollout_batch_size: int = setting(64, "rollout", "rows generated at once on a rank", low=1)

    filter_percentile: float = setting(20.0, "method", "share of trajectories to drop, in %", low=0, high=100)
    filter_by: str = setting("likelihood", "method", "the teacher's likelihood, or random (a control)",
                             choices=("likelihood", "random"))
    filter_scope: str = setting("step", "method", "one quantile over the step, or one for each teacher's rows",
                                choices=("step", "teacher"))
    alpha: float = setting(1.0, "method", "strength of teacher confidence in the weights", low=0)
    beta: float = setting(1.0, "method", "strength of student confusion in the weights", low=0)
    token_weights: str = setting("soft", "method", "soft, hard (the top half of the tokens by the same weight) or "
                                 "shuffled within each trajectory (a control)",
                                 choices=("soft", "hard", "shuffled"))
    loss_agg: str = setting("token-mean", "method", "mean over kept tokens, or over trajectories of their means",
                            choices=("token-mean", "seq-mean"))
    clip_ratio: float = setting(0.2, "method", "eps of the clipped objective", low=0, high=1)
    updates_per_rollout: int = setting(1, "method", "mini-batches, one AdamW step each, made of a step's rollouts",
                                       low=1)

    lr: float = setting(1e-6, "optimizer", "constant learning rate of AdamW, betas 0.9 and 0.999", above=0)
    weight_decay: float = setting(0.01, "optimizer", "decoupled weight decay", low=0)
    max_grad_norm: float = setting(1.0, "optimizer", "clip the gradient to this norm", above=0)
    micro_batch_tokens: int = setting(8192, "optimizer", "tokens in a forward pass; lower it if memory runs out",
                                      low=1)

    eval_every: int = setting(0, "watch", "steps between evaluations [0: before and after only]", low=0)
    eval_samples: int = setting(256, "watch", "held-out prompts in an evaluation", low=1)
    save_every: int = setting(0, "watch", "steps between checkpoints [0: the last only]", low=0)
    keep: int = setting(2, "watch", "checkpoints to keep", low=1)
    show: int = setting(1, "watch", "rollouts to print at the first and last step", low=0)

    compare: bool = setting(False, "compare", "train every arm (OPD, FiRe-OPD, controls) and print the table")
    seeds: int = setting(5, "compare", "seeds to compare over, from --seed on", low=1)
    regime: str = setting("foreign", "compare", "which tiny task, of those in tiny_config.json")
    tiny: dict = setting(None, "compare", "JSON only: how the tiny teacher and student are made")


SETTINGS = {f.name: f for f in dataclasses.fields(Config)}
# A resumed run may differ in these; rollout_batch_size and micro_batch_tokens change the last bits of floats.
MAY_DIFFER = {"config", "output_dir", "resume", "steps", "device", "eval_every", "save_every", "keep", "show",
              "rollout_batch_size", "micro_batch_tokens"}


# Randomness is a function of (seed, purpose, ...), drawn where it is needed: nothing to save, share or restore.
SAMPLE, EVALUATE, ORDER, FILTER, SHUFFLE = range(5)


class UserError(Exception):
    """What is wrong, where, and what to do, in one line."""


@contextlib.contextmanager
def explain(what, advice):
    """Turn whatever a library raises on a user's file into one line. One mechanism, instead of a branch a case."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{what}: {type(error).__name__}: {reason}; {advice}") from error


def checked(name, value, where):
    """`value` of the setting `name` converted to its type and checked against its bounds; else a UserError."""
    if name not in SETTINGS:
        near = difflib.get_close_matches(name, SETTINGS, 1, cutoff=0)[0]
        raise UserError(f"{where}: unknown setting {name!r}; the nearest known one is {near!r}")
    kind, m = SETTINGS[name].type, SETTINGS[name].metadata
    try:
        if isinstance(value, str) and kind in (int, float):  # from the command line
            value = kind(value)
        if kind is float and type(value) is int:
            value = float(value)
        in_bounds = (type(value) is kind and not (kind is float and not math.isfinite(value))
                     and (m["low"] is None or value >= m["low"]) and (m["high"] is None or value <= m["high"])
                     and (m["above"] is None or value > m["above"])
                     and (not m["choices"] or value in m["choices"]))
    except ValueError:
        in_bounds = False
    if not in_bounds:
        bounds = [f"one of {', '.join(m['choices'])}"] if m["choices"] else [kind.__name__]
        bounds += [f"{word} {m[key]}" for key, word in (("low", ">="), ("above", ">"), ("high", "<="))
                   if m[key] is not None]
        raise UserError(f"{where}: {name} must be {' and '.join(bounds)}, got {value!r}")
    return value


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"command line: {message}; see --help")


def parse_config(argv):
    """Defaults, then the JSON file, then the command line. No models and no --config means the tiny default."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=108))
    groups = {}
    for name, f in SETTINGS.items():
        group, default = f.metadata["group"], f.default
        group = groups.setdefault(group, parser.add_argument_group(group))
        text = f.metadata["text"].replace("%", "%%") + (f" [{default}]" if f.type is not bool and default != "" else "")
        if f.type is bool:
            group.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, help=text)
        elif f.type is not dict:
            group.add_argument(f"--{name.replace('_', '-')}", metavar=f.type.__name__.upper(), help=text,
                               **({"action": "append"} if name == "teacher" else {}))
    flags, unknown = parser.parse_known_args(argv)
    flags = vars(flags)
    if unknown:
        checked(unknown[0].lstrip("-").split("=")[0].replace("-", "_"), None, "command line")
    if "teacher" in flags:
        flags["teacher"] = ",".join(flags["teacher"])
    path = flags.get("config", "")
    if not path and not flags.keys() & {"teacher", "student", "prompts"}:
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tiny_config.json")
    values = {}
    if path:
        with explain(f"config {path}", "it must be a JSON object of settings"):
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
            values = {name: checked(name, value, path) for name, value in values.items()}
    values |= {name: checked(name, value, "command line") for name, value in flags.items()}
    if values.get("tiny"):  # a regime's own settings lie between the JSON file and the command line
        with explain(f"config {path}", "tiny.regimes names the tiny tasks"):
            regime = values.get("regime", Config.regime)
            if regime not in values["tiny"]["regimes"]:
                raise UserError(f"{path}: no tiny task {regime!r}; it has {', '.join(values['tiny']['regimes'])}")
            own = values["tiny"]["regimes"][regime]["settings"].items()
            values |= {name: checked(name, value, path) for name, value in own if name not in flags}
    config = Config(**values)
    config.config = path
    missing = [f"--{name}" for name in ("teacher", "student", "prompts") if not getattr(config, name)]
    if missing and not (config.tiny and len(missing) == 3):
        raise UserError(f"command line: --teacher, --student and --prompts go together; add {', '.join(missing)}")
    if config.batch_size % config.rollouts_per_prompt or config.batch_size % world_size():
        raise UserError(f"batch_size {config.batch_size} must be divisible by rollouts_per_prompt "
                        f"{config.rollouts_per_prompt} and by the number of ranks {world_size()}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("command line: --device cuda, but torch sees no GPU; use --device cpu or install a CUDA build")
    if config.resume and not config.output_dir:
        raise UserError("command line: --resume needs --output-dir, the folder of the run to continue")
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.dtype == "auto":
        config.dtype = "bfloat16" if config.device == "cuda" else "float32"
    return config


# ---------------------------------------------------------------------------------------------------------
# Ranks, signals, output
# ---------------------------------------------------------------------------------------------------------

def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def share(table):
    """Sum a CPU tensor over the ranks, in place. Each rank fills its own rows of a zeroed [B, T] table, so the
    sum is the whole table, to the bit: from here on every rank computes the same filter, weights and metrics."""
    if dist.is_initialized():
        dist.all_reduce(table)
    return table


def barrier():
    share(torch.zeros(1))


STOP = threading.Event()  # set by SIGTERM or SIGINT, looked at between the pieces of work of a step


def on_signal(number, frame):
    if STOP.is_set():  # the second one ends at once
        os._exit(128 + number)
    STOP.set()


def visible(text):
    """Control characters spelled out: no prompt or rollout can move the terminal's cursor."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def say(text=""):
    if rank() == 0:
        tqdm.write(visible(text))
        sys.stdout.flush()


def note(status, text):
    """A line of the preflight report: ok, a warning with what follows from it, or an error, which ends the run."""
    if status == "error":
        raise UserError(text)
    say(f"{status:>8}  {text}")


def progress(total, label):
    return tqdm(total=total, desc=label, disable=rank() != 0 or not sys.stderr.isatty(), leave=False,
                dynamic_ncols=True)


# ---------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------

@dataclass
class Prompt:
    ids: list  # token ids, what the student and its teacher both see
    answer: str  # None if unknown
    teacher: str  # the name of the teacher that grades it
    group: str  # evaluation figures are also given per group


def read_jsonl(path):
    """(line number, object) of each line that is not blank."""
    with explain(f"prompts {path}", "give a readable JSON Lines file"), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                with explain(f"{path} line {number}", "each line must be one JSON object in UTF-8"):
                    row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise UserError(f"{path} line {number}: not a JSON object; write {{\"prompt\": \"...\"}}")
                yield number, row


def render(prompt, tokenizer, config):
    """The text that the model continues: through the chat template if there is one and it is wanted."""
    if isinstance(prompt, str):
        if config.chat_template == "none" or not tokenizer.chat_template:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if config.chat_template == "none" or not tokenizer.chat_template:
        raise UserError("a list of messages needs a tokenizer with a chat template and --chat-template auto")
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True,
                                         enable_thinking=config.enable_thinking)


def load_prompts(path, tokenizer, config, teachers):
    """Read, render and tokenize a prompt file; every fault names its line. -> list of Prompt."""
    prompts, too_long, longest = [], 0, 0
    for number, row in read_jsonl(path):
        where = f"{path} line {number}"
        prompt = next((row[key] for key in ("prompt", "problem", "messages") if row.get(key)), None)
        if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
            prompt = prompt[:-1] if prompt[-1].get("role") == "assistant" else prompt  # an SFT row: drop its reply
        if not prompt or not isinstance(prompt, (str, list)):
            raise UserError(f"{where}: no prompt; give 'prompt' (a string or a list of messages) or 'problem'")
        for key in ("answer", "teacher", "group"):
            if not isinstance(row.get(key, ""), (str, type(None))):
                raise UserError(f"{where}: {key!r} must be a string, got {row[key]!r:.60}; put it in quotes")
        teacher = row.get("teacher") or (teachers[0] if len(teachers) == 1 else None)
        if teacher not in teachers:
            raise UserError(f"{where}: teacher {teacher!r} is not one of {', '.join(teachers)}; "
                            f"name it with --teacher NAME=PATH or mend the row")
        with explain(where, "the prompt could not be rendered and tokenized; mend the row or the chat template"):
            # A rendered template holds its special tokens already: adding more would double the BOS.
            text = render(prompt, tokenizer, config)
            plain = text is prompt
            ids = tokenizer(text, add_special_tokens=plain, verbose=False)["input_ids"]
        if not ids:
            raise UserError(f"{where}: the prompt has no tokens; remove the line")
        longest = max(longest, len(ids))
        if len(ids) > config.max_prompt_tokens:
            too_long += 1
            continue
        prompts.append(Prompt(list(ids), row.get("answer"), teacher, row.get("group") or ""))
    if not prompts:
        raise UserError(f"{path}: {'all prompts are' if too_long else 'holds no prompt'}"
                        + (f" longer than --max-prompt-tokens {config.max_prompt_tokens} (longest {longest})"
                           if too_long else "") + "; nothing is left to train on")
    counts = Counter(p.teacher for p in prompts)
    note("warning" if too_long else "ok", f"{path}: {len(prompts)} prompts of {min(len(p.ids) for p in prompts)} to "
         f"{max(len(p.ids) for p in prompts)} tokens, " + ", ".join(f"{n} for teacher {t}" for t, n in counts.items())
         + (f"; {too_long} longer than {config.max_prompt_tokens} dropped" if too_long else ""))
    return prompts


# ---------------------------------------------------------------------------------------------------------
# Models: a policy scores responses and samples them
# ---------------------------------------------------------------------------------------------------------

class UniformSampler:
    """A logits processor that leaves `generate` one choice: the inverse-CDF draw from the row's own uniforms."""

    def __init__(self, uniforms, prompt_width, temperature, vocab_size):
        self.uniforms, self.prompt_width = uniforms, prompt_width  # [b, T]
        self.temperature, self.vocab_size = temperature, vocab_size
        self.log_probs = torch.zeros_like(uniforms, dtype=torch.float32)  # [b, T], filled while sampling
        self.rows = torch.arange(len(uniforms), device=uniforms.device)  # those still being written

    def __call__(self, input_ids, logits):  # [n, L], [n, V] -> [n, V]
        t = input_ids.shape[1] - self.prompt_width
        # Embeddings are padded to round sizes: rows beyond the vocabulary are no tokens.
        tokens, log_probs = sample_tokens(logits[:, :self.vocab_size], self.uniforms[self.rows, t], self.temperature)
        self.log_probs[self.rows, t] = log_probs.float()
        return torch.zeros_like(logits).scatter_(1, tokens[:, None], 1)  # generate is greedy: it takes the 1


class Policy(nn.Module):
    """A causal LM as the method sees it, teacher or student: `forward` scores responses, `sample` writes them."""

    SEGMENT = 64  # tokens between two looks at which rows have ended

    def __init__(self, model, vocab_size, config):
        super().__init__()
        self.model, self.vocab_size, self.temperature = model, vocab_size, config.temperature
        self.bf16 = config.dtype == "bfloat16"
        self.chunk = 128 if config.device == "cpu" else 1024
        self.checkpointed = []

    def autocast(self):
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def forward(self, ids, response):
        """log pi(y_t) and H_t of every response token. ids [b, L], response [b, L] bool -> two [n], row by row."""
        for layer in self.checkpointed:  # transformers checkpoints in training mode only; dropout stays off
            layer.training = torch.is_grad_enabled()
        with self.autocast():
            # Padding is on the right, where a causal model's real tokens cannot see it: no attention mask needed.
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [b, L, D]
            hidden = hidden[:, :-1][response[:, 1:]]  # [n, D]: position t - 1 predicts token t
            weight = self.model.get_output_embeddings().weight[:self.vocab_size]  # [V, D]
            return token_log_probs_and_entropy(hidden, weight, ids[response], self.temperature, self.chunk)

    @torch.no_grad()
    def sample(self, prompts, uniforms, eos_ids, pad_id):
        """Write one response to each prompt. prompts: b lists of ids, uniforms [b, T] -> tokens, log_probs [b, T].

        `generate` runs in segments; rows that have ended leave the batch and its cache between them, so that a
        long-tailed batch does not pay for its longest row b times. Positions follow from the attention mask,
        which left padding needs. Tokens after a row's EOS are meaningless: see response_mask.
        """
        (b, length), width, device = uniforms.shape, max(map(len, prompts)), self.model.device
        ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)  # [b, width]
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        tokens = torch.full((b, length), pad_id, device=device)
        sampler = UniformSampler(uniforms.to(device), width, self.temperature, self.vocab_size)
        cache, eos = DynamicCache(config=self.model.config), torch.tensor(sorted(eos_ids), device=device)
        for layer in self.checkpointed:
            layer.training = False
        with self.autocast():  # its cached bf16 weights serve all tokens of this call
            while len(ids) and (done := ids.shape[1] - width) < length and not STOP.is_set():
                ids = self.model.generate(ids, attention_mask=attention, past_key_values=cache,
                                          logits_processor=[sampler],
                                          max_new_tokens=min(self.SEGMENT, length - done))
                new = ids[:, width + done:]  # [n, <= SEGMENT]
                tokens[sampler.rows, done:done + new.shape[1]] = new
                open_rows = ~torch.isin(new, eos).any(1)
                attention = torch.cat([attention, torch.ones_like(new)], 1)[open_rows]
                ids, sampler.rows = ids[open_rows], sampler.rows[open_rows]
                if not open_rows.all():
                    cache.batch_select_indices(open_rows.nonzero()[:, 0])
        return tokens.cpu(), sampler.log_probs.cpu()


def fetch(name, what):
    """The local folder of a checkpoint: itself, or the snapshot of a hub name. Safetensors only, never pickles."""
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UserError(f"{what} {name}: no such folder; give a checkpoint folder or a hub name such as Qwen/Qwen3-0.6B")
    import huggingface_hub
    host = huggingface_hub.constants.ENDPOINT.split("//")[-1].split("/")[0]
    try:  # the hub's client retries for most of a minute before it says that there is no network
        socket.create_connection((host, 443), 5).close()
        offline = False
    except OSError:
        offline = True
    trouble = f"; {host} cannot be reached and the local cache lacks it" if offline else ""
    with explain(f"{what} {name}", f"no folder of this name{trouble}; check the name and the network"):
        return huggingface_hub.snapshot_download(name, local_files_only=offline, ignore_patterns=["*.bin", "*.pt*"])


@dataclass
class Run:
    """What a run holds: made by `load`, used by every phase."""
    config: Config
    tokenizer: object
    student: Policy = None
    trained: nn.Module = None  # the student as the update sees it: plain, in DDP, or sharded
    teachers: dict = None  # name -> Policy
    optimizer: torch.optim.Optimizer = None
    generation_config: object = None  # the checkpoint's own, kept for saving
    prompts: list = None
    eval_prompts: list = None
    eos_ids: set = None
    pad_id: int = 0
    step: int = 0


def teacher_paths(config):
    """{"math": PATH, "code": PATH} from --teacher math=PATH --teacher code=PATH; one bare PATH is {"teacher": PATH}."""
    named = {}
    for entry in config.teacher.split(","):
        name, equals, path = entry.partition("=")
        if not equals or os.path.exists(entry) or "/" in name:
            name, path = "teacher", entry
        if name in named or not path:
            raise UserError(f"command line: --teacher {entry!r}: give each teacher a NAME=PATH of its own")
        named[name] = path
    return named


def shared_vocabulary(student, teacher, name):
    """How many ids both tokenizers know, checked id by id. The widths of the embeddings prove nothing: they are
    padded, differently from size to size, and two of the same width can hold different tokens."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()  # token -> id
    their_ids = set(theirs.values())
    wrong = sorted((i, token) for token, i in ours.items() - theirs.items() if token in theirs or i in their_ids)
    if wrong:
        examples = " and ".join(f"{token!r} (student {i}, teacher {theirs.get(token)})" for i, token in wrong[:2])
        raise UserError(f"teacher {name}: {len(wrong)} of the student's {len(ours)} tokens have another id or none in "
                        f"the teacher's vocabulary, such as {examples}; choose a pair with one vocabulary")
    common = 1 + max((i for _, i in ours.items() & theirs.items()), default=-1)
    same = len(ours) == len(theirs)
    note("ok" if same else "warning", f"vocabulary of teacher {name}: {len(theirs)} ids, student {len(ours)}"
         + ("" if same else f": only the first {common} are sampled and graded"))
    return common


def end_ids(model, tokenizer, config):
    """Every id that ends a response: the checkpoint's own, and the chat template's end of turn, which a Base
    checkpoint may not list; it would then run on to the length limit where its teacher stops."""
    ids = set()
    for source in (model.generation_config, model.config, tokenizer):
        listed = getattr(source, "eos_token_id", None)
        ids |= {listed} if isinstance(listed, int) else set(listed or ())
    if tokenizer.chat_template and config.chat_template == "auto":
        with contextlib.suppress(Exception):  # a template that cannot render a reply has no end of turn to offer
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "@reply@"}]
            tail = tokenizer.apply_chat_template(turns, tokenize=False).split("@reply@")[-1]
            first = tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
            ids |= set(first) & set(tokenizer.all_special_ids)
    return ids


def load(config):
    """Check everything cheap, then load everything slow. -> Run, with every line of the preflight printed."""
    paths = teacher_paths(config)
    folders = {name: fetch(path, f"teacher {name}") for name, path in paths.items()}
    student_folder = fetch(config.student, "student")
    local = dict(local_files_only=True, trust_remote_code=config.trust_remote_code)

    def load_tokenizer(folder):
        with explain(f"tokenizer of {folder}", "give a complete checkpoint folder, tokenizer included"):
            return AutoTokenizer.from_pretrained(folder, **local)

    run = Run(config, load_tokenizer(student_folder))
    tokenizers = {name: load_tokenizer(folder) for name, folder in folders.items()}
    vocab_size = min(shared_vocabulary(run.tokenizer, tokenizers[name], name) for name in folders)
    run.prompts = load_prompts(config.prompts, run.tokenizer, config, list(folders))
    run.eval_prompts = []
    if config.eval_prompts:
        run.eval_prompts = load_prompts(config.eval_prompts, run.tokenizer, config, list(folders))
        run.eval_prompts = run.eval_prompts[:config.eval_samples]
    else:
        note("warning", "no --eval-prompts: nothing held out is evaluated, only the training metrics will tell")
    shown = run.prompts[0].ids
    note("ok", f"first prompt, {len(shown)} tokens: {run.tokenizer.decode(shown)!r}")
    for name, tokenizer in tokenizers.items():
        if tokenizer.chat_template != run.tokenizer.chat_template and config.chat_template == "auto":
            note("warning", f"the chat template of teacher {name} differs: it grades prompts rendered by the student's")
    open_output(config)

    def load_model(folder, what, dtype):
        with explain(f"{what} {folder}", "give a complete safetensors checkpoint of a causal LM"):
            model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True,
                                                               output_loading_info=True, **local)
            if info["missing_keys"]:
                raise ValueError(f"{len(info['missing_keys'])} weights are missing, first {min(info['missing_keys'])}")
            if model.get_output_embeddings().weight.shape[0] < vocab_size:
                raise ValueError(f"fewer output rows than the {vocab_size} tokens of the vocabulary")
        return model.to(config.device).eval()  # no dropout: the policy that is trained is the one that wrote

    # AdamW at 1e-6 on bf16 weights rounds nearly every update away: float32 masters, bf16 only in autocast.
    student = load_model(student_folder if not config.resume else newest_checkpoint(config), "student", torch.float32)
    run.eos_ids = {i for i in end_ids(student, run.tokenizer, config) if i < vocab_size}
    run.pad_id = run.tokenizer.pad_token_id if run.tokenizer.pad_token_id is not None else min(run.eos_ids, default=0)
    run.generation_config = student.generation_config
    ignored = {k: v for k, v in student.generation_config.to_diff_dict().items()
               if v is not None and not k.endswith("token_id") and k not in ("transformers_version", "_from_model_config")}
    note("ok", f"sampling is exactly softmax(logits / {config.temperature}); of the checkpoint's generation config "
         f"ignored: {ignored or 'nothing'}")
    # An unset field of a passed config is filled from the checkpoint's (top_k 20, repetition penalties): replace it.
    student.generation_config = GenerationConfig(do_sample=False, eos_token_id=sorted(run.eos_ids) or None,
                                                 pad_token_id=run.pad_id)
    run.student = Policy(student, vocab_size, config)
    run.teachers = {}
    for name, folder in folders.items():
        for turn in range(world_size()):  # in turns: a large teacher in host memory once, not once a rank
            if turn == rank():
                model = load_model(folder, f"teacher {name}", torch.float32 if config.dtype == "float32" else "auto")
            barrier()
        theirs = {i for i in end_ids(model, tokenizers[name], config) if i < vocab_size}
        note("ok" if theirs == run.eos_ids else "warning", f"end of sequence: student {sorted(run.eos_ids)}, teacher "
             f"{name} {sorted(theirs)}" + ("" if theirs == run.eos_ids else ": rollouts stop at the student's only; "
                                           "a teacher that stops elsewhere may push their length up"))
        run.teachers[name] = Policy(model.requires_grad_(False), vocab_size, config)
    if not run.eos_ids:
        note("warning", "the student has no end-of-sequence id: every response will have --max-new-tokens tokens")
    prepare_for_training(run)
    return run


def prepare_for_training(run):
    """Wrap the student for the ranks and give it its optimizer."""
    config, run.trained = run.config, run.student
    if config.gradient_checkpointing:
        model = run.student.model
        # renamed in transformers 5.22, where the older name warns
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        run.student.checkpointed = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if config.shard and world_size() > 1:
        mesh = init_device_mesh(config.device, (world_size(),))
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if config.dtype == "bfloat16" else None
        # The student stays whole from its first sampled token to the backward pass (its bf16 copy, under
        # autocast): gathering it for each token would cost more than the memory is worth. Teachers do not.
        for policy, whole in [(run.student, True), *((teacher, False) for teacher in run.teachers.values())]:
            extra = dict(mesh=mesh, reshard_after_forward=not whole, **({"mp_policy": half} if whole and half else {}))
            for module in list(policy.modules()):
                if type(module).__name__ in (policy.model._no_split_modules or ()):
                    fully_shard(module, **extra)
            # The root is the policy, not the inner model: it owns the head, which may be tied to the embedding.
            fully_shard(policy, **extra)
        register_fsdp_forward_method(run.student, "sample")
    elif world_size() > 1:
        run.trained = DistributedDataParallel(run.student)
    run.optimizer = torch.optim.AdamW(run.student.parameters(), lr=config.lr, betas=(0.9, 0.999), fused=True,
                                      weight_decay=config.weight_decay)


# ---------------------------------------------------------------------------------------------------------
# One step: rollout, score, filter, reweight, update
# ---------------------------------------------------------------------------------------------------------

@dataclass
class Rollouts:
    """The trajectories of one step as [B, T] tables on the CPU, the same on every rank."""
    prompts: list  # B prompts
    tokens: torch.Tensor  # [B, T]
    mask: torch.Tensor  # [B, T] bool, the response mask
    ended: torch.Tensor  # [B] bool: stopped by itself; the others are truncated at max_new_tokens
    log_probs: torch.Tensor  # [B, T] log pi_S of the sampler
    teacher_log_probs: torch.Tensor = None  # [B, T]
    teacher_entropy: torch.Tensor = None  # [B, T]
    scores: torch.Tensor = None  # [B]
    keep: torch.Tensor = None  # [B] bool
    student_log_probs: torch.Tensor = None  # [B, T] of the training pass, kept rows only, as the next two
    student_entropy: torch.Tensor = None  # [B, T]
    weights: torch.Tensor = None  # [B, T]

    def lengths(self):
        """Prompt + response tokens of each row."""
        return [len(p.ids) + n for p, n in zip(self.prompts, self.mask.sum(1).tolist())]


def rollout(run, prompts, *key):
    """Step 1. One response to each prompt, written by the student. -> Rollouts, or None if the run is to stop.

    The uniforms of row i are a function of (seed, key, i) alone: not of the rank that writes it, nor of its
    batch, nor of what was sampled before. So 1, 2 and 4 ranks are the same run, every arm of a comparison meets
    the same randomness, and a resumed run has no generator to restore.
    """
    config = run.config
    tokens = torch.zeros(len(prompts), config.max_new_tokens, dtype=torch.long)  # [B, T]
    log_probs = torch.zeros(tokens.shape)  # [B, T]
    mine = list(range(rank(), len(prompts), world_size()))
    for start in range(0, len(mine), config.rollout_batch_size):
        rows = mine[start:start + config.rollout_batch_size]
        uniforms = np.stack([np.random.default_rng((config.seed, *key, i)).random(config.max_new_tokens) for i in rows])
        tokens[rows], log_probs[rows] = run.student.sample([prompts[i].ids for i in rows], torch.from_numpy(uniforms),
                                                           run.eos_ids, run.pad_id)
    if stopping():
        return None
    share(tokens), share(log_probs)
    mask = response_mask(tokens, run.eos_ids)
    width = int(mask.sum(1).max())
    tokens, mask, log_probs = tokens[:, :width], mask[:, :width], log_probs[:, :width]
    ended = (torch.isin(tokens, torch.tensor(sorted(run.eos_ids))) & mask).any(1)
    return Rollouts(prompts, tokens, mask, ended, log_probs.masked_fill(~mask, 0))


def stopping():
    """Whether any rank was told to stop: asked together, so that all of them leave the step at one place."""
    return bool(share(torch.tensor(float(STOP.is_set()))) > 0)


def micro_batches(rows, lengths, budget):
    """This rank's share of `rows`, cut into lists of at most `budget` tokens with padding (or of one row).

    Sorted by length, so that hardly anything is padding. Every rank gets the same number of lists, if need be
    empty ones: a rank that keeps no trajectory must still take part in every collective of the models.
    """
    ranks, cuts = world_size(), []
    most = -(-len(rows) // ranks)  # spread over all ranks before filling a budget
    for i in sorted(rows, key=lambda i: (-lengths[i], i)):
        if not cuts or len(cuts[-1]) == most or (len(cuts[-1]) + 1) * lengths[cuts[-1][0]] > budget:
            cuts.append([])
        cuts[-1].append(i)
    cuts += [[]] * (-len(cuts) % ranks)
    return cuts[rank()::ranks]


def pack(run, rollouts, rows):
    """Prompt + response of each row, padded on the right. -> ids [b, L], response [b, L] bool, on the device."""
    lengths, rows_lengths = rollouts.lengths(), rollouts.mask.sum(1).tolist()
    width = max([lengths[i] for i in rows], default=2)
    ids = torch.zeros(max(len(rows), 1), width, dtype=torch.long)  # an empty list becomes a row without response
    response = torch.zeros(ids.shape, dtype=torch.bool)
    for r, i in enumerate(rows):
        start = len(rollouts.prompts[i].ids)
        ids[r, :start] = torch.tensor(rollouts.prompts[i].ids)
        ids[r, start:lengths[i]] = rollouts.tokens[i, :rows_lengths[i]]
        response[r, start:lengths[i]] = True
    return ids.to(run.config.device), response.to(run.config.device)


def unpack(flat, mask):
    """[n] values, row by row, back into a [b, T] table with zeros off the mask; gradients pass."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


@torch.no_grad()
def score(run, rollouts):
    """Step 2. Each row's own teacher gives log pi_T(y_t) and H_T,t; then s. False if the run is to stop."""
    lengths = rollouts.lengths()
    rollouts.teacher_log_probs = torch.zeros(rollouts.mask.shape)
    rollouts.teacher_entropy = torch.zeros(rollouts.mask.shape)
    for name, teacher in run.teachers.items():
        rows = [i for i, p in enumerate(rollouts.prompts) if p.teacher == name]
        for micro in micro_batches(rows, lengths, run.config.micro_batch_tokens):
            log_probs, entropy = teacher(*pack(run, rollouts, micro))  # [n]
            rollouts.teacher_log_probs[micro] = unpack(log_probs.float().cpu(), rollouts.mask[micro])
            rollouts.teacher_entropy[micro] = unpack(entropy.float().cpu(), rollouts.mask[micro])
    share(rollouts.teacher_log_probs), share(rollouts.teacher_entropy)
    rollouts.scores = trajectory_scores(rollouts.teacher_log_probs, rollouts.mask)
    return not stopping()


def choose(config, rollouts, step):
    """Step 3. Which trajectories to keep: by the teacher's likelihood, or at random at the same rate."""
    scores = rollouts.scores
    if config.filter_by == "random":  # the control: other rows, the same number of them
        random = torch.from_numpy(np.random.default_rng((config.seed, FILTER, step)).random(len(scores)))
        scores = random.masked_fill(~scores.isfinite(), torch.nan)
    if config.filter_scope == "step":
        return filter_trajectories(scores, config.filter_percentile)
    keep = torch.zeros(len(scores), dtype=torch.bool)
    for name in {p.teacher for p in rollouts.prompts}:
        mine = torch.tensor([p.teacher == name for p in rollouts.prompts])
        keep[mine] = filter_trajectories(scores[mine], config.filter_percentile)
    return keep


def choose_weights(config, weights, mask, rows, step):
    """Step 4's alternatives to the soft weights [b, T], which stay as they are by default."""
    if config.token_weights == "soft":
        return weights
    chosen = torch.zeros_like(weights)
    for r, i in enumerate(rows):
        n = int(mask[r].sum())
        if config.token_weights == "hard":  # the top half by the same weight, all alike, mean 1
            half = -(-n // 2)
            chosen[r, weights[r, :n].argsort(descending=True)[:half]] = n / half
        else:  # the same weights on the wrong tokens
            order = torch.from_numpy(np.random.default_rng((config.seed, SHUFFLE, step, i)).permutation(n))
            chosen[r, :n] = weights[r, order.to(weights.device)]
    return chosen


def update(run, rollouts):
    """Steps 4 to 6 on the kept trajectories; the others never enter the student's forward. -> metrics.

    With one update a rollout the training pass is also the old policy: its own detached log-probs make the ratio
    exactly 1 and save a pass. With more, the old log-probs are the sampler's and the clip is live.
    """
    config, B = run.config, len(rollouts.prompts)
    kept, lengths = rollouts.keep.nonzero()[:, 0].tolist(), rollouts.lengths()
    for name in ("student_log_probs", "student_entropy", "weights"):
        setattr(rollouts, name, torch.zeros(rollouts.mask.shape))
    losses, norms, skipped = [], [], 0
    for part in range(config.updates_per_rollout):
        rows = kept[part::config.updates_per_rollout]
        # Counted over the whole mini-batch before it is cut: the gradient cannot depend on how it is cut.
        num_tokens = int(rollouts.mask[rows].sum()) if config.loss_agg == "token-mean" else len(rows)
        micros, total = micro_batches(rows, lengths, config.micro_batch_tokens), 0.0
        for number, micro in enumerate(micros):
            # Ranks exchange gradients once, in the last backward; no_sync must cover forward and backward.
            last = number == len(micros) - 1
            if config.shard and world_size() > 1:
                run.trained.set_requires_gradient_sync(last)
            with run.trained.no_sync() if isinstance(run.trained, DistributedDataParallel) and not last \
                    else contextlib.nullcontext():
                loss = micro_batch_loss(run, rollouts, micro, num_tokens)
                # DDP and FSDP average over the ranks what is to be summed: hence the factor.
                (loss * world_size()).backward()
            total += loss.item()
        total = share(torch.tensor(total)).item()
        norm = nn.utils.clip_grad_norm_(run.student.parameters(), config.max_grad_norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if rows and math.isfinite(total) and math.isfinite(norm):
            run.optimizer.step()
            losses.append(total), norms.append(norm)
        else:
            skipped += 1
        run.optimizer.zero_grad(set_to_none=True)
    for table in (rollouts.student_log_probs, rollouts.student_entropy, rollouts.weights):
        share(table)
    return dict(loss=mean(losses), grad_norm=mean(norms), skipped_updates=skipped)


def micro_batch_loss(run, rollouts, rows, num_tokens):
    """The student's pass over some trajectories, its weights and its share of the step's loss."""
    config, device = run.config, run.config.device
    log_probs, entropy = run.trained(*pack(run, rollouts, rows))  # [n] each
    mask = rollouts.mask[rows].to(device)  # [b, T]
    log_probs, entropy = unpack(log_probs, mask), unpack(entropy, mask)
    teacher_log_probs = rollouts.teacher_log_probs[rows].to(device)
    weights = token_weights(rollouts.teacher_entropy[rows].to(device), entropy, mask, config.alpha, config.beta)
    weights = choose_weights(config, weights, mask, rows, run.step)  # [b, T]
    old = log_probs.detach() if config.updates_per_rollout == 1 else rollouts.log_probs[rows].to(device)
    rollouts.student_log_probs[rows] = log_probs.detach().float().cpu()
    rollouts.student_entropy[rows] = entropy.float().cpu()
    rollouts.weights[rows] = weights.float().cpu()
    if config.loss_agg == "seq-mean":
        weights = weights / mask.sum(1, keepdim=True)
    return policy_loss(log_probs, old, teacher_log_probs, weights, mask, num_tokens, config.clip_ratio)


def mean(values):
    return sum(values) / len(values) if len(values) else math.nan


# ---------------------------------------------------------------------------------------------------------
# Metrics and evaluation
# ---------------------------------------------------------------------------------------------------------

def is_correct(response, answer):
    """Whether the last \\boxed{...} is the answer; without one, the whole response or its last number."""
    def clean(text):
        return re.sub(r"[\s$,]|\\left|\\right", "", text).rstrip(".")

    if (start := response.rfind("\\boxed{") + 7) >= 7:
        depth = np.cumsum([(c == "{") - (c == "}") for c in response[start:]])
        return clean(response[start:start + int((depth < 0).argmax())]) == clean(answer)
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", response)
    return response.strip() == answer.strip() or bool(numbers) and clean(numbers[-1]) == clean(answer)


def measure(run, rollouts):
    """Figures of a set of rollouts, from the tables alone: every rank computes the same. -> dict of floats."""
    scored = rollouts.scores.isfinite()
    mask, lengths = rollouts.mask & scored[:, None], rollouts.mask.sum(1).float()  # [B, T], [B]
    figures = dict(reverse_kl=(rollouts.log_probs - rollouts.teacher_log_probs)[mask].mean(),
                   score=rollouts.scores[scored].mean(), length=lengths.mean(),
                   truncated=1 - rollouts.ended.float().mean(), teacher_entropy=rollouts.teacher_entropy[mask].mean())
    answers = torch.tensor([p.answer is not None for p in rollouts.prompts])
    correct = torch.zeros(len(answers))
    for i in answers.nonzero()[:, 0].tolist():
        text = run.tokenizer.decode(rollouts.tokens[i][rollouts.mask[i]], skip_special_tokens=True)
        correct[i] = is_correct(text, rollouts.prompts[i].answer)
    if answers.any():
        figures["exact_match"] = correct[answers].mean()
    if rollouts.keep is None:  # an evaluation
        groups = [p.group for p in rollouts.prompts]
        for group in sorted(set(groups) - {""}):
            mine = torch.tensor([g == group for g in groups])
            figures[f"reverse_kl/{group}"] = (rollouts.log_probs - rollouts.teacher_log_probs)[mask & mine[:, None]].mean()
            if (answers & mine).any():
                figures[f"exact_match/{group}"] = correct[answers & mine].mean()
    else:
        keep = rollouts.keep
        kept = rollouts.mask & keep[:, None]
        log_ratio = rollouts.student_log_probs - rollouts.log_probs
        clipped = (log_ratio.exp() - 1).abs() > run.config.clip_ratio
        ordered, ranks = rollouts.weights.sort(1, descending=True).values, torch.arange(mask.shape[1])
        top = ranks < (lengths / 10).ceil()[:, None]  # [B, T] the heaviest tenth of each row
        figures |= dict(keep_ratio=keep.float().mean(),
                        reverse_kl_kept=(rollouts.student_log_probs - rollouts.teacher_log_probs)[kept].mean(),
                        student_entropy=rollouts.student_entropy[kept].mean(),
                        clip_fraction=(clipped & kept).sum() / kept.sum() if run.config.updates_per_rollout > 1 else 0.0,
                        weight_top_decile=((ordered * top).sum(1) / lengths)[keep].mean())
        for name, part in (("kept", keep), ("dropped", ~keep)):
            figures[f"length_{name}"] = lengths[part].mean()
            figures[f"truncated_{name}"] = 1 - rollouts.ended[part].float().mean()
            if (answers & part).any():
                figures[f"exact_match_{name}"] = correct[answers & part].mean()
        if len(run.teachers) > 1:
            for name in run.teachers:
                mine = torch.tensor([p.teacher == name for p in rollouts.prompts])
                figures[f"keep_ratio/{name}"] = keep[mine].float().mean()
    return {name: float(value) for name, value in figures.items()}


def evaluate(run):
    """Sample the held-out prompts, always with the same uniforms. -> figures, {} without prompts, None to stop."""
    if not run.eval_prompts:
        return {}
    rollouts = rollout(run, run.eval_prompts, EVALUATE)
    return measure(run, rollouts) if rollouts and score(run, rollouts) else None


def forward_flops(policy, rollouts, rows):
    """FLOPs of one forward pass of a dense transformer over these rows, its head on the responses only."""
    c = policy.model.config
    if not all(hasattr(c, name) for name in ("num_key_value_heads", "intermediate_size")) or hasattr(c, "num_experts"):
        return math.nan
    h, heads, d = c.hidden_size, c.num_attention_heads, getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    dense = c.num_hidden_layers * (h * d * 2 * (heads + c.num_key_value_heads) + 3 * h * c.intermediate_size)
    lengths = torch.tensor(rollouts.lengths(), dtype=torch.float64)[rows]
    return float(2 * dense * lengths.sum() + 2 * h * policy.vocab_size * rollouts.mask[rows].sum()
                 + 2 * c.num_hidden_layers * heads * d * (lengths ** 2).sum())


PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bf16, for MFU; an unknown device gives null


def speed(run, rollouts, seconds):
    """Seconds of each phase, response tokens/s, MFU of scoring (1 pass) and update (3 passes), peak memory."""
    total, cuda = sum(seconds.values()), run.config.device == "cuda"
    figures = {f"seconds_{name}": value for name, value in seconds.items()}
    figures["tokens_per_second"] = int(rollouts.mask.sum()) / total
    name = torch.cuda.get_device_name() if cuda else ""
    peak = next((tera * 1e12 * world_size() for key, tera in PEAK_TFLOPS.items() if key in name), math.nan)
    scored = sum(forward_flops(teacher, rollouts, [i for i, p in enumerate(rollouts.prompts) if p.teacher == name])
                 for name, teacher in run.teachers.items())
    trained = 3 * forward_flops(run.student, rollouts, rollouts.keep.nonzero()[:, 0].tolist())
    figures["mfu_score"], figures["mfu_update"] = (flops / seconds[phase] / peak for flops, phase in
                                                   ((scored, "score"), (trained, "update")))
    # ru_maxrss is in KB on Linux, in bytes on macOS
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)
    figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else host
    return figures


def show(run, rollouts):
    """Print some rollouts, the kept and the dropped ones, token by token: shaded by weight on a terminal, else
    as token(log pi_T, weight)."""
    if rank() != 0 or not run.config.show:
        return
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    say("rollouts, each token with the teacher's log-prob and its weight: token(log pi_T, w)"
        + ("; the darker, the heavier" if color else ""))
    rows = rollouts.keep.nonzero()[:, 0].tolist()[:(run.config.show + 1) // 2]
    rows += (~rollouts.keep).nonzero()[:, 0].tolist()[:run.config.show - len(rows)]
    for i in rows:
        text = []
        for t in range(min(int(rollouts.mask[i].sum()), 100)):
            token, w = visible(run.tokenizer.decode(rollouts.tokens[i, t:t + 1])).replace("\n", "\\n"), rollouts.weights[i, t]
            grade = f"{token}({rollouts.teacher_log_probs[i, t]:.2f}, {w:.2f})"
            text.append(f"\x1b[48;5;{255 - int(min(w / 2, 1) * 12)};38;5;16m{token}\x1b[0m" if color else grade)
        prompt = visible(run.tokenizer.decode(rollouts.prompts[i].ids))[-60:]
        label = "kept" if rollouts.keep[i] else "DROPPED"
        tqdm.write(f"  {label}, s = {rollouts.scores[i]:.3f}: ...{prompt} -> " + ("" if color else " ").join(text))


# ---------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------

def open_output(config):
    """Make the output folder, or find the run to continue in it. Nothing that is there is ever overwritten."""
    folder = config.output_dir
    if config.resume:
        newest_checkpoint(config)
    elif rank() == 0 and config.steps:
        with explain(f"output folder {folder}", "choose another --output-dir"):
            os.makedirs(folder, exist_ok=True)
            if os.path.exists(os.path.join(folder, "metrics.jsonl")):
                raise UserError(f"output folder {folder} holds a run already; continue it with --resume or choose "
                                f"another --output-dir")
            write_json(os.path.join(folder, "config.json"), settings_of(config))
            open(os.path.join(folder, "metrics.jsonl"), "w").close()
    barrier()


def settings_of(config):
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in ("config", "resume", "tiny")}


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)


def checkpoints(config):
    """Complete checkpoints, oldest first: only a complete one ever gets its name."""
    names = os.listdir(config.output_dir) if os.path.isdir(config.output_dir) else []
    return [os.path.join(config.output_dir, name) for name in sorted(names) if re.fullmatch(r"checkpoint-\d{6}", name)]


def newest_checkpoint(config):
    """The checkpoint that --resume continues, of the same settings; else a UserError."""
    if not checkpoints(config):
        raise UserError(f"--resume: no complete checkpoint in {config.output_dir!r}; start without --resume")
    folder = checkpoints(config)[-1]
    with explain(f"checkpoint {folder}", "remove the folder to continue the one before it"):
        with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as file:
            before = json.load(file)["settings"]
    now = settings_of(config)
    changed = [f"{name} {before.get(name)!r} -> {now[name]!r}" for name in now
               if name not in MAY_DIFFER and before.get(name) != now[name]]
    if changed:
        raise UserError(f"--resume: {folder} was written with other settings: {'; '.join(changed)}; only "
                        f"{', '.join(sorted(MAY_DIFFER - {'config', 'resume'}))} may differ")
    return folder


def prompts_digest(run):
    return hashlib.sha256(json.dumps([(p.ids, p.teacher) for p in run.prompts]).encode()).hexdigest()


STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)


def save_checkpoint(run):
    """Write the student (an ordinary checkpoint folder), the optimizer and the step, under a temporary name that
    becomes the real one when everything is on the disk: a kill at any moment leaves no half a checkpoint.

    There is no random state in it, nor a data position: both are functions of the seed and the step.
    """
    config = run.config
    folder = os.path.join(config.output_dir, f"checkpoint-{run.step:06d}")
    model, optimizer = get_model_state_dict(run.trained, options=STATE), get_optimizer_state_dict(
        run.trained, run.optimizer, options=STATE)  # collective: the shards come together on rank 0
    if rank() == 0 and not os.path.exists(folder):
        with explain(f"checkpoint {folder}", "free or change the disk and --resume: the last complete one is intact"):
            partial = os.path.join(config.output_dir, f".partial-{run.step:06d}")
            shutil.rmtree(partial, ignore_errors=True)
            model = {name.removeprefix("model."): value for name, value in model.items()}
            run.student.model.save_pretrained(partial, state_dict=model)
            run.generation_config.save_pretrained(partial)
            run.tokenizer.save_pretrained(partial)
            moments = {name: value.contiguous() for name, value in optimizer.items() if name.startswith("state.")}
            save_file(moments, os.path.join(partial, "optimizer.safetensors"))
            write_json(os.path.join(partial, "trainer_state.json"), dict(
                step=run.step, settings=settings_of(config), prompts=prompts_digest(run)))
            for path in [os.path.join(partial, name) for name in os.listdir(partial)] + [partial]:
                sync_to_disk(path)
            os.rename(partial, folder)
            sync_to_disk(config.output_dir)
            for old in checkpoints(config)[:-config.keep]:
                shutil.rmtree(old)
    barrier()
    return folder


def sync_to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def resume(run):
    """Restore the optimizer and the step (the weights were loaded by name) and cut the metrics back to it."""
    folder = newest_checkpoint(run.config)
    with explain(f"checkpoint {folder}", "remove the folder to continue the one before it"):
        with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as file:
            state = json.load(file)
        optimizer = get_optimizer_state_dict(run.trained, run.optimizer, options=STATE)
        moments = load_file(os.path.join(folder, "optimizer.safetensors"))
        expected = {name for name in optimizer if name.startswith("state.")}
        if moments.keys() != expected:
            raise ValueError(f"optimizer.safetensors has {len(moments)} tensors, {len(expected)} are expected")
        set_optimizer_state_dict(run.trained, run.optimizer, optimizer | moments, options=STATE)
    if state["prompts"] != prompts_digest(run):
        raise UserError(f"--resume: {run.config.prompts} holds other prompts than when {folder} was written; restore it")
    run.step = state["step"]
    path = os.path.join(run.config.output_dir, "metrics.jsonl")
    if rank() == 0:
        with explain(f"metrics {path}", "it must be the log of the run to continue"):
            rows = [row for _, row in read_jsonl(path) if row["step"] <= run.step]
            with open(path + ".partial", "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            os.replace(path + ".partial", path)
    barrier()


def log(run, row):
    """Append a line to metrics.jsonl; what is not a number becomes null, as JSON wants it."""
    if rank() == 0:
        row = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        with explain("metrics.jsonl", "free the disk and --resume"):
            with open(os.path.join(run.config.output_dir, "metrics.jsonl"), "a") as file:
                file.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------------------------------------------------
# The tiny pair: a teacher and a student made in seconds. Readers of the method can skip this
# ---------------------------------------------------------------------------------------------------------

def tiny_answer(digits, domain):
    """"+" asks for the running sum mod 10, "," for the running maximum: both chains, where a slip poisons the rest."""
    return (np.cumsum(digits, -1) % 10) if domain == "+" else np.maximum.accumulate(digits, -1)


def tiny_tokenizer():
    """One token a character, 16 in all."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {token: i for i, token in enumerate([*"0123456789+,=", "<pad>", "<eos>", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def pretrain(shape, domains, target_loss, tiny, seed, label):
    """Plain next-token training of a new Qwen3 on these domains, until the smoothed loss is at target_loss."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(seed)
    rng, n, smooth = np.random.default_rng((seed, len(label))), tiny["digits"], None
    heads = shape["num_attention_heads"]
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=16, tie_word_embeddings=True, num_key_value_heads=heads,
                                         head_dim=shape["hidden_size"] // heads, eos_token_id=14, pad_token_id=13,
                                         intermediate_size=3 * shape["hidden_size"], **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=tiny["pretrain_lr"], weight_decay=0.0, fused=True)
    with progress(tiny["pretrain_steps"], label) as bar:
        for step in range(tiny["pretrain_steps"]):
            digits = rng.integers(0, 10, (128, n))
            domain = rng.integers(0, len(domains), 128)
            answers = np.stack([tiny_answer(row, domains[k]) for row, k in zip(digits, domain)])
            mark = np.array([10 if d == "+" else 11 for d in domains])[domain]
            text = np.column_stack([digits, mark, np.full(128, 12), answers, np.full(128, 14)])
            ids = torch.from_numpy(text)  # [128, n + 2 + n + 1]
            logits = model(input_ids=ids[:, :-1]).logits[:, n + 1:]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, n + 2:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            smooth = loss.item() if smooth is None else 0.8 * smooth + 0.2 * loss.item()
            bar.set_postfix(loss=f"{smooth:.3f}")
            bar.update()
            if smooth < target_loss:
                break
    say(f"{label}: {sum(p.numel() for p in model.parameters()):,} parameters, loss {smooth:.3f} after {step + 1} steps")
    return model


def make_tiny(config):
    """Train the tiny pair and write it and its prompts as ordinary files: from there on it is a real run.

    -> config with teacher, student, prompts and eval_prompts filled in. Made once for an output folder.
    """
    tiny, regime = config.tiny, config.tiny["regimes"][config.regime]
    root = os.path.join(config.output_dir, "tiny")
    folder = lambda name: os.path.join(root, name)
    torch.set_num_threads(1)  # so small a model is slower on two
    if rank() == 0 and not os.path.exists(root):
        with explain(f"output folder {config.output_dir}", "choose another --output-dir"):
            partial = root + ".partial"
            shutil.rmtree(partial, ignore_errors=True)
            students = pretrain(tiny["student"] | regime.get("student", {}), list(regime["mixture"]),
                                regime["student_loss"], tiny, config.seed, "student")
            made = {"student": students} | {
                name: pretrain(tiny["teacher"], [domain], tiny["teacher_loss"], tiny, config.seed, f"teacher {name}")
                for name, domain in regime["teachers"].items()}
            for name, model in made.items():
                model.save_pretrained(os.path.join(partial, name))
                tiny_tokenizer().save_pretrained(os.path.join(partial, name))
            teacher_of = {domain: name for name, domain in regime["teachers"].items()}
            rng = np.random.default_rng((config.seed, ORDER))
            for name, count in (("prompts", 4096), ("eval_prompts", 512)):
                with open(os.path.join(partial, name + ".jsonl"), "w") as file:
                    domains = list(regime["mixture"])
                    share_of = list(regime["mixture"].values()) if name == "prompts" else [1 / len(domains)] * len(domains)
                    for k in rng.choice(len(domains), count, p=share_of):
                        digits = rng.integers(0, 10, tiny["digits"])
                        file.write(json.dumps(dict(
                            prompt="".join(map(str, digits)) + domains[k] + "=", group=domains[k],
                            answer="".join(map(str, tiny_answer(digits, domains[k]))),
                            teacher=teacher_of.get(domains[k], next(iter(regime["teachers"]))))) + "\n")
            os.rename(partial, root)
    barrier()
    return dataclasses.replace(config, student=folder("student"), prompts=folder("prompts.jsonl"),
                               eval_prompts=folder("eval_prompts.jsonl"), tiny=None,
                               teacher=",".join(f"{name}={folder(name)}" for name in regime["teachers"]))


# ---------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------

def step_prompts(run):
    """The prompts of this step: a walk through one permutation of them after the other."""
    config, n = run.config, len(run.prompts)
    count = config.batch_size // config.rollouts_per_prompt
    places = [divmod(i, n) for i in range(run.step * count, (run.step + 1) * count)]
    order = {epoch: np.random.default_rng((config.seed, ORDER, epoch)).permutation(n) for epoch in {e for e, _ in places}}
    return [run.prompts[order[epoch][i]] for epoch, i in places for _ in range(config.rollouts_per_prompt)]


class Clock:
    """Seconds of each phase, with the device's queue emptied in between."""

    def __init__(self, device):
        self.cuda, self.seconds, self.last = device == "cuda", {}, time.perf_counter()

    def mark(self, phase):
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase], self.last = now - self.last, now


def train_step(run):
    """One step of FiRe-OPD. -> metrics, rollouts; or None if the run was told to stop before its update."""
    config, clock = run.config, Clock(run.config.device)
    rollouts = rollout(run, step_prompts(run), SAMPLE, run.step)  # 1. the student writes
    clock.mark("rollout")
    if rollouts is None or not score(run, rollouts):  # 2. the teacher grades
        return None
    clock.mark("score")
    rollouts.keep = choose(config, rollouts, run.step)  # 3. filter
    metrics = update(run, rollouts)  # 4. reweight, 5. loss, 6. update
    clock.mark("update")
    metrics = dict(step=run.step + 1) | metrics | measure(run, rollouts) | speed(run, rollouts, clock.seconds)
    return metrics, rollouts


def log_evaluation(run):
    """Evaluate, print and log. False if the run is to stop."""
    figures = evaluate(run)
    if figures:
        say(f"step {run.step}: evaluation: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        log(run, dict(step=run.step) | {f"eval/{name}": value for name, value in figures.items()})
    return figures is not None


def train(config):
    """A whole run. -> True, or False if it was interrupted; its state is then in a checkpoint."""
    started, run, failures = time.time(), load(config), 0
    if config.resume:
        resume(run)
    going = run.step > 0 or log_evaluation(run)
    with progress(config.steps, "distil") as bar:
        bar.update(run.step)
        while going and run.step < config.steps:
            done = train_step(run)
            if done is None:
                going = False
                break
            metrics, rollouts = done
            run.step += 1
            log(run, metrics)
            bar.update()
            line = "reverse_kl {reverse_kl:.3f}, kept {keep_ratio:.0%}, length {length:.0f}, {tokens_per_second:.0f} tokens/s"
            bar.set_postfix_str(line.format(**metrics))
            if bar.disable and run.step % max(1, config.steps // 10) == 0:
                say(f"step {run.step}/{config.steps}: " + line.format(**metrics))
            if run.step in (1, config.steps):
                show(run, rollouts)
            failures = failures + 1 if metrics["skipped_updates"] else 0
            if failures == 3:
                raise UserError(f"step {run.step}: three steps in a row without a finite loss and gradient; the weights "
                                f"are the last good ones, saved in {save_checkpoint(run)}; look at reverse_kl, grad_norm "
                                f"and score in metrics.jsonl, lower --lr or check the teacher with --steps 0")
            last = run.step == config.steps
            if last or config.eval_every and run.step % config.eval_every == 0:
                going = log_evaluation(run)
            if last or config.save_every and run.step % config.save_every == 0:
                save_checkpoint(run)
    if not going:
        folder = save_checkpoint(run) if config.steps else "nothing"
        say(f"interrupted after step {run.step}, saved {folder}; continue: "
            f"python fire_opd.py --config {config.output_dir}/config.json --resume")
    elif config.steps:
        summary(config, time.time() - started)
    return going


def read_log(folder):
    """-> evaluation rows, training rows of a run's metrics.jsonl."""
    rows = [row for _, row in read_jsonl(os.path.join(folder, "metrics.jsonl"))]
    return [r for r in rows if "loss" not in r], [r for r in rows if "loss" in r]


def summary(config, seconds):
    """Before and after, all of it read from the log, and the next commands to type."""
    evaluations, steps = read_log(config.output_dir)
    say(f"\n{'':24}{'before':>10}{'after':>10}")
    for name in (evaluations or [{}])[0]:
        if name.startswith("eval/"):
            say(f"{name:24}" + "".join(f"{row[name]:>10.3f}" for row in (evaluations[0], evaluations[-1])))
    for name in ("keep_ratio", "reverse_kl", "reverse_kl_kept"):
        say(f"train/{name:18}" + "".join(f"{row[name] or math.nan:>10.3f}" for row in (steps[0], steps[-1])))
    folder = checkpoints(config)[-1]
    say(f"\n{len(steps)} steps, {seconds:.0f} s in all. metrics: {config.output_dir}/metrics.jsonl; student: {folder}\n"
        f"  evaluate: python fire_opd.py --config {config.output_dir}/config.json --student {folder} --steps 0\n"
        f"  go on:    python fire_opd.py --config {config.output_dir}/config.json --resume --steps {2 * config.steps}\n"
        f"  use it:   transformers.pipeline('text-generation', '{folder}')")


# ---------------------------------------------------------------------------------------------------------
# The comparison: each arm is a few settings
# ---------------------------------------------------------------------------------------------------------

ARMS = {
    "OPD": dict(filter_percentile=0.0, alpha=0.0, beta=0.0),
    "filter only": dict(alpha=0.0, beta=0.0),
    "reweight only": dict(filter_percentile=0.0),
    "FiRe-OPD": {},
    "hard tokens": dict(token_weights="hard"),
    "random filter": dict(filter_by="random"),
    "shuffled weights": dict(token_weights="shuffled"),
}


def interval(values):
    """Mean, standard deviation and half width of the 95 % interval (Student's t) over seeds."""
    n, centre = len(values), mean(values)
    if n < 2:
        return centre, math.nan, math.nan
    deviation = math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1))
    t = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 97.5 % quantile at 1, 2, ... 9
    return centre, deviation, (t[n - 2] if n <= 10 else 1.96 + 2.6 / (n - 1)) * deviation / math.sqrt(n)


def compare(config):
    """Every arm from the same teacher, student, prompts and uniforms, seed by seed; then the table."""
    finals = {arm: [] for arm in ARMS}  # the last evaluation of each seed
    for seed in range(config.seed, config.seed + config.seeds):
        root = os.path.join(config.output_dir, f"seed-{seed}")
        base = dataclasses.replace(config, seed=seed, output_dir=root, compare=False, show=0)
        if base.tiny:
            base = make_tiny(base)
        for arm, settings in ARMS.items():
            folder = os.path.join(root, arm.replace(" ", "-"))
            one = dataclasses.replace(base, output_dir=folder, **settings)
            if not checkpoints(one) or read_log(folder)[0][-1]["step"] < config.steps:  # else: finished before
                say(f"\n=== seed {seed}, {arm}")
                if rank() == 0:
                    shutil.rmtree(folder, ignore_errors=True)
                barrier()
                if not train(one):
                    return False
            finals[arm].append(read_log(folder)[0][-1])
    names = [name for name in finals["OPD"][0] if name.startswith("eval/")]
    lines = [f"| arm ({config.seeds} seeds, {config.steps} steps) | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for arm, rows in finals.items():
        cells = []
        for name in names:
            values = [row[name] for row in rows]
            centre, deviation, half = interval(values)
            paired = interval([v - plain[name] for v, plain in zip(values, finals["OPD"])])
            cells.append(f"{centre:.3f} ± {half:.3f} (sd {deviation:.3f}; vs OPD {paired[0]:+.3f} ± {paired[2]:.3f})")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    say("\n" + "\n".join(lines) + "\n\nmean ± half width of the 95 % interval over seeds; vs OPD: paired by seed")
    if rank() == 0:
        with open(os.path.join(config.output_dir, "comparison.md"), "w") as file:
            file.write("\n".join(lines) + "\n")
    return True


# ---------------------------------------------------------------------------------------------------------

def start(config):
    """Join the other ranks, take over the signals, quieten the libraries."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world_size() > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=1))  # longer than any rank waits for a slow one
    STOP.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    if not config.output_dir:
        now = share(torch.tensor(time.time() if rank() == 0 else 0.0, dtype=torch.float64)).item()
        config.output_dir = time.strftime("runs/%Y%m%d-%H%M%S", time.localtime(now))


def fail(message, status=2):
    """One line, status 2. Under torchrun the line also becomes the root cause that its report names."""
    print(visible(f"error: {message}").replace("\n", " "), file=sys.stderr, flush=True)
    if world_size() > 1:
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            write_json(path, {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}})
        os._exit(status)  # a clean exit would wait for the other ranks
    raise SystemExit(status)


def main(argv=None):
    try:
        config = parse_config(argv)
        start(config)
        if config.compare:
            done = compare(config)
        else:
            done = train(make_tiny(config) if config.tiny else config)
    except UserError as error:
        fail(error)
    except torch.OutOfMemoryError:
        fail("out of GPU memory; lower --micro-batch-tokens (scoring, update) or --rollout-batch-size (rollout), "
             "or add --gradient-checkpointing or --shard")
    if dist.is_initialized():
        dist.destroy_process_group()
    if not done:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
