"""FiRe-OPD, "Filter, then Reweight" (arXiv 2606.02684): on-policy distillation of LLMs in one file.

The student writes, the teacher grades every token that the student wrote, the student moves towards the
teacher. FiRe-OPD adds two selections to this: it drops the trajectories that the teacher finds least likely
(Filter) and weighs the tokens of the others by how sure the teacher and how unsure the student is (Reweight).
One step, and where to read it (pi_S is the student, pi_T the teacher, H an entropy, y a rollout):

  1. rollout    y ~ pi_S(.|x), sampled from exactly softmax(logits / temperature)         rollout
  2. score      log pi_T(y_t) and H_T,t, the logits in chunks of tokens                   score
  3. filter     s = mean_t log pi_T(y_t); keep s >= the 20 % quantile of the whole step   filter_trajectories
  4. reweight   w_t = (1 + alpha (1 - H_T,t/max H_T)) (1 + beta H_S,t/max H_S), mean 1    token_weights
  5. loss       the clipped policy gradient of w_t A_t, advantage A_t = log(pi_T / pi_S)  policy_loss
  6. update     one AdamW step from the kept tokens of all micro-batches and ranks        update

`train_step` puts these together, `train` is the loop around it, and what follows `train` serves them. All
settings are fields of `Config`, most of them flags; `run.config.x` is --x.

    python fire_opd.py                                           # a tiny pair, no download, under a minute
    python fire_opd.py --teacher T --student S --prompts P.jsonl                     # real models, one GPU
    torchrun --nproc-per-node 8 fire_opd.py --teacher T --student S --prompts P.jsonl          # eight GPUs

The pure functions of the method come first and need nothing else of the file: `import fire_opd`, test them.
Left out on purpose: a critic, a reward, a reference model and its KL penalty, top-k or full-vocabulary
divergences, an inference server, learning-rate schedules, logging services (metrics.jsonl is the log).
"""

import argparse, contextlib, dataclasses, datetime, difflib, hashlib, json, math, os, re, resource, shutil
import signal, sys, threading, time, warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import huggingface_hub, tokenizers, transformers
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


# --- The method: pure tensor functions, no models, no globals -----------------------------------------------

def upcast(x):
    """bfloat16 and float16 become float32, float32 and float64 stay: no softmax is taken in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def is_eos(tokens, eos_ids):
    """Which tokens end a response; several ids may. tokens [...], eos_ids: ints -> [...] bool."""
    return torch.isin(tokens, torch.tensor(sorted(eos_ids), dtype=torch.long, device=tokens.device))

def response_mask(tokens, eos_ids):
    """True up to and including the first end of sequence. tokens [B, T], eos_ids: ints -> [B, T] bool.

    By position, not by value: with pad == eos a comparison with the pad id would lose the real EOS, and that
    token is the one that teaches the student to stop.
    """
    ends = is_eos(tokens, eos_ids).long()
    return ends.cumsum(1) - ends == 0  # no EOS strictly before this token

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
    position = round(percentile * (len(ordered) - 1) / 100, 9)  # 161.00000000000003 would lose a tie
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return finite & (scores.double() >= low + (position - math.floor(position)) * (high - low))

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
    pass's: then the loss is plain REINFORCE and the clip never acts. All tensors [B, T], log-probs in nats.
    num_tokens counts the kept tokens of the whole mini-batch, over all micro-batches and ranks, because their
    gradients ADD: dividing each by its own count would weigh the tokens of a short micro-batch more. (The
    mean over trajectories of theirs: weights divided by their lengths, and the number of trajectories here.)
    """
    mask = mask.bool()

    def valid(x):  # masked before exp(): an infinity off the mask would make the gradient 0 * inf = NaN
        return upcast(x).masked_fill(~mask, 0)

    advantages = valid((teacher_log_probs - old_log_probs).detach())  # [B, T]
    weighted = valid(weights.detach()) * advantages  # [B, T]
    ratio = (valid(log_probs) - valid(old_log_probs.detach())).exp()  # [B, T]
    objective = torch.minimum(ratio * weighted, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * weighted)
    return -objective.sum() / num_tokens

class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden W^T / temperature)[target] and its entropy, a chunk of tokens at a time.

    At 152 k entries the logits of 8,192 tokens are 5 GB, several times over with their gradient: the largest
    tensors of the run by far. Here only one chunk of tokens has logits at a time, and backward computes them
    again. (torch.utils.checkpoint around each chunk would do the same in 12 lines; its backward took twice
    as long on a CPU, most of it for a gradient [V, D] from every chunk.)
    """

    @staticmethod
    def logits(h, w, temperature):  # [chunk, D], [V, D] -> [chunk, V]
        return upcast(h @ w.T).div_(temperature)

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.save_for_backward(hidden, weight, targets)
        w, log_probs, entropy = weight.to(ctx.dtype), [], []
        for h, y in zip(hidden.to(ctx.dtype).split(chunk), targets.split(chunk)):
            z = ChunkedLogProbs.logits(h, w, temperature)
            log_p = z.sub_(z.logsumexp(1, keepdim=True))  # [chunk, V]
            log_probs.append(log_p.gather(1, y[:, None])[:, 0])
            entropy.append(-log_p.exp().mul_(log_p).sum(1))
        entropy = torch.cat(entropy)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(log_probs), entropy

    @staticmethod
    def backward(ctx, grad_log_probs, _):
        hidden, weight, targets = ctx.saved_tensors
        w, grad_hidden = weight.to(ctx.dtype), []
        grad_weight = torch.zeros_like(weight, dtype=grad_log_probs.dtype)
        outer = (grad_log_probs / ctx.temperature)[:, None]  # [N, 1]
        for h, y, g in zip(*(x.split(ctx.chunk) for x in (hidden.to(ctx.dtype), targets[:, None], outer))):
            p = ChunkedLogProbs.logits(h, w, ctx.temperature).softmax(1)
            # d log pi(y) / d logits = (onehot(y) - p) / temperature
            grad = p.mul_(-g).scatter_add_(1, y, g).to(ctx.dtype)  # [chunk, V]
            grad_hidden.append(grad @ w)
            if grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.T, h)  # in place: [V, D] is large
            else:
                grad_weight += grad.T @ h
        return torch.cat(grad_hidden).to(hidden.dtype), grad_weight.to(weight.dtype), None, None, None

def token_log_probs_and_entropy(hidden, lm_head_weight, targets, temperature=1.0, chunk=64):
    """log pi(target_n) and H_n of pi = softmax(hidden W^T / temperature), never whole over [N, V].

    hidden [N, D], lm_head_weight [V, D], targets [N] -> log_probs [N] (differentiable) and
    entropy [N] (not), in nats.
    """
    return ChunkedLogProbs.apply(hidden, lm_head_weight, targets, temperature, chunk)

def sample_tokens(logits, uniforms, temperature=1.0):
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u is a draw from pi.

    logits [B, V], uniforms [B] in [0, 1) -> tokens [B], log_probs [B]. Given u the sampler is a function: no
    generator state to save, share or restore. The sum is in float64 and u is scaled by its end: in float32 a
    sum over 152 k entries ends short of 1, and a u beyond its end would be no token at all. NaN logits give
    the last token and a NaN log-prob, for the loss to find.
    """
    probs = (upcast(logits) / temperature).softmax(1)
    cdf = probs.cumsum(1, dtype=torch.float64)  # [B, V]
    points = uniforms.double() * cdf[:, -1]  # below the end, as u is below 1
    tokens = torch.searchsorted(cdf, points[:, None], right=True)  # [B, 1]; right: skips probability 0
    tokens = tokens.clamp(max=logits.shape[1] - 1)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


# --- Ranks: torchrun starts one process a GPU; each writes, grades and trains its share of the rows ---------

def rank():
    return int(os.environ.get("RANK", 0))

def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))

def sum_over_ranks(table):
    """Sum a CPU tensor over the ranks, in place. Each rank fills its own rows of a zeroed [B, T] table: the
    sum is the whole table, to the bit, and from it all ranks compute the same filter, weights and metrics."""
    if dist.is_initialized():
        dist.all_reduce(table)
    return table

def barrier():
    sum_over_ranks(torch.zeros(1))

class Stopped(Exception):
    """The run was told to stop and has left its step before the update."""

STOP = threading.Event()  # set by SIGTERM and SIGINT

def stop_if_told():
    """Asked of all ranks together, so that they leave the step at the same place."""
    if sum_over_ranks(torch.tensor(float(STOP.is_set()))) > 0:
        raise Stopped


# --- Policies: a causal LM, teacher or student, as the method sees it ---------------------------------------

class Policy(nn.Module):
    """`forward` scores given responses, `sample` writes new ones, both at the same temperature."""

    SEGMENT = 64  # tokens between two looks at which rows have ended

    def __init__(self, model, vocab_size, config):
        super().__init__()
        self.model, self.vocab_size, self.temperature = model, vocab_size, config.temperature
        self.device, self.chunk = config.device, 64 if config.device == "cpu" else 1024
        bf16 = config.dtype == "bfloat16"
        self.autocast = lambda: torch.autocast(config.device, torch.bfloat16, enabled=bf16)

    def layers(self):
        """The transformer blocks: what is recomputed, and what is sharded."""
        return [m for m in self.model.modules() if type(m).__name__ in (self.model._no_split_modules or ())]

    def forward(self, ids, response):
        """log pi(y_t) and H_t of all n response tokens, row by row. ids, response bool [b, L] -> [n], [n]."""
        with self.autocast():
            # Padding is on the right, where the real tokens of a causal model cannot see it: no mask needed.
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [b, L, D]
            hidden = hidden[:, :-1][response[:, 1:]]  # [n, D]: position t - 1 predicts token t
            weight = self.model.get_output_embeddings().weight[:self.vocab_size]  # [V, D]
            return token_log_probs_and_entropy(hidden, weight, ids[response], self.temperature, self.chunk)

    def logits(self, ids):
        """All of them, [b, L, V]: for the self-test only."""
        with self.autocast():
            return upcast(self.model(ids).logits[..., :self.vocab_size])

    @torch.no_grad()
    def sample(self, prompts, uniforms, eos_ids, pad_id):
        """One response to each prompt. prompts: b lists of ids, uniforms [b, T] -> tokens, log_probs [b, T].

        `generate` runs in segments; rows that have ended leave the batch and its cache between them: a batch
        must not pay b times for its longest row. What follows a row's EOS means nothing. The draws are ours:
        a logits processor leaves the greedy `generate` one choice, that of the row's own uniforms.
        """
        assert uniforms.dtype == torch.float64  # rounded to less, one could be 1
        (b, length), width, device = uniforms.shape, max(map(len, prompts)), self.device
        uniforms = uniforms.to(device)
        ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)  # [b, width]
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        tokens = torch.full((b, length), pad_id, device=device)
        log_probs = torch.zeros(b, length, device=device)
        rows = torch.arange(b, device=device)  # those still being written
        cache = DynamicCache(config=self.model.config)

        def draw(input_ids, logits):  # [n, L], [n, V] -> [n, V]
            t = input_ids.shape[1] - width
            known = logits[:, :self.vocab_size]  # embeddings are padded: the rows beyond are no tokens
            drawn, log_pi = sample_tokens(known, uniforms[rows, t], self.temperature)
            tokens[rows, t], log_probs[rows, t] = drawn, log_pi.float()
            return torch.zeros_like(logits).scatter_(1, drawn[:, None], 1)

        with self.autocast():  # keeps the bf16 weights that it casts for all tokens of this call
            while len(ids) and (done := ids.shape[1] - width) < length:
                if done and STOP.is_set():  # not at 0: the first forward of a sharded student is a collective
                    break
                ids = self.model.generate(  # takes up where the cache ends
                    ids, attention_mask=attention, past_key_values=cache, logits_processor=[draw],
                    max_new_tokens=min(self.SEGMENT, length - done),
                    synced_gpus=False)  # ranks write responses of different lengths: none waits for another
                new = ids[:, width + done:]  # [n, <= SEGMENT]
                unfinished = ~is_eos(new, eos_ids).any(1)  # [n]
                attention = torch.cat([attention, torch.ones_like(new)], 1)[unfinished]
                ids, rows = ids[unfinished], rows[unfinished]
                if not unfinished.all():
                    cache.batch_select_indices(unfinished.nonzero()[:, 0])
        return tokens.cpu(), log_probs.cpu()


# --- One step: rollout, score, filter, reweight, update -----------------------------------------------------

SAMPLE, EVALUATE, ORDER, FILTER, SHUFFLE, PRETRAIN = range(6)  # what randomness is for

def uniforms(seed, *key, rows=(0,), width):
    """Uniforms in [0, 1), [b, width] float64. Row i's are a function of (seed, key, i) alone.

    Not of the rank that draws them, nor of the batch, nor of what was drawn before: so 1, 2 and 4 ranks are
    the same run up to the rounding of floats, all arms of a comparison meet the same randomness, and a
    resumed run has no generator to restore.
    """
    drawn = [np.random.default_rng((seed, *key, i)).random(width) for i in rows]
    return torch.from_numpy(np.array(drawn).reshape(len(rows), width))

@dataclass
class Prompt:
    ids: list  # token ids, the same for the student and its teacher
    answer: str  # None if unknown
    teacher: str  # the name of the teacher that grades it
    group: str  # evaluation figures are also given per group

@dataclass
class Run:
    """What a run holds: filled by `load`, used by every phase."""
    config: "Config"
    prompts: list = field(default_factory=list)
    eval_prompts: list = field(default_factory=list)
    tokenizer: object = None
    vocab_size: int = 0  # ids that the student and all teachers share
    eos_ids: set = None
    pad_id: int = 0
    student: Policy = None
    trained: nn.Module = None  # the student as the update sees it: plain, in DDP, or sharded
    teachers: dict = field(default_factory=dict)  # name -> Policy
    mesh: object = None  # the ranks, if models are sharded over them
    optimizer: torch.optim.Optimizer = None
    generation_config: object = None  # the checkpoint's own, kept for saving
    step: int = 0  # steps done
    failures: int = 0  # steps without an update, since the last one with
    evaluated: int = -1  # the step of the last evaluation

@dataclass
class Rollouts:
    """The trajectories of one step as tables on the CPU, the same on every rank."""
    prompts: list  # B prompts
    tokens: torch.Tensor  # [B, T]
    mask: torch.Tensor  # [B, T] bool, the response mask
    ended: torch.Tensor  # [B] bool: ended by an EOS; the others are truncated at max_new_tokens
    log_probs: torch.Tensor  # [B, T] log pi_S of the sampler
    teacher_log_probs: torch.Tensor = None  # [B, T]
    teacher_entropy: torch.Tensor = None  # [B, T]
    scores: torch.Tensor = None  # [B]
    keep: torch.Tensor = None  # [B] bool
    student_log_probs: torch.Tensor = None  # [B, T], of the training pass, 0 if dropped; as the next two
    student_entropy: torch.Tensor = None  # [B, T]
    weights: torch.Tensor = None  # [B, T]

    def lengths(self):
        """Prompt + response tokens of each row."""
        return [len(prompt.ids) + n for prompt, n in zip(self.prompts, self.mask.sum(1).tolist())]

    def of_teacher(self, name):
        """Which rows this teacher grades, [B] bool."""
        return torch.tensor([prompt.teacher == name for prompt in self.prompts])

def train_step(run):
    """One step of FiRe-OPD. -> metrics, rollouts. Raises Stopped if told to before the update."""
    seconds = {}
    with timed(seconds, "rollout"):
        rollouts = rollout(run, step_prompts(run), SAMPLE, run.step)  # 1. the student writes
    with timed(seconds, "score"):
        score(run, rollouts)  # 2. the teacher grades
    rollouts.keep = choose_trajectories(run.config, rollouts, run.step)  # 3. filter
    with timed(seconds, "update"):
        metrics = update(run, rollouts)  # 4. reweight, 5. loss, 6. update
    metrics |= measure_step(run, rollouts) | speed(run, rollouts, seconds)
    return dict(step=run.step + 1) | metrics, rollouts

@contextlib.contextmanager
def timed(seconds, phase):
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():  # kernels are only queued: wait for them
        torch.cuda.synchronize()
    seconds[phase] = time.perf_counter() - start

def step_prompts(run):
    """The prompts of this step: each epoch is a fresh permutation of all of them."""
    config, n = run.config, len(run.prompts)
    count = config.batch_size // config.rollouts_per_prompt
    places = [divmod(i, n) for i in range(run.step * count, (run.step + 1) * count)]
    order = {epoch: np.random.default_rng((config.seed, ORDER, epoch)).permutation(n) for epoch, _ in places}
    return [run.prompts[order[epoch][i]] for epoch, i in places for _ in range(config.rollouts_per_prompt)]

def rollout(run, prompts, *key):
    """Step 1. The student writes one response to each prompt. -> Rollouts"""
    config = run.config
    tokens = torch.zeros(len(prompts), config.max_new_tokens, dtype=torch.long)  # [B, T]
    log_probs = torch.zeros(tokens.shape)  # [B, T]
    mine = range(rank(), len(prompts), world_size())
    for start in range(0, len(mine), config.rollout_batch_size):
        if start and STOP.is_set():
            break
        rows = list(mine[start:start + config.rollout_batch_size])
        tokens[rows], log_probs[rows] = run.student.sample(
            [prompts[i].ids for i in rows],
            uniforms(config.seed, *key, rows=rows, width=config.max_new_tokens), run.eos_ids, run.pad_id)
    stop_if_told()
    for table in (tokens, log_probs):
        sum_over_ranks(table)
    mask = response_mask(tokens, run.eos_ids)
    ended = (is_eos(tokens, run.eos_ids) & mask).any(1)
    log_probs = log_probs.masked_fill(~mask, 0)
    width = int(mask.sum(1).max())  # no table need be wider than the longest response
    return Rollouts(prompts, tokens[:, :width], mask[:, :width], ended, log_probs[:, :width])

@torch.no_grad()
def score(run, rollouts):
    """Step 2. Each row's own teacher gives log pi_T(y_t) and H_T,t; their means are the trajectory scores."""
    log_probs, entropy = torch.zeros(rollouts.mask.shape), torch.zeros(rollouts.mask.shape)  # [B, T]
    for name, teacher in run.teachers.items():
        rows = rollouts.of_teacher(name).nonzero()[:, 0].tolist()
        for micro in micro_batches(rows, rollouts.lengths(), run.config.micro_batch_tokens):
            flat = teacher(*pack(rollouts, micro, run.config.device))  # [n], [n]
            log_probs[micro], entropy[micro] = (unpack(x.float().cpu(), rollouts.mask[micro]) for x in flat)
    rollouts.teacher_log_probs, rollouts.teacher_entropy = map(sum_over_ranks, (log_probs, entropy))
    rollouts.scores = trajectory_scores(rollouts.teacher_log_probs, rollouts.mask)
    stop_if_told()

def choose_trajectories(config, rollouts, step):
    """Step 3. keep [B]: by the teacher's likelihood, or (a control) as many at random."""
    scores = rollouts.scores
    if config.filter_by == "random":
        noise = uniforms(config.seed, FILTER, step, width=len(scores))[0]
        scores = noise.masked_fill(~scores.isfinite(), torch.nan)
    if config.filter_scope == "step":
        return filter_trajectories(scores, config.filter_percentile)
    keep = torch.zeros(len(scores), dtype=torch.bool)
    for name in {prompt.teacher for prompt in rollouts.prompts}:
        own = rollouts.of_teacher(name)
        keep[own] = filter_trajectories(scores[own], config.filter_percentile)
    return keep

def choose_tokens(config, weights, mask, rows, step):
    """Step 4. The soft weights [b, T] as they are, or an alternative to them with the same mean of 1."""
    if config.token_weights == "hard":  # the heavier half, all alike
        lengths = mask.sum(1, keepdim=True)  # [b, 1]
        place = weights.masked_fill(~mask, -1).argsort(dim=1, descending=True).argsort(dim=1)  # 0 is heaviest
        half = (lengths + 1) // 2
        return (place < half) * lengths / half
    if config.token_weights == "shuffled":  # a control: the same weights on the wrong tokens
        noise = uniforms(config.seed, SHUFFLE, step, rows=rows, width=mask.shape[1]).to(mask.device)
        return weights.gather(1, noise.masked_fill(~mask, 1).argsort(dim=1))  # what is off the mask stays off
    return weights

def update(run, rollouts):
    """Steps 4 to 6, on the kept trajectories: the others never enter the student's forward. -> metrics.

    They are dealt into mini-batches, one optimizer update each (one by default). The tables of the training
    pass are filled on the way.
    """
    kept = rollouts.keep.nonzero()[:, 0].tolist()
    parts = min(run.config.updates_per_rollout, max(1, len(kept)))
    tables = [torch.zeros(rollouts.mask.shape) for _ in range(3)]
    rollouts.student_log_probs, rollouts.student_entropy, rollouts.weights = tables
    losses, norms, skipped = [], [], 0
    for part in range(parts):
        rows = kept[part::parts]
        loss = accumulate_gradient(run, rollouts, rows)
        norm = nn.utils.clip_grad_norm_(run.student.parameters(), run.config.max_grad_norm)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of a sharded student
        if rows and math.isfinite(norm) and math.isfinite(loss):
            run.optimizer.step()
            losses.append(loss)
            norms.append(norm)
        else:  # the weights stay as they are
            skipped += 1
        run.optimizer.zero_grad(set_to_none=True)
    for table in tables:
        sum_over_ranks(table)
    mean = lambda values: sum(values) / len(values) if values else math.nan
    return dict(loss=mean(losses), grad_norm=mean(norms), skipped_updates=skipped)

def accumulate_gradient(run, rollouts, rows):
    """The gradient of these rows, in micro-batches that fit into memory. -> their loss.

    However they are cut, over micro-batches and ranks, the gradient is the same: what divides it is counted
    before the cut.
    """
    config, loss = run.config, torch.zeros(())
    count = int(rollouts.mask[rows].sum()) if config.loss_agg == "token-mean" else len(rows)
    micros = micro_batches(rows, rollouts.lengths(), config.micro_batch_tokens)
    for number, micro in enumerate(micros):
        with gradient_exchange(run.trained, last=number == len(micros) - 1):
            piece = micro_batch_loss(run, rollouts, micro, count)
            (piece * world_size()).backward()  # DDP and FSDP average over the ranks; these pieces add
        loss += piece.detach().cpu()
    return sum_over_ranks(loss).item()

def micro_batch_loss(run, rollouts, rows, count):
    """The student's one pass over these rows, their weights, and their share of the mini-batch's loss.

    With one update a rollout this pass is the old policy too: its own detached log-probs make the ratio
    exactly 1, which the sampler's would not, computed by other kernels. With more updates the sampler's are
    the old ones and the clip is live (in bf16 those kernels alone move some ratios by several per cent). H_S
    is always that of the pass that is being trained on.
    """
    config, device = run.config, run.config.device
    mask, teacher_log_probs, teacher_entropy, old_log_probs = (table[rows].to(device) for table in (
        rollouts.mask, rollouts.teacher_log_probs, rollouts.teacher_entropy, rollouts.log_probs))  # [b, T]
    log_probs, entropy = (unpack(x, mask) for x in run.trained(*pack(rollouts, rows, device)))  # [b, T]
    weights = token_weights(teacher_entropy, entropy, mask, config.alpha, config.beta)
    weights = choose_tokens(config, weights, mask, rows, run.step)
    rollouts.student_log_probs[rows] = log_probs.detach().float().cpu()
    rollouts.student_entropy[rows] = entropy.float().cpu()
    rollouts.weights[rows] = weights.float().cpu()
    if config.updates_per_rollout == 1:
        old_log_probs = log_probs.detach()
    if config.loss_agg == "seq-mean":  # each trajectory's own mean; count is then that of the trajectories
        weights = weights / mask.sum(1, keepdim=True)
    return policy_loss(log_probs, old_log_probs, teacher_log_probs, weights, mask, count, config.clip_ratio)

def micro_batches(rows, lengths, budget):
    """This rank's share of `rows`, in lists of at most `budget` tokens with padding (or of one row).

    Sorted by length, so that hardly anything is padding. Every rank gets the same number of lists, if need be
    empty ones: a rank that keeps no trajectory must still take part in every collective of the models.
    """
    cuts, most = [], -(-len(rows) // world_size())  # spread over the ranks before filling a budget
    for i in sorted(rows, key=lambda i: (-lengths[i], i)):
        if not cuts or len(cuts[-1]) == most or (len(cuts[-1]) + 1) * lengths[cuts[-1][0]] > budget:
            cuts.append([])
        cuts[-1].append(i)
    cuts += [[]] * (-len(cuts) % world_size())
    return cuts[rank()::world_size()]

def pack(rollouts, rows, device):
    """Prompt + response of each row, padded on the right. -> ids [b, L], response [b, L] bool."""
    lengths = rollouts.lengths()
    width = max([lengths[i] for i in rows], default=2)
    ids = torch.zeros(max(len(rows), 1), width, dtype=torch.long)  # no rows at all: one without a response
    response = torch.zeros(ids.shape, dtype=torch.bool)
    for r, i in enumerate(rows):
        prompt, answer = torch.tensor(rollouts.prompts[i].ids), rollouts.tokens[i][rollouts.mask[i]]
        ids[r, :lengths[i]] = torch.cat([prompt, answer])
        response[r, len(prompt):lengths[i]] = True
    return ids.to(device), response.to(device)

def unpack(flat, mask):
    """Values [n], row by row, back into a table [b, T] with zeros off the mask; gradients pass."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)

@contextlib.contextmanager
def gradient_exchange(trained, last):
    """Ranks exchange gradients once a mini-batch, in its last backward. It surrounds forward AND backward."""
    if isinstance(trained, FSDPModule):
        trained.set_requires_gradient_sync(last)
    wait = isinstance(trained, DistributedDataParallel) and not last
    with trained.no_sync() if wait else contextlib.nullcontext():
        yield


# --- The run ------------------------------------------------------------------------------------------------

def train(config):
    """A whole run. Told to stop, it saves where it is and raises Stopped."""
    started, run = time.time(), load(config)
    self_test(run)  # only now: a forward leaves a sharded student whole, the optimizer wants its shards
    try:
        if due(run, config.eval_every):
            evaluate(run)
        with progress(config.steps, "distil") as bar:
            bar.update(run.step)
            while run.step < config.steps:
                metrics, rollouts = train_step(run)
                run.step += 1
                report(run, bar, metrics, rollouts)
                stop_if_diverged(run, metrics)
                if due(run, config.eval_every):
                    evaluate(run)
                if due(run, config.save_every):
                    save_checkpoint(run)
    except Stopped:
        saved = save_checkpoint(run) if config.steps else "nothing"
        say(f"\nstopped after step {run.step}, saved {saved}; go on with: "
            f"python {sys.argv[0]} --config {config.output_dir}/config.json --resume")
        raise
    if config.steps:
        summary(config, time.time() - started)

def due(run, every):
    """Whether something is done after this step: at both ends of a run, and in between as often as wanted."""
    return run.step in (0, run.config.steps) or every and run.step % every == 0

def report(run, bar, metrics, rollouts):
    """A line in the log, the bar or a line on the screen, and now and then some rollouts."""
    log(run, metrics)
    line = ("reverse_kl {reverse_kl:.3f}, kept {keep_ratio:.0%}, length {response_length:.0f}, "
            "{tokens_per_second:.0f} tokens/s").format(**metrics)
    bar.update()
    bar.set_postfix_str(line)
    if bar.disable and run.step % max(1, run.config.steps // 10) == 0:  # no terminal: a line now and then
        say(f"step {run.step}/{run.config.steps}: {line}")
    if run.step in (1, run.config.steps):
        show(run, rollouts)

def stop_if_diverged(run, metrics):
    run.failures = 0 if math.isfinite(metrics["loss"]) else run.failures + 1
    if run.failures == 3:
        raise UserError(f"step {run.step}: three steps in a row without a finite loss and gradient; the last "
                        f"good weights are in {save_checkpoint(run)}; look at score in metrics.jsonl, lower "
                        f"--lr, check the teacher with --steps 0")

def summary(config, seconds):
    """Before and after, both read from the log, and the commands to type next."""
    (evaluations, steps), folder = read_log(config.output_dir), config.output_dir
    for rows, first, last in ((evaluations, "before", "after"), (steps, "first step", "last step")):
        if rows:
            say(f"\n{'':24}{first:>12}{last:>12}")
        for name in rows[0] if rows else ():
            if re.match("eval/(exact|reverse)|keep_ratio|reverse_kl(_kept)?$|response_length$", name):
                say(f"{name:24}{rows[0][name]:12.3f}{rows[-1][name]:12.3f}")
    newest, command = checkpoints(folder)[-1], f"python {sys.argv[0]} --config {folder}/config.json"
    say(f"\n{steps[-1]['step']} steps, {seconds:.0f} s; metrics in {folder}/metrics.jsonl, student in "
        f"{newest}. Next:\n"
        f"  evaluate  {command} --steps 0 --student {newest}\n"
        f"  go on     {command} --resume --steps {2 * config.steps}\n"
        f"  use       transformers.pipeline('text-generation', '{newest}')")


# --- Metrics and evaluation ---------------------------------------------------------------------------------

def is_correct(response, answer):
    """Whether the last \\boxed{...} is the answer; without one, the whole response or its last number."""
    def clean(text):
        return re.sub(r"[\s$]|\\left|\\right|(?<=\d),(?=\d{3}(?!\d))", "", text).rstrip(".")

    if (start := response.rfind("\\boxed{") + 7) >= 7:
        depth = np.cumsum([(c == "{") - (c == "}") for c in response[start:]])
        end = start + int((depth < 0).argmax()) if len(depth) else start  # the brace that closes the box
        return clean(response[start:end]) == clean(answer)
    numbers = re.findall(r"-?\d[\d,]*\.?\d*(?:/\d+)?", response)
    return response.strip() == answer.strip() or bool(numbers) and clean(numbers[-1]) == clean(answer)

def measure(run, rollouts, groups):
    """Figures of groups of rows, from the tables alone: the same on every rank.

    groups: suffix -> rows [B] bool -> {figure + suffix: float}, NaN for a group without rows.
    """
    figures, B = {}, len(rollouts.prompts)
    log_ratio = rollouts.log_probs - rollouts.teacher_log_probs  # [B, T] k1 estimate of the reverse KL
    responses = rollouts.mask.sum(1).float()  # [B]
    correct = torch.full((B,), math.nan)  # [B] where an answer is known
    for i, prompt in enumerate(rollouts.prompts):
        if prompt.answer is not None:
            text = run.tokenizer.decode(rollouts.tokens[i][rollouts.mask[i]], skip_special_tokens=True)
            correct[i] = is_correct(text, prompt.answer)
    for suffix, rows in groups.items():
        scored = rows & rollouts.scores.isfinite()  # [B]
        valid = rollouts.mask & scored[:, None]  # [B, T]
        figures[f"reverse_kl{suffix}"] = log_ratio[valid].mean()
        figures[f"score{suffix}"] = rollouts.scores[scored].mean()
        figures[f"teacher_entropy{suffix}"] = rollouts.teacher_entropy[valid].mean()
        figures[f"response_length{suffix}"] = responses[rows].mean()
        figures[f"truncated_ratio{suffix}"] = 1 - rollouts.ended[rows].float().mean()
        if not correct[rows].isnan().all():
            figures[f"exact_match{suffix}"] = correct[rows].nanmean()
    return {name: float(value) for name, value in figures.items()}

def measure_step(run, rollouts):
    """The figures of a training step: of all rows, of the kept, of the dropped, and of the weights."""
    keep, everything = rollouts.keep, torch.ones(len(rollouts.prompts), dtype=torch.bool)
    figures = measure(run, rollouts, {"": everything, "_kept": keep, "_dropped": ~keep})
    mask = rollouts.mask & keep[:, None]  # [B, T]
    weights, responses = rollouts.weights[mask], rollouts.mask.sum(1)  # [n], [B]
    heaviest = torch.arange(mask.shape[1]) < (responses / 10).ceil()[:, None]  # [B, T] a tenth of each row
    decile = (rollouts.weights.sort(1, descending=True).values * heaviest).sum(1) / responses  # [B]
    ratio = torch.ones(1)
    if run.config.updates_per_rollout > 1:
        ratio = (rollouts.student_log_probs - rollouts.log_probs)[mask].exp()  # [n]
    figures |= dict(
        keep_ratio=keep.float().mean(),
        filter_threshold=min(rollouts.scores[keep].tolist(), default=math.nan),
        student_entropy=rollouts.student_entropy[mask].mean(),
        weight_ess=weights.sum() ** 2 / (weights ** 2).sum() / len(weights),
        weight_top_decile=decile[keep].mean(),
        clip_fraction=((ratio - 1).abs() > run.config.clip_ratio).float().mean())
    for name in run.teachers if len(run.teachers) > 1 else ():
        figures[f"keep_ratio/{name}"] = keep[rollouts.of_teacher(name)].float().mean()
    return {name: float(value) for name, value in figures.items()}

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16; on anything else MFU is null

def forward_flops(policy, lengths, responses):
    """Of a dense transformer on rows of these lengths [n], its head on the response tokens [n] only."""
    c = policy.model.config.get_text_config()
    layers, h = policy.layers(), c.hidden_size
    blocks = sum(p.numel() for layer in layers for p in layer.parameters())
    heads = c.num_attention_heads * (getattr(c, "head_dim", None) or h // c.num_attention_heads)
    return (2 * blocks * lengths.sum() + 2 * h * policy.vocab_size * responses.sum()
            + 2 * len(layers) * heads * (lengths ** 2).sum()).item()  # causal: half of 4 T^2

def speed(run, rollouts, seconds):
    """Seconds of each phase, response tokens/s, peak memory, MFU: scoring is one forward, an update three."""
    lengths, responses = torch.tensor(rollouts.lengths()).double(), rollouts.mask.sum(1)  # [B], [B]
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20  # ru_maxrss is in bytes there, in KB elsewhere
    peak_memory, device = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, ""
    if run.config.device == "cuda":
        peak_memory, device = torch.cuda.max_memory_allocated() / 2 ** 30, torch.cuda.get_device_name()
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), math.nan) * world_size()
    flops = lambda policy, rows: forward_flops(policy, lengths[rows], responses[rows])
    scoring = sum(flops(teacher, rollouts.of_teacher(name)) for name, teacher in run.teachers.items())
    training = 3 * flops(run.student, rollouts.keep)
    return {f"seconds_{phase}": value for phase, value in seconds.items()} | dict(
        response_tokens=int(responses.sum()), tokens_per_second=int(responses.sum()) / sum(seconds.values()),
        mfu_score=scoring / seconds["score"] / peak, mfu_update=training / seconds["update"] / peak,
        peak_memory_gb=peak_memory)

def evaluate(run):
    """Sample the held-out prompts, always from the same uniforms, and log the figures, also of each group."""
    if run.eval_prompts and run.evaluated != run.step:
        rollouts = rollout(run, run.eval_prompts, EVALUATE)
        score(run, rollouts)
        names = [prompt.group for prompt in run.eval_prompts]
        groups = {"": torch.ones(len(names), dtype=torch.bool)}
        for group in sorted(set(names) - {""}):
            groups[f"/{group}"] = torch.tensor([name == group for name in names])
        figures = measure(run, rollouts, groups)
        say(f"step {run.step}: evaluation: " + ", ".join(
            f"{name} {x:.3f}" for name, x in figures.items() if re.match("reverse_kl|exact_match", name)))
        log(run, dict(step=run.step) | {f"eval/{name}": value for name, value in figures.items()})
        run.evaluated = run.step

def show(run, rollouts):
    """Print kept and dropped rollouts: each token with the teacher's log-prob and weight, or shaded by it."""
    color, decode = sys.stdout.isatty() and "NO_COLOR" not in os.environ, run.tokenizer.decode
    half = run.config.show // 2
    kept, dropped = rollouts.keep.nonzero()[:, 0].tolist(), (~rollouts.keep).nonzero()[:, 0].tolist()
    for i in kept[:run.config.show - half] + dropped[:half]:
        text = f"    {visible(decode(rollouts.prompts[i].ids)[-80:], '')} -> "
        for t in range(min(int(rollouts.mask[i].sum()), 200)):
            token, w = visible(decode(rollouts.tokens[i, t]), ""), rollouts.weights[i, t].item()
            if color and rollouts.keep[i]:  # a grey background, the darker the heavier
                text += f"\x1b[48;5;{255 - int(10 * min(max(w, 0.5), 2))};38;5;16m{token}\x1b[0m"
            else:
                text += f"{token}({rollouts.teacher_log_probs[i, t]:.2f}, {w:.2f}) "
        verdict = "kept" if rollouts.keep[i] else "DROPPED"
        legend = "shaded by weight" if color and rollouts.keep[i] else "token(log pi_T, weight)"
        say(f"{verdict} in step {run.step}, score {rollouts.scores[i]:.3f}, {legend}:")
        if rank() == 0:
            tqdm.write(text)


# --- Settings: each is named, typed and bounded once; flags, JSON keys, --help and errors follow ------------

def setting(default, group, text, low=None, high=math.inf, choices=None):
    """A field of Config. low and high are inclusive."""
    return field(default=default, metadata=dict(group=group, text=text, low=low, high=high, choices=choices))

@dataclass
class Config:
    config: str = setting("", "run", "JSON file of settings; the command line wins over it")
    output_dir: str = setting("", "run", "new folder for metrics and checkpoints [runs/<time>]")
    resume: bool = setting(False, "run", "continue the newest checkpoint in --output-dir")
    steps: int = setting(100, "run", "steps; 0 checks everything, evaluates and stops", 0, 999999)
    seed: int = setting(0, "run", "of prompt order, sampling and the tiny pair", 0, 2**32 - 1)
    device: str = setting("auto", "run", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = setting("auto", "run", "auto: bfloat16 on cuda", choices=("auto", "float32", "bfloat16"))
    teacher: list = setting((), "models", "checkpoint folder or hub name; of several each as NAME=PATH")
    student: str = setting("", "models", "checkpoint folder or hub name")
    trust_remote_code: bool = setting(False, "models", "run model code that a checkpoint brings along")
    shard: bool = setting(False, "models", "FSDP2 instead of DDP: shard student, optimizer, teachers")
    gradient_checkpointing: bool = setting(False, "models", "recompute activations: less memory, more time")
    prompts: str = setting("", "data", "JSON Lines: prompt or problem; optional answer, teacher, group")
    eval_prompts: str = setting("", "data", "held-out prompts in the same format")
    chat_template: str = setting("auto", "data", "auto: the tokenizer's, if any", choices=("auto", "none"))
    enable_thinking: bool = setting(False, "data", "passed on to the chat template")
    max_prompt_tokens: int = setting(1024, "data", "longer prompts are dropped", 1)
    batch_size: int = setting(64, "rollout", "rollouts a step, over all ranks", 1, 10**6)
    rollouts_per_prompt: int = setting(1, "rollout", "rollouts of each prompt in a step", 1)
    max_new_tokens: int = setting(1024, "rollout", "longest response, in tokens", 1, 10**6)
    temperature: float = setting(1.0, "rollout", "of student and teacher, sampling and scoring", 1e-6)
    rollout_batch_size: int = setting(64, "rollout", "rows generated at once on a rank", 1)
    filter_percentile: float = setting(20.0, "method", "the filter's quantile of the scores, in %", 0, 100)
    filter_by: str = setting("likelihood", "method", "random: a control", choices=("likelihood", "random"))
    filter_scope: str = setting("step", "method", "what the quantile is over", choices=("step", "teacher"))
    alpha: float = setting(1.0, "method", "strength of teacher confidence in the weights", 0)
    beta: float = setting(1.0, "method", "strength of student confusion in the weights", 0)
    token_weights: str = setting("soft", "method", "the others: see ARMS",
                                 choices=("soft", "hard", "shuffled"))
    loss_agg: str = setting("token-mean", "method", "what the loss is a mean over",
                            choices=("token-mean", "seq-mean"))
    clip_ratio: float = setting(0.2, "method", "eps of the clipped objective", 1e-6, 1)
    updates_per_rollout: int = setting(1, "method", "mini-batches a step, with one AdamW update each", 1)
    lr: float = setting(1e-6, "optimizer", "constant learning rate of AdamW (betas 0.9, 0.999)", 1e-12)
    weight_decay: float = setting(0.01, "optimizer", "decoupled weight decay", 0)
    max_grad_norm: float = setting(1.0, "optimizer", "the gradient is clipped to this norm", 1e-6)
    micro_batch_tokens: int = setting(8192, "optimizer", "tokens in a forward pass, not of rollouts", 1)
    eval_every: int = setting(0, "watch", "steps between evaluations [0: before and after]", 0)
    eval_samples: int = setting(256, "watch", "held-out prompts in an evaluation", 1)
    save_every: int = setting(0, "watch", "steps between checkpoints [0: at the end]", 0)
    keep: int = setting(2, "watch", "checkpoints to keep", 1)
    show: int = setting(2, "watch", "rollouts to print after the first and the last step", 0)
    compare: bool = setting(False, "compare", "train every arm (OPD, FiRe-OPD, controls) and print the table")
    seeds: int = setting(5, "compare", "seeds to compare over, from --seed on", 1)
    arms: str = setting("", "compare", "some of the arms only, separated by commas [all]")
    regime: str = setting("foreign", "compare", "which tiny task of tiny_config.json")
    tiny: dict = setting(None, "compare", "(JSON only) how the tiny pair is made")

SETTINGS = {f.name: f for f in dataclasses.fields(Config)}
# A resumed run may differ in these. The two batch sizes change the last bits of floats, the device more.
MAY_DIFFER = ("output_dir", "steps", "device", "eval_every", "save_every", "keep", "show", "seeds", "arms",
              "rollout_batch_size", "micro_batch_tokens")

class UserError(Exception):
    """What is wrong, where, and what to do, in one line."""

@contextlib.contextmanager
def explain(what, advice):
    """Turns whatever a library raises on a user's file into one line: one mechanism, not a branch a case."""
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as error:
        name = "" if type(error) is ValueError else f"{type(error).__name__}: "  # ours speak for themselves
        raise UserError(f"{what}: {name}{' '.join(str(error).split())[:300]}; {advice}") from error

def flag(name):
    return "--" + name.replace("_", "-")

class Parser(argparse.ArgumentParser):
    """One flag a setting. Reads the command line and, rewritten as flags, the JSON file."""

    def __init__(self):
        super().__init__(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                         argument_default=argparse.SUPPRESS)
        groups = {}
        for name, f in SETTINGS.items():
            group, text = f.metadata["group"], f.metadata["text"]
            kinds = {bool: dict(action=argparse.BooleanOptionalAction), list: dict(action="append")}
            kind = kinds.get(f.type, dict(type=f.type, choices=f.metadata["choices"]))
            if f.type in (int, float) or f.default:
                text += f" [{f.default}]"
            groups[group] = groups.get(group) or self.add_argument_group(group)
            if f.type is not dict:
                groups[group].add_argument(flag(name), help=text.replace("%", "%%"), **kind)

    def read(self, argv, where):
        """-> the settings that these flags name; a UserError says where they stand."""
        self.where = where
        values, unknown = self.parse_known_args(argv)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], map(flag, SETTINGS), 1, cutoff=0)[0]
            self.error(f"unknown argument {unknown[0][:80]!r}; the nearest known one is {near}")
        return vars(values)

    def read_json(self, path, flags):
        """-> the settings of a file; of its regimes, the one that the flags or else the file name."""
        with explain(f"config {path}", "it must be a JSON object of settings, tiny as in tiny_config.json"):
            with open(path, encoding="utf-8") as file:
                settings = dict(json.load(file).items())
            if tiny := settings.pop("tiny", None):  # a regime's own settings win over the file's
                regime = (settings | flags).get("regime", Config.regime)
                if regime not in tiny["regimes"]:
                    raise ValueError(f"no regime {regime!r}, only {', '.join(tiny['regimes'])}")
                settings |= tiny["regimes"][regime]["settings"]
            argv = []
            for name, value in settings.items():
                if name == "help" or not isinstance(value, (str, int, float, list)):
                    raise ValueError(f"{name} cannot be {value!r}")
                if isinstance(value, bool):
                    argv.append(flag(name) if value else flag("no_" + name))
                else:
                    listed = name == "teacher" and isinstance(value, list)
                    argv += [f"{flag(name)}={item}" for item in (value if listed else [value])]
            return self.read(argv, f"config {path}") | dict(tiny=tiny)

    def error(self, message):
        raise UserError(f"{self.where}: {message}; see --help")

def parse_config(argv):
    """Defaults, then the JSON file, then the command line. No models and no --config: the tiny default."""
    parser = Parser()
    flags = parser.read(argv, "command line")
    path = flags.get("config", "")
    if not path and not flags.keys() & {"teacher", "student", "prompts", "eval_prompts"}:
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tiny_config.json")
    config = Config(**(parser.read_json(path, flags) if path else {}) | flags)
    for name, f in SETTINGS.items():
        value, low, high = getattr(config, name), f.metadata["low"], f.metadata["high"]
        if low is not None and (not low <= value <= high or value == math.inf):
            raise UserError(f"{name} must be finite and in [{low}, {high}], got {str(value)[:80]}")
    missing = [f"--{name}" for name in ("teacher", "student", "prompts") if not getattr(config, name)]
    if config.tiny and (len(missing) < 3 or config.eval_prompts):
        raise UserError(f"the tiny pair of {path} brings its own models and prompts; leave yours or it out")
    if missing and not config.tiny:
        raise UserError(f"--teacher, --student and --prompts go together; add {', '.join(missing)}")
    if config.batch_size % config.rollouts_per_prompt or config.batch_size % world_size():
        raise UserError(f"batch_size {config.batch_size} must be a multiple of rollouts_per_prompt "
                        f"({config.rollouts_per_prompt}) and of the number of ranks ({world_size()})")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and checkpoints(config.output_dir):
        config.resume = True  # torchrun --max-restarts has started us again
    if config.resume and not config.output_dir:
        raise UserError("command line: --resume needs --output-dir, the folder of the run to continue")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("command line: --device cuda, but torch finds no GPU; use --device cpu")
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.dtype == "auto":
        config.dtype = "bfloat16" if config.device == "cuda" else "float32"
    return config

def visible(text, newline="\n"):
    """Control characters spelled out: no prompt or rollout can move the terminal's cursor."""
    return "".join(c if c.isprintable() or c == newline else repr(c)[1:-1] for c in text)

def say(text):
    if rank() == 0:
        tqdm.write(visible(text))
        sys.stdout.flush()

def note(text, follows=None):
    """A line of the preflight report: ok, or a warning with what follows from it."""
    say(f"warning  {text}: {follows}" if follows else f"     ok  {text}")

def progress(total, label):
    return tqdm(total=total, desc=label, disable=rank() != 0 or not sys.stderr.isatty(), leave=False)


# --- Prompts ------------------------------------------------------------------------------------------------

def read_jsonl(path):
    """(where, object) of each line that is not blank; every fault names its line."""
    with explain(path, "give a JSON Lines file; paths start at the current folder"), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                with explain(f"{path} line {number}", "each line must be one JSON object in UTF-8"):
                    row = json.loads(line.decode("utf-8"))
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                yield f"{path} line {number}", row

def tokenize(prompt, tokenizer, config):
    """A string or a list of messages -> token ids, through the chat template if there is one and wanted."""
    if config.chat_template == "none" or not tokenizer.chat_template:
        if isinstance(prompt, list):
            raise ValueError("a list of messages needs a chat template")
        return tokenizer(prompt, verbose=False)["input_ids"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[-1]["role"] == "assistant":  # a row of a fine-tuning set: its reply is not for us
        messages = messages[:-1]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False,
                                         enable_thinking=config.enable_thinking)

def parse_prompt(run, row, teachers):
    """A row of a prompt file -> Prompt; a ValueError says what is wrong with it."""
    content = next((row[key] for key in ("prompt", "problem", "messages") if row.get(key)), None)
    if not isinstance(content, (str, list)):
        raise ValueError("no prompt: give 'prompt' (a string or messages) or 'problem'")
    for key in ("answer", "teacher", "group"):
        if not isinstance(row.get(key), (str, type(None))):
            raise ValueError(f"{key!r} must be a string, got {str(row[key])[:60]!r}")
    teacher = row.get("teacher") or (teachers[0] if len(teachers) == 1 else None)
    if teacher not in teachers:
        raise ValueError(f"teacher {teacher!r} is not one of {', '.join(teachers)}: give --teacher NAME=PATH")
    ids = list(tokenize(content, run.tokenizer, run.config))
    if not ids:
        raise ValueError("the prompt has no tokens")
    if max(ids) >= run.vocab_size:
        raise ValueError(f"{run.tokenizer.convert_ids_to_tokens(max(ids))!r} is unknown to a teacher")
    return Prompt(ids, row.get("answer") or None, teacher, row.get("group") or "")

def load_prompts(run, path, teachers):
    """-> the prompts of a file, for these teachers; those longer than max_prompt_tokens are dropped."""
    prompts, longest = [], run.config.max_prompt_tokens
    for where, row in read_jsonl(path):
        with explain(where, "mend or remove this line (or mend the chat template)"):
            prompts.append(parse_prompt(run, row, teachers))
    kept = [prompt for prompt in prompts if len(prompt.ids) <= longest]
    if not kept:
        raise UserError(f"{path}: {len(prompts)} prompts, none of at most --max-prompt-tokens {longest}; add "
                        f"some or raise it")
    lengths, counts = [len(prompt.ids) for prompt in kept], Counter(prompt.teacher for prompt in kept)
    note(f"{path}: {len(kept)} prompts of {min(lengths)} to {max(lengths)} tokens, "
         + ", ".join(f"{count} for teacher {name}" for name, count in counts.items()),
         len(kept) < len(prompts) and f"{len(prompts) - len(kept)} longer than {longest} tokens are dropped")
    return kept


# --- Models -------------------------------------------------------------------------------------------------

def teacher_paths(config):
    """--teacher math=PATH --teacher code=PATH -> {"math": PATH, "code": PATH}; a bare PATH is "teacher"."""
    named = {}
    for entry in config.teacher:
        name, equals, path = entry.partition("=")
        if not equals or "/" in name or os.path.exists(entry):
            name, path = "teacher", entry
        if name in named or not path:
            raise UserError(f"command line: --teacher {entry!r}: give each teacher a NAME=PATH of its own")
        named[name] = path
    return named

def fetch(name, what):
    """The local folder of a checkpoint: itself, or the snapshot of a hub name (never its pickled weights)."""
    if os.path.isdir(name):
        return name
    with explain(f"{what} {name}", "no such folder; give one, or a hub name such as Qwen/Qwen3-0.6B"):
        return huggingface_hub.snapshot_download(name, etag_timeout=5, ignore_patterns=[
            "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx"])

def load_tokenizer(folder, config):
    with explain(f"tokenizer of {folder}", "give a complete checkpoint folder, tokenizer included"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True,
                                             trust_remote_code=config.trust_remote_code)

def load_model(run, folder, dtype):
    """A causal LM on the host, complete and wide and long enough for this run's prompts."""
    config = run.config
    with explain(f"model of {folder}", "give a complete safetensors checkpoint of a causal LM"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=config.trust_remote_code)
        if broken := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
            raise ValueError(f"{len(broken)} weights are missing or of another shape, such as {broken[0]}")
        if (rows := len(model.get_output_embeddings().weight)) < run.vocab_size:
            raise ValueError(f"{rows} output rows for {run.vocab_size} tokens")
        c = model.config.get_text_config()
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(c, name, None) not in (None, 1):
                raise ValueError(f"its {name} is not supported: logits must be hidden @ W.T")
    longest = max(len(prompt.ids) for prompt in run.prompts + run.eval_prompts) + config.max_new_tokens
    limit = getattr(c, "max_position_embeddings", None) or longest
    if longest > limit:
        raise UserError(f"model of {folder}: prompt and response may take {longest} tokens, its positions "
                        f"end at {limit}; lower --max-new-tokens or --max-prompt-tokens")
    return model.eval()  # no dropout: the policy that is trained is the one that wrote

def shared_vocabulary(student, teacher, name):
    """The width of the vocabulary that both tokenizers know, compared id by id. The widths of the embeddings
    prove nothing: they are padded, differently from size to size, and one width can hold other tokens."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()  # token -> id
    ids = set(theirs.values())
    wrong = sorted((i, token) for token, i in ours.items() - theirs.items() if token in theirs or i in ids)
    if wrong:
        pairs = " and ".join(f"{t!r} (student {i}, teacher {theirs.get(t)})" for i, t in wrong[:2])
        raise UserError(f"teacher {name}: {len(wrong)} of the student's {len(ours)} tokens do not agree with "
                        f"its vocabulary, such as {pairs}; choose a pair that shares one")
    common = 1 + max((i for _, i in ours.items() & theirs.items()), default=-1)
    note(f"vocabulary: student {len(ours)} ids, teacher {name} {len(theirs)}",
         "" if len(ours) == len(theirs) else f"only the first {common} are sampled and graded")
    return common

def end_ids(model, tokenizer, config, vocab_size):
    """Every id that ends a response: the checkpoint's own and the chat template's end of turn, which a Base
    checkpoint may not list: it would then run on to the length limit where its teacher stops."""
    ids = set()
    for source in (model.generation_config, model.config, tokenizer):
        listed = getattr(source, "eos_token_id", None)
        ids |= {listed} if isinstance(listed, int) else set(listed or ())
    if tokenizer.chat_template and config.chat_template == "auto":
        with contextlib.suppress(Exception):  # a template that renders no replies has no end of turn to offer
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "@reply@"}]
            tail = tokenizer.apply_chat_template(turns, tokenize=False).split("@reply@")[-1]
            first = tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
            ids |= set(first) & set(tokenizer.all_special_ids)
    return {i for i in ids if i < vocab_size}

def load(config):
    """Check files, then tokenizers and prompts, then load models, and report it line by line. -> Run"""
    for path in filter(None, (config.prompts, config.eval_prompts)):
        list(read_jsonl(path))  # a broken file should not cost a download
    student = fetch(config.student, "student")
    teachers = {name: fetch(path, f"teacher {name}") for name, path in teacher_paths(config).items()}
    run = Run(config, tokenizer=load_tokenizer(student, config))
    theirs = {name: load_tokenizer(folder, config) for name, folder in teachers.items()}
    run.vocab_size = min(shared_vocabulary(run.tokenizer, other, name) for name, other in theirs.items())
    run.prompts = load_prompts(run, config.prompts, list(teachers))
    if config.eval_prompts:
        run.eval_prompts = load_prompts(run, config.eval_prompts, list(teachers))[:config.eval_samples]
        if len(run.eval_prompts) < world_size():
            raise UserError(f"{config.eval_prompts}: fewer prompts than the {world_size()} ranks; add some")
    else:
        note("no --eval-prompts", "nothing held out is evaluated")
    note(f"first prompt, {len(run.prompts[0].ids)} tokens: {run.tokenizer.decode(run.prompts[0].ids)!r}")
    open_output(config)
    if config.resume:
        student, state = newest_checkpoint(config, prompts_digest(run))
    if config.shard and world_size() > 1:
        run.mesh = init_device_mesh(config.device, (world_size(),))
    load_student(run, student)
    for name, folder in teachers.items():
        load_teacher(run, name, folder, theirs[name])
    if config.resume:
        resume(run, student, state["step"])
    report_memory(run)
    return run

def load_student(run, folder):
    """The student with what sampling and training need: end of sequence, ranks, optimizer."""
    config = run.config
    # AdamW at 1e-6 on bf16 weights rounds nearly every update away: float32 masters, bf16 only in autocast.
    model = load_model(run, folder, torch.float32)
    if model.num_parameters() < 1e6:
        torch.set_num_threads(1)  # two are slower for so small a model
    run.eos_ids = end_ids(model, run.tokenizer, config, run.vocab_size)
    if not run.eos_ids:
        note("the student has no end of sequence", "every response will be --max-new-tokens long")
    run.pad_id = run.tokenizer.pad_token_id
    if run.pad_id is None:
        run.pad_id = min(run.eos_ids, default=0)
    # Replaced, not overridden: what a passed config leaves unset is filled from the checkpoint's (top_k 20).
    run.generation_config, model.generation_config = model.generation_config, GenerationConfig(
        do_sample=False, eos_token_id=sorted(run.eos_ids) or None, pad_token_id=run.pad_id)
    ignored = {key: value for key, value in run.generation_config.to_diff_dict().items() if value is not None
               and not re.search("token_id$|^(transformers|use_cache|output_|_)", key)}
    note(f"sampling is softmax(logits / {config.temperature}) and nothing else; ignored of the student's "
         f"generation config: {ignored or 'nothing'}")
    run.student = run.trained = Policy(model, run.vocab_size, config)
    place(run, run.student)
    if world_size() > 1 and not run.mesh:  # bucket view: no second copy of the gradients
        run.trained = DistributedDataParallel(run.student, gradient_as_bucket_view=True)
    run.optimizer = torch.optim.AdamW(run.student.parameters(), lr=config.lr, betas=(0.9, 0.999), fused=True,
                                      weight_decay=config.weight_decay)

def load_teacher(run, name, folder, tokenizer):
    """A teacher, without gradients; tokenizer is its own, compared with the student's."""
    config = run.config
    for turn in range(world_size()):  # in turns: the host holds a large teacher once, not once a rank
        if turn == rank():
            dtype = torch.float32 if config.dtype == "float32" else "auto"  # else its own
            model = load_model(run, folder, dtype).requires_grad_(False)
            run.teachers[name] = Policy(model, run.vocab_size, config)
            place(run, run.teachers[name])
        barrier()
    ends = end_ids(model, tokenizer, config, run.vocab_size)
    note(f"end of sequence: student {sorted(run.eos_ids)}, teacher {name} {sorted(ends)}",
         ends != run.eos_ids and "rollouts end at the student's only, and their length may drift")
    if tokenizer.chat_template != run.tokenizer.chat_template and config.chat_template == "auto":
        note(f"teacher {name} has another chat template", "it grades prompts rendered by the student's")

def place(run, policy):
    """Move a policy from the host to the device: all of it, or with --shard this rank's part."""
    config, student = run.config, policy is run.student
    if student and config.gradient_checkpointing:  # torch's: transformers' needs training mode, so dropout
        for layer in policy.layers():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if not run.mesh:
        policy.to(config.device)
        return
    # The student stays whole from its first sampled token to the backward pass: gathering it for every token
    # would cost far more than the memory is worth. Teachers are gathered layer by layer.
    options = dict(mesh=run.mesh, reshard_after_forward=not student)
    if student and config.dtype == "bfloat16":
        # Inputs are left alone: uniforms in bf16 would be 1 now and then, and draw the last token.
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in policy.layers():
        fully_shard(layer, **options)
    fully_shard(policy, **options)  # not the inner model: the head may be tied to the embedding
    for method in ("sample", "logits"):
        register_fsdp_forward_method(policy, method)

def self_test(run):
    """Scoring a rollout must find what a plain forward finds, and the student's what its sampler found."""
    config, eps = run.config, torch.finfo(getattr(torch, run.config.dtype)).eps
    drawn = uniforms(config.seed, EVALUATE, width=min(16, config.max_new_tokens))
    tokens, sampled = run.student.sample([run.prompts[0].ids], drawn, run.eos_ids, run.pad_id)
    rollouts = Rollouts(run.prompts[:1], tokens, response_mask(tokens, run.eos_ids), None, sampled)
    ids, response = pack(rollouts, [0], config.device)  # [1, L], [1, L]
    n = int(response.sum())
    for name, policy in {"the student": run.student, **run.teachers}.items():
        with torch.no_grad():
            scored = policy(ids, response)[0]  # [n]
            logits = policy.logits(ids)[:, :-1][response[:, 1:]]  # [n, V]
        plain = (logits / config.temperature).log_softmax(1).gather(1, ids[response][:, None])[:, 0]  # [n]
        gap, own = (scored - plain).abs().max().item(), 0.0
        if policy is run.student:
            own = divergence = (sampled[0, :n].to(scored) - scored).mean().item()
        limit = max(1e-3, 4 * eps * logits.abs().max().item()) / min(1, config.temperature)  # for rounding
        if not max(gap, abs(own)) < limit:
            raise UserError(f"self-test of {name}: log-probs are {gap:.2g} off a plain forward's, {own:.2g} "
                            f"off the sampler's; a model that scales or caps its logits is not supported")
    note(f"self-test on {n} sampled tokens: the student's reverse KL to itself is {divergence:.1e}")

def report_memory(run):
    """What a rank needs before its first activation, against what it has."""
    config, shards = run.config, world_size() if run.config.shard else 1
    size = lambda policy: sum(p.numel() for p in policy.parameters())
    # Weights, gradients and two moments in float32; a sharded student is whole from rollout to backward.
    gb = (size(run.student) * (16 / shards + 4 * (shards > 1))
          + sum(p.nbytes for t in run.teachers.values() for p in t.parameters()) / shards) / 2 ** 30
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world_size()
    there = (torch.cuda.mem_get_info()[1] if config.device == "cuda" else host) / 2 ** 30
    note(f"parameters: student {size(run.student) / 1e6:.1f} M, " + ", ".join(
         f"{name} {size(t) / 1e6:.1f} M in {str(t.model.dtype)[6:]}" for name, t in run.teachers.items())
         + f"; compute {config.dtype} on {config.device}; {gb:.2f} of {there:.0f} GB before activations",
         gb > there and "this will not fit; use more ranks with --shard, or smaller models")


# --- Checkpoints and the log --------------------------------------------------------------------------------

def open_output(config):
    """Make the output folder, unless the run in it is to be continued. Another run is never overwritten."""
    if rank() == 0 and config.steps and not config.resume:
        with explain(f"output folder {config.output_dir}", "choose another --output-dir"):
            os.makedirs(config.output_dir, exist_ok=True)
            config.output_dir.encode()  # names that are not UTF-8 break the saving of tokenizers
            log_exists = os.path.exists(os.path.join(config.output_dir, "metrics.jsonl"))
            if log_exists or checkpoints(config.output_dir):
                raise ValueError("it holds a run already; continue it with --resume")
            write_json(os.path.join(config.output_dir, "config.json"), settings_of(config))
            open(os.path.join(config.output_dir, "metrics.jsonl"), "w").close()
    barrier()

def settings_of(config):
    return {name: value for name, value in dataclasses.asdict(config).items()
            if name not in ("config", "resume", "compare", "tiny")}

def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)

def checkpoints(folder):
    """Complete checkpoints, oldest first: only a complete one ever gets its name."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names if re.fullmatch(r"checkpoint-\d{6}", name)]

def newest_checkpoint(config, digest=None):
    """The checkpoint that --resume continues, and its state; an error if settings or prompts were others."""
    found = checkpoints(config.output_dir)
    if not found:
        raise UserError(f"--resume: no complete checkpoint in {config.output_dir!r}; start without --resume")
    with explain(f"checkpoint {found[-1]}", "remove this folder to continue the checkpoint before it"):
        with open(os.path.join(found[-1], "trainer_state.json"), encoding="utf-8") as file:
            state = json.load(file)
        if int(found[-1][-6:]) != state["step"] or not state["prompts"]:
            raise ValueError("trainer_state.json is of another checkpoint")
        now, before = settings_of(config), state["settings"]
        changed = [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now
                   if name not in MAY_DIFFER and before.get(name) != now[name]]
    if changed:
        raise UserError(f"--resume: other settings than those of {found[-1]}: {'; '.join(changed)}; only "
                        f"{', '.join(MAY_DIFFER)} may differ")
    if digest and digest != state["prompts"]:
        raise UserError(f"--resume: other (held-out) prompts than those of {found[-1]}; restore them")
    return found[-1], state

def prompts_digest(run):
    content = json.dumps([dataclasses.astuple(prompt) for prompt in run.prompts + run.eval_prompts])
    return hashlib.sha256(content.encode()).hexdigest()

@contextlib.contextmanager
def complete_folder(folder):
    """A folder that gets its name when all of it is on the disk: no kill at any moment leaves half of one."""
    def to_disk(path):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    temporary = folder + ".partial"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    yield temporary
    for root, _, names in os.walk(temporary):
        for path in [os.path.join(root, name) for name in names] + [root]:
            to_disk(path)
    os.rename(temporary, folder)
    to_disk(os.path.dirname(folder))

STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of plain, DDP and sharded models alike

def save_checkpoint(run):
    """The student (an ordinary checkpoint folder), its optimizer and the step.

    There is no random state in it and no data position: both are functions of the seed and the step.
    """
    config, model = run.config, run.student.model
    folder = os.path.join(config.output_dir, f"checkpoint-{run.step:06d}")
    weights = get_model_state_dict(run.trained, options=STATE)  # collective: rank 0 gets the shards of all
    moments = {}  # before its first update; asking for them then would make some that have counted a step
    if run.optimizer.state:
        moments = get_optimizer_state_dict(run.trained, run.optimizer, options=STATE)
    if rank() == 0 and not os.path.exists(folder):
        with explain(f"checkpoint {folder}", "make room and --resume: the last complete one is intact"), \
                complete_folder(folder) as temporary:
            # Under the model's own names, and once: a tied head is saved as the embedding that it is.
            untied = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
            weights = {name.removeprefix("model."): value for name, value in weights.items()}
            model.save_pretrained(temporary, state_dict={k: v for k, v in weights.items() if k in untied})
            run.generation_config.save_pretrained(temporary)
            run.tokenizer.save_pretrained(temporary)
            save_file({f"{name}.{key}": value.contiguous() for name, entry in moments.get("state", {}).items()
                       for key, value in entry.items()}, os.path.join(temporary, "optimizer.safetensors"))
            state = dict(step=run.step, settings=settings_of(config), prompts=prompts_digest(run))
            write_json(os.path.join(temporary, "trainer_state.json"), state)
        for old in checkpoints(config.output_dir)[:-config.keep]:
            shutil.rmtree(old, ignore_errors=True)
    barrier()
    return folder

def resume(run, folder, step):
    """Restore the optimizer and the step (the weights are loaded already), cut the log back to that step."""
    with explain(f"checkpoint {folder}", "remove this folder to continue the checkpoint before it"):
        if moments := load_file(os.path.join(folder, "optimizer.safetensors")):
            optimizer = get_optimizer_state_dict(run.trained, run.optimizer, options=STATE)
            for name, entry in optimizer.get("state", {}).items():  # rank 0's; the others are sent theirs
                entry.update({key: moments.pop(f"{name}.{key}") for key in entry})
            set_optimizer_state_dict(run.trained, run.optimizer, optimizer, options=StateDictOptions(
                full_state_dict=True, cpu_offload=True, broadcast_from_rank0=world_size() > 1))
    run.step, path = step, os.path.join(run.config.output_dir, "metrics.jsonl")
    if rank() == 0:
        with explain(path, "it must be the log of the run to continue"):
            rows = []
            for line in open(path, encoding="utf-8"):
                with contextlib.suppress(ValueError):  # a full disk may have torn the last line
                    rows.append(json.loads(line))
            with open(path + ".partial", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows if row["step"] <= run.step)
            os.replace(path + ".partial", path)
    barrier()
    run.evaluated = max((row["step"] for row in read_log(run.config.output_dir)[0]), default=-1)

def log(run, row):
    """Append a line to metrics.jsonl. JSON has no NaN: null stands for a figure without a value."""
    if rank() == 0 and run.config.steps:
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        path = os.path.join(run.config.output_dir, "metrics.jsonl")
        with explain(path, "make room and --resume"), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

def read_log(folder):
    """-> the evaluation rows and the training rows of a run."""
    rows = [{name: math.nan if value is None else value for name, value in row.items()}
            for _, row in read_jsonl(os.path.join(folder, "metrics.jsonl"))]
    return [row for row in rows if "loss" not in row], [row for row in rows if "loss" in row]


# --- The tiny pair: a teacher and a student made in seconds. A reader of the method can skip this -----------

def tiny_tokenizer():
    """One token a character."""
    vocab = {token: i for i, token in enumerate([*"0123456789+,=", "<pad>", "<eos>", "<unk>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   unk_token="<unk>")

def tiny_rows(rng, count, digits, mixture):
    """count prompts of a mixture of domains {domain: share}. "+" asks for the running sum mod 10 of some
    digits, "," for their running maximum; in both an early slip poisons what follows."""
    for domain in rng.choice(list(mixture), count, p=list(mixture.values())).tolist():
        numbers = rng.integers(0, 10, digits)
        answer = np.cumsum(numbers) % 10 if domain == "+" else np.maximum.accumulate(numbers)
        prompt = "".join(map(str, numbers)) + domain + "="
        yield dict(prompt=prompt, answer="".join(map(str, answer)), group=domain)

def pretrain(name, shape, domains, target_loss, tiny, seed):
    """Plain next-token training of a new Qwen3 on these domains until the smoothed loss is target_loss."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng, tokenizer = np.random.default_rng((seed, PRETRAIN, *name.encode())), tiny_tokenizer()
    heads, hidden = shape["num_attention_heads"], shape["hidden_size"]
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, intermediate_size=3 * hidden, num_key_value_heads=heads,
        head_dim=hidden // heads, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=tiny["pretrain_lr"], weight_decay=0.0, fused=True)
    smooth, step = math.inf, 0
    with progress(tiny["pretrain_steps"], name) as bar:
        while smooth >= target_loss and step < tiny["pretrain_steps"]:
            rows = tiny_rows(rng, 128, tiny["digits"], dict.fromkeys(domains, 1 / len(domains)))
            texts = [row["prompt"] + row["answer"] + "<eos>" for row in rows]
            ids = tokenizer(texts, return_tensors="pt")["input_ids"]  # [128, 2 digits + 3]
            labels = ids.clone()
            labels[:, :tiny["digits"] + 2] = -100  # the prompt is not learned
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if STOP.is_set():  # nothing is worth saving yet
                raise Stopped
            smooth = 0.8 * smooth + 0.2 * loss.item() if step else loss.item()
            step += 1
            bar.update()
            bar.set_postfix(loss=smooth)
    if smooth >= target_loss:
        note(f"{name} was to reach loss {target_loss}", "it has not learned its task; try another seed")
    count = sum(p.numel() for p in model.parameters())
    say(f"{name}: {count:,} parameters, loss {smooth:.3f} after {step} steps")
    return model

def make_tiny(config):
    """Train the tiny pair, once for an output folder, and write it and its prompts as ordinary files.

    -> config with teacher, student, prompts and eval_prompts filled in: from there on, a run like any other.
    """
    regime = config.tiny["regimes"][config.regime]
    made_of = json.dumps([config.seed, config.tiny, regime])
    root = os.path.join(config.output_dir, "tiny-" + hashlib.sha256(made_of.encode()).hexdigest()[:8])
    if rank() == 0 and not os.path.exists(root):
        with explain(f"tiny pair {root}", f"mend tiny in {config.config}, or choose another --output-dir"), \
                complete_folder(root) as temporary:
            write_tiny(temporary, config.tiny, regime, config.seed)
    barrier()
    return dataclasses.replace(
        config, teacher=[f"{name}={os.path.join(root, name)}" for name in regime["teachers"]], tiny=None,
        student=os.path.join(root, "student"), prompts=os.path.join(root, "prompts.jsonl"),
        eval_prompts=os.path.join(root, "eval_prompts.jsonl"))

def write_tiny(folder, tiny, regime, seed):
    """The models and prompts of a regime: teachers {name: its domain}, mixture {domain: share of prompts}."""
    teachers, mixture = regime["teachers"], regime["mixture"]
    if not all(re.fullmatch(r"[\w-]+", name) and name != "student" for name in teachers):
        raise ValueError("teachers need plain names other than 'student'")
    small = tiny["student"] | regime.get("student", {})
    models = {"student": pretrain("student", small, list(mixture), regime["student_loss"], tiny, seed)}
    for name, domain in teachers.items():
        models[name] = pretrain(name, tiny["teacher"], [domain], tiny["teacher_loss"], tiny, seed)
    for name, model in models.items():
        model.save_pretrained(os.path.join(folder, name))
        tiny_tokenizer().save_pretrained(os.path.join(folder, name))
    grades = {domain: name for name, domain in teachers.items()}
    rng, first = np.random.default_rng((seed, ORDER)), next(iter(teachers))
    even = dict.fromkeys(mixture, 1 / len(mixture))
    for name, count, shares in (("prompts", 4096, mixture), ("eval_prompts", 512, even)):
        with open(os.path.join(folder, name + ".jsonl"), "w", encoding="utf-8") as file:
            for row in tiny_rows(rng, count, tiny["digits"], shares):
                row["teacher"] = grades.get(row["group"], first)
                file.write(json.dumps(row) + "\n")


# --- The comparison: every arm is a few settings ------------------------------------------------------------

ARMS = {
    "OPD": dict(filter_percentile=0.0, alpha=0.0, beta=0.0),
    "filter only": dict(alpha=0.0, beta=0.0),
    "reweight only": dict(filter_percentile=0.0),
    "FiRe-OPD": {},
    "hard tokens": dict(token_weights="hard"),
    "random filter": dict(filter_by="random"),
    "shuffled weights": dict(token_weights="shuffled"),
}

def compare(config):
    """Every arm from the same teacher, student, prompts and uniforms, seed by seed; then the table."""
    arms = list(dict.fromkeys(name.strip() for name in config.arms.split(","))) if config.arms else list(ARMS)
    if set(arms) - set(ARMS):
        raise UserError(f"--arms {config.arms!r}: the arms are {', '.join(ARMS)}")
    if not config.steps or not config.tiny and not config.eval_prompts:
        raise UserError("--compare needs --steps and --eval-prompts: arms are compared on held-out prompts")
    last = {arm: [] for arm in arms}  # the last evaluation of each seed
    for seed in range(config.seed, config.seed + config.seeds):
        root = os.path.join(config.output_dir, f"seed-{seed}")
        base = dataclasses.replace(config, seed=seed, output_dir=root)
        base = make_tiny(base) if base.tiny else base
        for arm in arms:
            folder = os.path.join(root, arm.replace(" ", "-"))
            settings = dict(filter_by="likelihood", token_weights="soft") | ARMS[arm]
            one = dataclasses.replace(base, output_dir=folder, show=0, **settings)
            one.resume = bool(checkpoints(folder))  # a finished arm has nothing left to do but to be checked
            if rank() == 0 and not one.resume and os.path.exists(os.path.join(folder, "config.json")):
                shutil.rmtree(folder)  # interrupted before its first checkpoint
            barrier()
            say(f"\n=== seed {seed}, {arm}")
            train(one)
            last[arm].append(read_log(folder)[0][-1])
            if last[arm][-1]["step"] != config.steps:
                raise UserError(f"{folder} holds a run of more steps; choose another --output-dir")
    table = comparison_table(config, last)
    say(f"\n{table}\nmean ± half width of its 95 % interval over seeds (standard deviation; paired "
        f"difference to {'OPD' if 'OPD' in arms else arms[0]} ± half width)")
    if rank() == 0:
        with open(os.path.join(config.output_dir, "comparison.md"), "w", encoding="utf-8") as file:
            file.write(table)

def comparison_table(config, last):
    """Markdown: a row for each arm, a column for each figure. last: arm -> last evaluation of each seed."""
    plain = last.get("OPD") or next(iter(last.values()))  # what the others are compared with
    names = [name for name in plain[0] if re.match("eval/(exact_match|reverse_kl)", name)]
    lines = [f"| {config.seeds} seeds, {config.steps} steps | " + " | ".join(names) + " |",
             "|---" * (len(names) + 1) + "|"]
    for arm, rows in last.items():
        cells = [arm]
        for name in names:
            centre, deviation, half = interval([row[name] for row in rows])
            gain, _, gain_half = interval([row[name] - other[name] for row, other in zip(rows, plain)])
            cells.append(f"{centre:.3f} ± {half:.3f} (sd {deviation:.3f}; {gain:+.3f} ± {gain_half:.3f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"

def interval(values):
    """Mean, standard deviation and half width of the 95 % interval (Student's t) over seeds."""
    n, centre = len(values), np.mean(values)
    if n < 2:
        return centre, math.nan, math.nan
    deviation = np.std(values, ddof=1)
    t = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 97.5 % quantile at n - 1 = 1 to 9
    return centre, deviation, (t[n - 2] if n <= 10 else 1.96 + 2.6 / (n - 1)) * deviation / math.sqrt(n)


# --- The command --------------------------------------------------------------------------------------------

def on_signal(number, frame):
    if STOP.is_set():  # the second one ends at once
        os._exit(128 + number)
    STOP.set()

def set_up(config):
    """Join the other ranks, take the signals, quieten the libraries."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world_size() > 1:  # an hour: longer than any rank has to wait for the slowest one
        dist.init_process_group("cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=1))
    STOP.clear()
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    if not config.output_dir:
        now = sum_over_ranks(torch.tensor(0.0 if rank() else time.time(), dtype=torch.float64)).item()
        config.output_dir = time.strftime("runs/%Y%m%d-%H%M%S", time.localtime(now))

def fail(message):
    """One line and status 2. Under torchrun the line is also left where its report finds the root cause."""
    if rank():  # if the fault is everybody's, rank 0 says so and torchrun ends the others meanwhile
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    message = visible(" ".join(message.split())[:900])
    print(f"error: {message}", file=sys.stderr, flush=True)
    if world_size() == 1:
        raise SystemExit(2)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        write_json(path, {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}})
    os._exit(2)  # an orderly exit would wait for the other ranks

def main(argv=None):
    status = 0
    try:
        config = parse_config(argv)
        set_up(config)
        if config.compare:
            compare(config)
        else:
            train(make_tiny(config) if config.tiny else config)
        barrier()
    except Stopped:
        status = 130
    except UserError as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        fail("out of GPU memory; lower --rollout-batch-size (rollout) or --micro-batch-tokens (scoring, "
             "update), or add --gradient-checkpointing or --shard")
    except Exception as error:  # not foreseen: still one line, unless asked for more
        if sys.flags.dev_mode:
            raise
        fail(f"{type(error).__name__}: {error}; python -X dev shows where; complete checkpoints are intact")
    if dist.is_initialized():  # Gloo's teardown may abort, even past the last collective
        sys.stdout.flush()
        os._exit(status)
    if status:
        raise SystemExit(status)

if __name__ == "__main__":
    main()
